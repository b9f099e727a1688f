"""Figure: how the retained token ratio is distributed over the documents of each task, for methods that adapt it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..data import names
from . import style

TITLE = "How many tokens a document takes"
READING = "A step is a share of documents that take so many tokens: a line that rises early is cheap, one step means every document costs the same."

MOST = 8
"""Lines that stay apart in a small panel."""

LINES = ("-", "--", ":", "-.")
"""Runs of one method share a colour, so lines tell them apart."""


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> method, label, family, task, rtr, share of documents at or below it; runs of one ratio throughout are left out."""
    rows = []
    known = frame.dropna(subset=["rtr"])
    for method, own in known.groupby("method", sort=False, observed=True):
        if own["rtr"].round(2).nunique() < 2:
            continue
        for task, documents in own.groupby("task", sort=False, observed=True):
            values, counts = np.unique(documents["rtr"].round(4), return_counts=True)
            same = {"method": method, "label": own["label"].iloc[0], "family": own["family"].iloc[0], "task": task}
            rows += [same | {"rtr": v, "share": s} for v, s in zip(values, counts.cumsum() / counts.sum(), strict=True)]
    return pd.DataFrame(rows, columns=["method", "label", "family", "task", "rtr", "share"])


def draw(table: pd.DataFrame, on: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: a panel per task, a cumulative line per method."""
    methods, tasks = list(table["method"].unique()), list(table["task"].unique())
    cut = [f"{MOST} of {len(methods)} runs; all are in the CSV."] if len(methods) > MOST else []
    methods = methods[:MOST]
    right = 1.05 * max(1.0, table["rtr"].max())
    rows = -(-len(tasks) // 2)
    with style.house_style():
        figure, grid = style.subplots(
            0.6 + 0.95 * rows + 0.13 * -(-len(methods) // 2), rows, 2, sharex=True, sharey=True, squeeze=False
        )
        for axes, task in zip(grid.flat, tasks, strict=False):
            for i, method in enumerate(methods):
                own = table[(table["method"] == method) & (table["task"] == task)].sort_values("rtr")
                x, y = [0, *own["rtr"], right], [0, *(100 * own["share"]), 100]
                colour = names.colour(own["family"].iloc[0]) if len(own) else None
                axes.step(x, y, where="post", color=colour, ls=LINES[i % len(LINES)], lw=1)
            axes.set_title(names.task(str(task)), fontweight="normal", pad=2)
            axes.set_xlim(0, right)
            axes.set_ylim(0, 103)
        for axes in grid.flat[len(tasks) :]:
            axes.set_axis_off()
        for axes in grid[-1]:
            axes.set_xlabel("retained token ratio")
        grid[rows // 2][0].set_ylabel("documents at or below (%)")
        style.title(figure, TITLE, on)
        firsts = {m: table[table["method"] == m].iloc[0] for m in methods}
        lines = [
            grid.flat[0].plot([], [], color=names.colour(r["family"]), ls=LINES[i % len(LINES)])[0]
            for i, r in enumerate(firsts.values())
        ]
        style.legend(figure, lines, [names.short(r["label"]) for r in firsts.values()], 2, handlelength=1.8)
        style.footnote(figure, [*notes, *cut])
    return figure
