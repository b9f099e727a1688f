"""Figure: accuracy on the documents that the half-size view gets wrong, where looking closer can help at all."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..data import names, stats
from ..data.summary import reference, summary
from . import style

TITLE = "Accuracy where the half-size view is wrong"
READING = "Only documents that half size gets wrong count here: further to the right, more of them are put right."

MOST = 40


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> method, label, family, accuracy, low, high (fractions), documents: over those that half size scores below 0.5 on.

    The mean is over tasks. Empty without a half-size run, or where it is never wrong; half size itself is left out.
    """
    low = reference(frame, "low")
    wrong = frame[(frame["method"] == low) & (frame["score"] < 0.5)][["task", "doc_id"]]
    keys = pd.MultiIndex.from_frame(wrong.astype({"task": str}))
    hard = frame[pd.MultiIndex.from_frame(frame[["task", "doc_id"]].astype({"task": str})).isin(keys)] if low else frame.head(0)
    if hard.empty or hard["method"].nunique() < 2:
        return pd.DataFrame(columns=["method", "label", "family", "accuracy", "low", "high", "documents"])
    summaries = summary(hard)
    means = stats.intervals(hard).query("task == 'mean'").set_index("method")
    rows = []
    for m in hard.drop_duplicates("method").itertuples():
        cell = summaries[m.method]["mean"]
        if m.method != low and cell["accuracy"] is not None:
            same = {"method": m.method, "label": m.label, "family": m.family, "accuracy": cell["accuracy"]}
            rows.append(same | dict(means.loc[m.method, ["low", "high"]]) | {"documents": cell["documents"]})
    return pd.DataFrame(rows, columns=["method", "label", "family", "accuracy", "low", "high", "documents"])


def draw(table: pd.DataFrame, on: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: a point per run, best first."""
    ordered = table.sort_values("accuracy", ascending=False, kind="stable")
    cut = [f"The best {MOST} of {len(ordered)} runs; all are in the CSV."] if len(ordered) > MOST else []
    ordered = ordered.head(MOST)
    with style.house_style():
        figure, axes = style.subplots(0.75 + 0.16 * len(ordered))
        for y, r in enumerate(ordered.itertuples()):
            spread = 100 * np.array([[r.accuracy - r.low], [r.high - r.accuracy]])
            look = {"color": names.colour(r.family), "elinewidth": 0.8}
            bar = axes.errorbar(100 * r.accuracy, y, xerr=spread, fmt=names.marker(r.family), **look)
            bar.lines[0].set_clip_on(False)  # a mark at 100 % is drawn whole
        axes.set_yticks(range(len(ordered)), [names.short(label) for label in ordered["label"]])
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.set_xlim(0, 102)
        axes.set_xlabel("accuracy where half size is wrong (%)", loc="right")
        style.title(figure, TITLE, on)
        counted = f"{ordered['documents'].max():,} documents, mean over tasks; bars: 95 % bootstrap interval."
        style.footnote(figure, [*notes, *cut, counted])
    return figure
