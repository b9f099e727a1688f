"""Figure: accuracy against wall-clock, the mean seconds of a document in each run."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from . import scatter

TITLE = "Accuracy against time"
READING = "Up and to the left is better: more accurate in less time; no run beats one on the dashed line in both."


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> what is plotted: method, label, family, seconds (mean over tasks), accuracy, low, high (fractions), front."""
    per_task = frame.groupby(["method", "task"], sort=False, observed=True)["seconds"].agg(lambda s: s.mean(skipna=False))
    costs = {
        str(m): (None if s.isna().any() else float(s.mean())) for m, s in per_task.groupby(level=0, sort=False, observed=True)
    }
    return scatter.points(frame, costs).rename(columns={"cost": "seconds"})


def draw(points: pd.DataFrame, on: str, machine: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: milliseconds of a document on x, accuracy in percent on y. machine: what it ran on, for the footnote."""
    scaled = points.assign(cost=1000 * points["seconds"])
    return scatter.draw_points(scaled, TITLE, on, "milliseconds a document", None, (*notes, f"Times: {machine}."))
