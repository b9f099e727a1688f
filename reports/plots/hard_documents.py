"""Figure: accuracy on the documents that the half-size view gets wrong, where looking closer can help at all."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..data import names
from ..data.hard_documents import data
from . import style

TITLE = "Accuracy where the half-size view is wrong"
READING = "Only documents that half size gets wrong count here: further to the right, more of them are put right."
__all__ = ["READING", "TITLE", "data", "draw"]

MOST = 40


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
