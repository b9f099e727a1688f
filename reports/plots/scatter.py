"""Accuracy against a cost: a point per run with its interval, settings of one method joined, the Pareto front, the paper's points hollow."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..data import names, stats
from ..data.summary import summary
from . import style

FIRST = ("awares", "full", "low")
"""Families whose labels find a place before the others': the subject and its two ends."""


def points(frame: pd.DataFrame, cost: dict[str, float | None]) -> pd.DataFrame:
    """Documents and each method's cost -> method, label, family, cost, accuracy, low, high (fractions), front; unknown costs left out.

    front: no other run is at least as accurate at no more cost, and better in one of them.
    """
    summaries = summary(frame)
    means = stats.intervals(frame).query("task == 'mean'").set_index("method")
    rows = []
    for m in frame.drop_duplicates("method").itertuples():
        accuracy = summaries[m.method]["mean"]["accuracy"]
        if cost.get(m.method) is None or accuracy is None:
            continue
        low, high = means.loc[m.method, ["low", "high"]]
        row = {"method": m.method, "label": m.label, "family": m.family, "cost": cost[m.method]}
        rows.append(row | {"accuracy": accuracy, "low": low, "high": high})
    out = pd.DataFrame(rows, columns=["method", "label", "family", "cost", "accuracy", "low", "high"])
    beaten = []
    for r in out.itertuples():
        no_worse = (out["cost"] <= r.cost) & (out["accuracy"] >= r.accuracy)
        beaten.append((no_worse & ((out["cost"] < r.cost) | (out["accuracy"] > r.accuracy))).any())
    return out.assign(front=[not b for b in beaten])


def draw_points(
    data: pd.DataFrame, title: str, xlabel: str, paper: pd.DataFrame | None = None, notes: tuple[str, ...] = ()
) -> Figure:
    """Plot ``points``: cost on x, accuracy in percent on y. paper: rows (label, family, cost, accuracy as a fraction), drawn hollow."""
    with style.house_style():
        figure, axes = style.subplots(3.4)
        front = data[data["front"]].sort_values("cost")
        axes.plot(front["cost"], 100 * front["accuracy"], color="#bbbbbb", lw=0.9, ls="--", zorder=1)
        crowd = len(data) > 60
        for family, own in data.groupby("family", sort=False, observed=True):
            own = own.sort_values("cost")
            colour = names.colour(family)
            series = own[_settings(own)]
            if len(series) > 1 and not crowd:
                axes.plot(series["cost"], 100 * series["accuracy"], color=colour, lw=0.7, alpha=0.6, zorder=2)
            spread = [100 * (own["accuracy"] - own["low"]), 100 * (own["high"] - own["accuracy"])]
            axes.errorbar(
                own["cost"], 100 * own["accuracy"], yerr=None if crowd else spread, fmt=names.marker(family), color=colour,
                markersize=3 if crowd else 4.8, elinewidth=0.7, markeredgecolor="white", markeredgewidth=0.3, zorder=3, label=family,
            )  # fmt: skip
        for p in () if paper is None else paper.itertuples():
            colour = names.colour(p.family)
            axes.plot(p.cost, 100 * p.accuracy, names.marker(p.family), mfc="none", mec=colour, mew=0.9, ms=4.8, zorder=3)
        everything = pd.concat([data["cost"], *([] if paper is None else [paper["cost"]])])
        axes.set_xlim(0, 1.06 * everything.max() if len(everything) else 1)
        axes.margins(y=0.12)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("accuracy, mean over tasks (%)")
        published = ["Hollow: as published."] if paper is not None and len(paper) else []
        bars = "" if crowd else "Bars: 95 % bootstrap interval over documents. "
        style.footnote(figure, [*notes, *published, f"{bars}Dashed: Pareto front."])
        style.title(figure, f"{title}; {len(data)} runs, all in the CSV" if crowd else title)
        wanted, obstacles = _labels(data, crowd)
        in_legend: list[str] = []
        while unplaced := style.place_labels(axes, [w for w in wanted if w[2] not in in_legend], obstacles):
            in_legend += unplaced  # a legend makes the axes smaller, so the others are placed again
            for artist in (*axes.texts, *figure.legends):
                artist.remove()
            _legend(figure, data, in_legend)
    return figure


def _settings(own: pd.DataFrame) -> pd.Series:
    """Which runs of a method are settings of it, such as shares of tokens kept: those named by a percentage."""
    return own["label"].astype(str).str.endswith(" %")


def _labels(data: pd.DataFrame, crowd: bool) -> tuple[list, list]:
    """A label for each run, and one for all settings of a method at the costliest; in a crowd for the front and the fixed points only."""
    wanted, obstacles = [], []
    subject = data["family"].astype(str).isin(FIRST)
    ordered = data.assign(subject=subject).sort_values(["subject", "front", "accuracy"], ascending=False)
    for family, own in ordered.groupby("family", sort=False, observed=True):
        if crowd and not own["front"].any() and family not in FIRST:
            continue
        series = _settings(own)
        named = [(r.cost, r.accuracy, str(r.label)) for r in own[~series].itertuples()]
        settings = list(own[series].sort_values("cost", ascending=False).itertuples())
        if settings:
            text = names.label(str(family)) if len(settings) > 1 else str(settings[0].label)
            named.append((settings[0].cost, settings[0].accuracy, text))
        wanted += [(x, 100 * y, names.short(text), names.colour(str(family))) for x, y, text in named]
        obstacles += [(r.cost, 100 * r.accuracy) for r in settings[1:]]
        obstacles += [] if crowd else [(r.cost, 100 * y) for r in own.itertuples() for y in (r.low, r.high)]
    return wanted, obstacles


def _legend(figure: Figure, data: pd.DataFrame, unplaced: list[str], most: int = 12) -> None:
    """A legend below the axes for the labels that found no room."""
    mark = {
        names.short(t): str(f)
        for r in data.itertuples()
        for t, f in ((r.label, r.family), (names.label(str(r.family)), r.family))
    }
    texts = unplaced[:most]
    handles = [Line2D([], [], ls="", marker=names.marker(mark[t]), color=names.colour(mark[t]), ms=4) for t in texts]
    if len(unplaced) > most:
        texts[-1] = f"and {len(unplaced) - most + 1} more"
    style.legend(figure, handles, texts, 2, fontsize=5.8, handletextpad=0.2)
