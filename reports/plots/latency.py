"""Figure: milliseconds of a document: the vision tower, prefill and decoding side by side, each split by turn."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..data import names
from . import style

TITLE = "Milliseconds of a document, phase by phase"
READING = (
    "A panel for each phase on one scale, the darker end of a bar is spent after the first turn; the number on the right is the sum of "
    "all phases. Fewer visual tokens shorten prefill, fewer or smaller pictures also the vision tower."
)

COLOURS = {"preprocess": "#7d7d7d", "encode": "#de8f05", "prefill": "#0173b2", "decode": "#029e73"}
OTHER = ("#cc78bc", "#d55e00", "#56b4e9", "#ca9161")
WORDS = {"preprocess": "prepare", "encode": "tower", "aux": "other model"}
MOST = 40
"""Rows that a column's height holds; the CSV has them all."""


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> method, label, phase, turn ("first" or "later"), seconds (mean over documents); runs without times are left out."""
    phases = [c for c in frame.columns if c.endswith("_seconds") and not c.startswith("later_")]
    phases = [c for c in phases if not c.startswith("aux") or frame[c].any()]
    rows = []
    for method, own in frame.groupby("method", sort=False, observed=True):
        if own["seconds"].isna().any():
            continue
        for phase in phases:
            total, later = own[phase].mean(), own[f"later_{phase}"].mean()
            if total == total:
                same = {
                    "method": method,
                    "label": own["label"].iloc[0],
                    "phase": phase.removesuffix("_seconds").replace("_", " "),
                }
                rows += [same | {"turn": "first", "seconds": total - later}, same | {"turn": "later", "seconds": later}]
    return pd.DataFrame(rows, columns=["method", "label", "phase", "turn", "seconds"])


def draw(table: pd.DataFrame, on: str, machine: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: a panel per phase, a bar per method, later turns darker. machine: what it ran on, for the footnote."""
    methods = list(table["method"].unique())
    drawn = methods[:MOST]
    cut = [f"{MOST} of {len(methods)} runs; all are in the CSV."] if len(methods) > MOST else []
    phases = list(table["phase"].unique())
    spare = iter(OTHER * len(phases))
    milliseconds = 1000 * table.pivot_table(index="method", columns=["phase", "turn"], values="seconds", observed=True)
    with style.house_style():
        figure, grid = style.subplots(0.85 + 0.145 * len(drawn), 1, len(phases), sharex=True, sharey=True, squeeze=False)
        for axes, phase in zip(grid[0], phases, strict=True):
            colour = COLOURS.get(phase) or next(spare)
            for y, method in enumerate(drawn):
                left = 0.0
                for turn, alpha in (("first", 0.55), ("later", 1.0)):
                    part = milliseconds.loc[method].get((phase, turn), float("nan"))
                    if part == part:
                        axes.barh(y, part, left=left, height=0.72, color=colour, alpha=alpha)
                        left += part
            axes.set_title(WORDS.get(phase, phase), fontweight="normal", fontsize=6.5, pad=2, color=colour)
            axes.grid(axis="y", visible=False)
            axes.locator_params(axis="x", nbins=2)
            axes.tick_params(axis="y", length=0)
        first, last = grid[0][0], grid[0][-1]
        labels = [names.short(table.loc[table["method"] == m, "label"].iloc[0]) for m in drawn]
        first.set_yticks(range(len(drawn)), labels, fontsize=6)
        first.set_ylim(len(drawn) - 0.5, -0.5)
        for y, method in enumerate(drawn):  # the sum of all phases
            last.annotate(
                f"{milliseconds.loc[method].sum():.3g}", (1.02, y), xycoords=("axes fraction", "data"), fontsize=5.8, va="center"
            )
        last.annotate("all", (1.02, 1), (0, 2), xycoords="axes fraction", textcoords="offset points", fontsize=6.5, va="bottom")
        style.title(figure, TITLE, on)
        style.legend(
            figure,
            [Patch(color="#777777", alpha=0.55), Patch(color="#777777")],
            ["first turn", "later turns"],
            2,
            handlelength=1.2,
        )
        style.footnote(figure, [*notes, f"Times: {machine}.", *cut])
    return figure
