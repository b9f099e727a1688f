"""Accuracy against a cost: a point per run with its interval, settings of one method joined, the Pareto front, published points in a panel below.

The range of accuracies is that of the front and of the named few; runs far below it stand at the lower edge with their number.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..data import names, stats
from ..data.summary import summary
from . import style

FIRST = ("awares", "full", "low")
"""Families that are always labelled: the subject and its two ends."""

CROWD = 60
"""Runs above which settings are not joined and intervals not drawn."""

BLIND = ("no_picture",)
"""Controls that are no way to spend tokens: they never see a picture, so they are on no front, which would begin at their guesses."""

COLUMNS = ["method", "label", "family", "cost", "accuracy", "low", "high"]


def points(frame: pd.DataFrame, cost: dict[str, float | None]) -> pd.DataFrame:
    """Documents and each method's cost -> method, label, family, cost, accuracy, low, high (fractions), front; unknown costs left out.

    front: no other run that sees the picture is at least as accurate at no more cost, and better in one of them.
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
    return with_front(pd.DataFrame(rows, columns=COLUMNS))


def with_front(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with family, cost and accuracy -> the same with ``front``; the ``BLIND`` are not on it and beat nobody."""
    seeing = ~table["family"].isin(BLIND)
    beaten = []
    for r in table.itertuples():
        no_worse = seeing & (table["cost"] <= r.cost) & (table["accuracy"] >= r.accuracy)
        beaten.append((no_worse & ((table["cost"] < r.cost) | (table["accuracy"] > r.accuracy))).any())
    return table.assign(front=[bool(sees) and not b for b, sees in zip(beaten, seeing, strict=True)])


def draw_points(
    data: pd.DataFrame, title: str, on: str, xlabel: str, paper: pd.DataFrame | None = None, notes: tuple[str, ...] = ()
) -> Figure:
    """Plot ``points``: cost on x, accuracy in percent on y. on: what was measured. paper: rows (label, family, cost, accuracy as a
    fraction, source) for a panel of their own, drawn hollow.
    """
    paper = paper if paper is not None and len(paper) else None
    with style.house_style():
        crowd = len(data) > CROWD
        if paper is not None:
            figure, (axes, below) = style.subplots(5.2, 2, 1, height_ratios=[5, 3], sharex=True)
        else:
            figure, axes = style.subplots(4.7 if crowd else 3.7)  # the key of a crowd takes a third
            below = axes
        bottom, top = y_range(data)
        style.title(figure, title, f"{on}; {len(data)} runs, all in the CSV" if crowd else on)
        outliers = panel(axes, data, bottom, top, crowd)
        both = pd.concat([data["cost"], paper["cost"]]) if paper is not None else data["cost"]
        axes.set_xlim(*x_range(both))
        numbers = _number_outliers(axes, data[data["method"].isin(outliers)])
        below.set_xlabel(xlabel)
        axes.set_ylabel("mean accuracy (%)")
        bars = "" if crowd else "Bars: 95 % bootstrap interval over documents. "
        beneath = "Runs at the lower edge lie below it, at the number beside them. " if len(outliers) else ""
        sources = list(dict.fromkeys(paper["source"])) if paper is not None and "source" in paper else []
        below_words = [f"As published: {'; '.join(sources)}."] if sources else []
        style.footnote(figure, [*notes, f"{bars}Dashed: Pareto front. {beneath}".strip(), *below_words])
        if paper is not None:
            _published(below, paper)
        # The front and the named few are labelled where they are; the key has the rest.
        wanted, obstacles = _labels(data[~data["method"].isin(outliers)], crowd)
        obstacles += numbers
        told: set[str] = set()
        while True:
            # every family without a label is in the key, which makes the axes smaller, so the labels are placed after it
            _key(figure, data, {w[4] for w in wanted} - told)
            unplaced = style.place_labels(axes, [w[:4] for w in wanted if w[4] not in told], obstacles)
            lost = {w[4] for w in wanted if w[2] in unplaced}
            if not lost:
                break
            told |= lost
            for artist in (*[t for t in axes.texts if t.get_gid() != "edge"], *figure.legends):
                artist.remove()
    return figure


def y_range(data: pd.DataFrame) -> tuple[float, float]:
    """The lowest and the highest accuracy in percent that the axis holds: of the front and of the first run of the named few."""
    first = data[data["family"].astype(str).isin(FIRST)].drop_duplicates("family")
    shown = 100 * pd.concat([data.loc[data["front"], "accuracy"], first["accuracy"]])
    if shown.empty:
        return 0.0, 103.0
    bottom, top = shown.min(), min(100.0, 100 * max(data["high"].max(), data["accuracy"].max()))
    room = max(3.0, 0.12 * (top - bottom))
    return max(0.0, bottom - room) - (1.5 if bottom - room <= 0 else 0), top + 0.09 * (top - bottom + room) + 0.3


def x_range(cost: pd.Series) -> tuple[float, float]:
    """Where the axis of costs begins and ends: at 0 where the cheapest run is near it."""
    if cost.empty:
        return 0.0, 1.0
    low, high = cost.min(), cost.max()
    room = 0.06 * (high - low) or 0.1 * high or 1.0
    return (0.0 if low < 0.3 * (high - low) and low < 0.15 else max(0.0, low - room)), high + room


def panel(axes: Axes, data: pd.DataFrame, bottom: float, top: float, crowd: bool = False, size: float = 4.8) -> list[str]:
    """Draw the runs into axes from ``bottom`` to ``top`` percent -> the methods that lie below, which stand at the edge."""
    front = data[data["front"]].sort_values("cost")
    axes.plot(front["cost"], 100 * front["accuracy"], color="#aaaaaa", lw=0.9, ls="--", zorder=1)
    below = 100 * data["accuracy"] < bottom
    for family, everything in data.groupby("family", sort=False, observed=True):
        colour, everything = names.colour(family), everything.sort_values("cost")
        series = everything[_settings(everything)]
        if len(series) > 1 and not crowd:
            axes.plot(series["cost"], 100 * series["accuracy"], color=colour, lw=0.7, alpha=0.5, zorder=2)
        own = everything[~below[everything.index]]
        if own.empty:
            continue
        spread = [100 * (own["accuracy"] - own["low"]), 100 * (own["high"] - own["accuracy"])]
        drawn = axes.errorbar(
            own["cost"], 100 * own["accuracy"], yerr=None if crowd else spread, fmt=names.marker(family), color=colour,
            markersize=3 if crowd else size, elinewidth=0.7, markeredgecolor="white", markeredgewidth=0.3, zorder=3, label=family,
        )  # fmt: skip
        drawn.lines[0].set_clip_on(False)  # a mark at the edge is drawn whole
    outliers = data[below].sort_values("cost")
    for r in outliers.itertuples():
        look: dict[str, Any] = {"color": names.colour(r.family), "ms": 0.8 * size, "mec": "white", "mew": 0.3}
        axes.plot(r.cost, bottom, names.marker(r.family), clip_on=False, zorder=4, **look)
    axes.set_ylim(bottom, top)
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(bottom, top)
    axes.set_yticks([t for t in ticks if bottom <= t <= min(top, 100.0)])
    return list(outliers["method"])


def _number_outliers(axes: Axes, outliers: pd.DataFrame) -> list[tuple[float, float]]:
    """The accuracy of each run at the lower edge above its mark, one over the other where they are close -> where they stand."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # so that the height of a row of words is known
    point = (top - bottom) / (72 * axes.get_window_extent().height / axes.figure.dpi)
    places = []
    near, taken = 0.07 * (right - left), [float("-inf")] * 6  # where the last number of each row stands
    for r in outliers.sort_values("cost").itertuples():
        row = next((i for i, x in enumerate(taken) if r.cost - x >= near), len(taken) - 1)
        taken[row] = r.cost
        number = axes.annotate(
            f"↓{100 * r.accuracy:.0f}", (r.cost, bottom), (0, 4 + 6 * row), textcoords="offset points", ha="center",
            va="bottom", fontsize=5, color=names.colour(r.family),
        )  # fmt: skip
        number.set_gid("edge")
        places.append((r.cost, bottom + (7 + 6 * row) * point))
    return places


def _published(axes: Axes, paper: pd.DataFrame) -> None:
    """The published points in a panel of their own, hollow, labelled."""
    for p in paper.itertuples():
        colour = names.colour(p.family)
        axes.plot(
            p.cost, 100 * p.accuracy, names.marker(p.family), mfc="none", mec=colour, mew=0.9, ms=4.8, zorder=3, clip_on=False
        )
    values = 100 * paper["accuracy"]
    room = max(1.0, 0.15 * (values.max() - values.min()))
    axes.set_ylim(values.min() - room, values.max() + room)
    axes.set_ylabel("published (%)")
    axes.set_title("as published", fontweight="normal", fontsize=6.5, pad=2)
    wanted = []
    for family, own in paper.groupby("family", sort=False, observed=True):
        p = own.sort_values("cost").iloc[-1]
        wanted.append((p["cost"], 100 * p["accuracy"], names.label(str(family)), names.colour(str(family))))
    style.place_labels(axes, wanted, [(p.cost, 100 * p.accuracy) for p in paper.itertuples()])


def _settings(own: pd.DataFrame) -> pd.Series:
    """Which runs of a method are settings of it, such as shares of tokens kept: those named by a percentage."""
    return own["label"].astype(str).str.endswith(" %")


def _labels(data: pd.DataFrame, crowd: bool) -> tuple[list, list]:
    """(x, y, text, colour, family) for each family that is on the front or among the named few, and the marks to keep clear."""
    few = len(data) <= 6
    wanted, obstacles = [], []
    for family, own in data.groupby("family", sort=False, observed=True):
        named = str(family) in FIRST
        chosen = own[own["front"]] if own["front"].any() else own.head(1 if named or few else 0)
        best = chosen.sort_values("cost").head(1)
        for r in best.itertuples():
            text = names.label(str(family)) if len(own) > 1 else str(r.label)
            wanted.append((r.cost, 100 * r.accuracy, names.short(text), names.colour(str(family)), str(family), named, r.front))
        obstacles += [(r.cost, 100 * r.accuracy) for r in own.itertuples() if r.method not in set(best["method"])]
        obstacles += [] if crowd else [(r.cost, 100 * y) for r in own.itertuples() for y in (r.low, r.high)]
    wanted.sort(key=lambda w: (w[5], w[6]), reverse=True)
    return [w[:5] for w in wanted], obstacles


def _key(figure: Figure, data: pd.DataFrame, labelled: set[str], most: int = 24) -> None:
    """Marks of the families that have no label in the axes, below them; a family of one run by the run's own name."""
    rest = data[~data["family"].astype(str).isin(labelled)]
    handles, texts = [], []
    for family, own in rest.groupby("family", sort=False, observed=True):
        handles.append(Line2D([], [], ls="", marker=names.marker(str(family)), color=names.colour(str(family)), ms=4))
        texts.append(names.short(own["label"].iloc[0] if len(own) == 1 else names.label(str(family)), 30))
    if len(texts) > most:
        handles, texts = handles[:most], [*texts[: most - 1], f"and {len(texts) - most + 1} more"]
    if texts:
        columns = 3 if max(map(len, texts)) <= 19 else 2
        style.legend(figure, handles, texts, columns, fontsize=5.8, handletextpad=0.2)
