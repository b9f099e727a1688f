"""Figure: accuracy against retained token ratio, a point per method, mean over tasks with a bootstrap interval."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .tables import mean_interval, summary

STYLE = Path(__file__).with_name("awares.mplstyle")
MARKERS = {"awares": "D", "awares_full": "s", "awares_low": "v"}
COLOURS = dict(zip(MARKERS, sns.color_palette("colorblind", 3).as_hex(), strict=True))
NAMES = {"awares": "AwaRes", "awares_full": "full resolution", "awares_low": "half size"}


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> what is plotted: method, rtr, accuracy, low and high of its 95 % interval (fractions)."""
    rows = []
    for method, cells in summary(frame).items():
        low, high = mean_interval(frame[frame["method"] == method])
        rows.append(
            {"method": method, "rtr": cells["mean"]["rtr"], "accuracy": cells["mean"]["accuracy"], "low": low, "high": high}
        )
    return pd.DataFrame(rows)


def draw(points: pd.DataFrame, title: str) -> Figure:
    """Plot ``data``: retained token ratio on x, accuracy in percent on y."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        others = iter(sns.color_palette("colorblind", 10).as_hex()[3:] * 10)
        for p in points.dropna(subset=["rtr"]).itertuples():
            colour = COLOURS.get(p.method) or next(others)
            errors = [[100 * (p.accuracy - p.low)], [100 * (p.high - p.accuracy)]]
            axes.errorbar(
                p.rtr,
                100 * p.accuracy,
                yerr=errors,
                fmt=MARKERS.get(p.method, "o"),
                color=colour,
                markersize=7,
                capsize=3,
                elinewidth=1,
            )
            right = p.rtr > 0.8
            axes.annotate(
                NAMES.get(p.method, p.method),
                (p.rtr, 100 * p.accuracy),
                xytext=(-8 if right else 8, -11),
                textcoords="offset points",
                ha="right" if right else "left",
                color=colour,
            )
        axes.set_xlim(0, max(1.1, points["rtr"].max() * 1.08))
        axes.set_xlabel("retained token ratio (all turns, share of full resolution)")
        axes.set_ylabel("accuracy, mean over tasks (%)")
        axes.set_title(title)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the house style: resolution and embedded fonts are settings of the moment it is written."""
    with plt.style.context(STYLE):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
