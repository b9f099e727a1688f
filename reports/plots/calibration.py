"""Figure: calibration of the tool decision: how often a method looks closer, against how often that was needed, task by task."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ..data import names
from ..data.summary import reference
from . import style

TITLE = "Looking closer: how often, and how often needed"
READING = (
    "A point for each task: to the right, tasks where full resolution helps more documents; higher, tasks where the method looks closer "
    "more often. Near the line it looks about as often as needed."
)

MOST = 8
"""Runs whose points stay apart; the CSV has them all."""


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> method, label, family, task, needed, called, called_needed, called_not_needed (fractions of documents).

    needed: full resolution scores higher than half size on the document. Empty without both runs, or where no method calls.
    """
    full, low = reference(frame, "full"), reference(frame, "low")
    columns = ["method", "label", "family", "task", "needed", "called", "called_needed", "called_not_needed", "documents"]
    if not full or not low:
        return pd.DataFrame(columns=columns)
    scores = frame[frame["method"].isin([full, low])].astype({"method": str, "task": str})
    scores = scores.pivot(index=["task", "doc_id"], columns="method", values="score").dropna()
    need = (scores[full] > scores[low]).rename("needed").reset_index()
    rows = []
    for method, own in frame.groupby("method", sort=False, observed=True):
        if not own["called"].any() or method in (full, low):
            continue
        both = own.astype({"task": str}).merge(need, on=["task", "doc_id"])
        for task, documents in both.groupby("task", sort=False):
            called, needed = documents["called"], documents["needed"]
            row = {"method": method, "label": documents["label"].iloc[0], "family": documents["family"].iloc[0], "task": task}
            row |= {"needed": needed.mean(), "called": called.mean(), "documents": len(documents)}
            rows.append(row | {"called_needed": called[needed].mean(), "called_not_needed": called[~needed].mean()})
    return pd.DataFrame(rows, columns=columns)


def draw(table: pd.DataFrame, on: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: share needed on x, share called on y, a point per run and task; on the diagonal as many calls as needed."""
    with style.house_style():
        figure, axes = style.subplots(2.75 + 0.13 * -(-min(MOST, table["method"].nunique()) // 2))
        axes.plot([0, 100], [0, 100], color="#bbbbbb", ls="--", lw=0.8, zorder=1)
        axes.text(
            97, 93, "as often as needed", ha="right", va="top", fontsize=5.8, color="#777777", rotation=38, rotation_mode="anchor"
        )
        methods = list(table["method"].unique())
        families: set[str] = set()
        for method in methods[:MOST]:
            own = table[table["method"] == method]
            family = own["family"].iloc[0]
            axes.plot(
                100 * own["needed"],
                100 * own["called"],
                names.marker(family),
                color=names.colour(family),
                mfc="none" if family in families else names.colour(family),  # filled for the first run of a family only
                label=names.short(own["label"].iloc[0]),
            )
            families.add(family)
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("full resolution beats half size (% of documents)")
        axes.set_ylabel("method looks closer (% of documents)")
        style.title(figure, TITLE, on)
        handles, labels = axes.get_legend_handles_labels()
        style.legend(figure, handles, labels, 2, handletextpad=0.2)
        # Tasks are named at the first run's points, clear of the others'.
        first = table[table["method"] == methods[0]]
        others = [(100 * r.needed, 100 * r.called) for r in table[table["method"].isin(methods[1:MOST])].itertuples()]
        labelled = [
            (100 * r.needed, 100 * r.called, names.task(r.task).removeprefix("nano "), "#444444") for r in first.itertuples()
        ]
        style.place_labels(axes, labelled, others)
        cut = [f"{MOST} of {len(methods)} runs; all are in the CSV."] if len(methods) > MOST else []
        style.footnote(figure, [*notes, *cut, f"A point per task; tasks are named at {first['label'].iloc[0]}."])
    return figure
