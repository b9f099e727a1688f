"""Figure: accuracy against retained token ratio in a panel for each task."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..data import names, stats
from ..data.summary import summary
from . import scatter, style

TITLE = "Accuracy and visual tokens, task by task"
READING = "As the figure of the means, for each task alone; every panel has the range of accuracies of its own front."

MOST = 27
"""Families in the key."""


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> task, method, label, family, rtr, accuracy, low, high (fractions), front within the task; empty for a single task."""
    tasks = [str(t) for t in frame["task"].unique()]
    columns = ["task", "method", "label", "family", "rtr", "accuracy", "low", "high", "front"]
    if len(tasks) < 2:
        return pd.DataFrame(columns=columns)
    summaries, spans = summary(frame), stats.intervals(frame).set_index(["method", "task"])
    methods = frame.drop_duplicates("method")
    parts = []
    for task in tasks:
        rows = []
        for m in methods.itertuples():
            cell = summaries[m.method].get(task)
            if cell is None or cell["rtr"] is None:
                continue
            low, high = spans.loc[(m.method, task), ["low", "high"]]
            row = {"task": task, "method": m.method, "label": m.label, "family": m.family, "cost": cell["rtr"]}
            rows.append(row | {"accuracy": cell["accuracy"], "low": low, "high": high})
        if rows:
            parts.append(scatter.with_front(pd.DataFrame(rows)))
    return (
        pd.concat(parts, ignore_index=True).rename(columns={"cost": "rtr"})[columns] if parts else pd.DataFrame(columns=columns)
    )


def draw(table: pd.DataFrame, on: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: two panels in a row, retained token ratio on x, accuracy in percent on y."""
    tasks = list(table["task"].unique())
    families = list(dict.fromkeys(table["family"].astype(str)))
    rows = -(-len(tasks) // 2)
    with style.house_style():
        keys = -(-min(len(families), MOST) // 3)
        figure, grid = style.subplots(0.75 + 1.25 * rows + 0.115 * keys, rows, 2, sharex=True, squeeze=False)
        points = table.rename(columns={"rtr": "cost"})
        crowd, beneath = table["method"].nunique() > 12, False
        for axes, task in zip(grid.flat, tasks, strict=False):
            own = points[points["task"] == task].reset_index(drop=True)
            beneath |= bool(scatter.panel(axes, own, *scatter.y_range(own), crowd, size=3.6))
            axes.set_title(names.task(str(task)), fontweight="normal", pad=2)
        for axes in grid.flat[len(tasks) :]:
            axes.set_axis_off()
        grid[0][0].set_xlim(*scatter.x_range(points["cost"]))
        for axes in grid[-1]:
            axes.set_xlabel("retained token ratio")
        grid[rows // 2][0].set_ylabel("accuracy (%)")
        style.title(figure, TITLE, on)
        handles = [Line2D([], [], ls="", marker=names.marker(f), color=names.colour(f), ms=3.6) for f in families[:MOST]]
        texts = [names.short(names.label(f), 22) for f in families[:MOST]]
        style.legend(figure, handles, texts, 3, fontsize=5.6, handletextpad=0.2)
        more = [f"Key: {MOST} of {len(families)} methods; all are in the CSV."] if len(families) > MOST else []
        edge = ["Runs at the lower edge of a panel lie below it."] if beneath else []
        style.footnote(figure, [*notes, *more, "Dashed: Pareto front of the task.", *edge])
    return figure
