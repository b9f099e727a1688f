"""Figure: accuracy against retained token ratio, the mean over tasks of each run."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ..data.summary import summary
from . import scatter


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> what is plotted: method, label, family, rtr, accuracy, low and high of its 95 % interval (fractions), front."""
    costs = {m: cells["mean"]["rtr"] for m, cells in summary(frame).items()}
    return scatter.points(frame, costs).rename(columns={"cost": "rtr"})


def published(cells: pd.DataFrame) -> pd.DataFrame:
    """Published cells (see ``data.published.cells``) -> the hollow points: label, family, rtr, accuracy (a fraction)."""
    wide = cells[cells["task"] == "mean"].pivot_table(index=["run", "method"], columns="quantity", values="value").reset_index()
    if not {"accuracy", "rtr"} <= set(wide.columns):
        return pd.DataFrame(columns=["label", "family", "rtr", "accuracy"])
    both = wide.dropna(subset=["accuracy", "rtr"])
    return pd.DataFrame({"label": both["run"], "family": both["method"], "rtr": both["rtr"], "accuracy": both["accuracy"] / 100})


def draw(points: pd.DataFrame, title: str, paper: pd.DataFrame | None = None, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: retained token ratio on x, accuracy in percent on y."""
    x = "retained token ratio (all turns, share of full resolution)"
    hollow = None if paper is None else paper.rename(columns={"rtr": "cost"})
    return scatter.draw_points(points.rename(columns={"rtr": "cost"}), title, x, hollow, notes)
