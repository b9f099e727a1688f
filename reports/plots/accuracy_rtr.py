"""Figure: accuracy against retained token ratio, the mean over tasks of each run; published points in a panel below."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ..data.summary import summary
from . import scatter

TITLE = "Accuracy against the share of visual tokens"
READING = (
    "Up and to the left is better: more accurate with fewer visual tokens; no run beats one on the dashed line in both. "
    "Full resolution is at 1."
)


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> what is plotted: method, label, family, rtr, accuracy, low and high of its 95 % interval (fractions), front."""
    costs = {m: cells["mean"]["rtr"] for m, cells in summary(frame).items()}
    return scatter.points(frame, costs).rename(columns={"cost": "rtr"})


def published(cells: pd.DataFrame) -> pd.DataFrame:
    """Published cells (see ``data.published.cells``) -> the hollow points: label, family, rtr, accuracy (a fraction), source."""
    means = cells[cells["task"] == "mean"]
    wide = means.pivot_table(index=["run", "method"], columns="quantity", values="value").reset_index()
    if not {"accuracy", "rtr"} <= set(wide.columns):
        return pd.DataFrame(columns=["label", "family", "rtr", "accuracy", "source"])
    both = wide.dropna(subset=["accuracy", "rtr"])
    source = both["run"].map(means.drop_duplicates("run").set_index("run")["source"])
    columns = {"label": both["run"], "family": both["method"], "rtr": both["rtr"], "accuracy": both["accuracy"] / 100}
    return pd.DataFrame(columns | {"source": source})


def draw(points: pd.DataFrame, on: str, paper: pd.DataFrame | None = None, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: retained token ratio on x, accuracy in percent on y. on: what it was measured on. paper: ``published``."""
    x = "retained token ratio (all turns, share of full resolution)"
    hollow = None if paper is None else paper.rename(columns={"rtr": "cost"})
    return scatter.draw_points(points.rename(columns={"rtr": "cost"}), TITLE, on, x, hollow, notes)
