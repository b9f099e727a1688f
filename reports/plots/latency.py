"""Figure: seconds of a document, split by phase and by turn."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..data import names
from . import style

COLOURS = {"preprocess": "#949494", "encode": "#de8f05", "prefill": "#0173b2", "decode": "#029e73"}
OTHER = ("#cc78bc", "#d55e00", "#56b4e9", "#ca9161")
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


def draw(table: pd.DataFrame, title: str, machine: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: a bar per method, later turns hatched. machine: what it ran on, for the footnote."""
    methods = list(table["method"].unique())
    drawn = methods[:MOST]
    cut = [f"{MOST} of {len(methods)} runs; all are in the CSV."] if len(methods) > MOST else []
    phases = list(table["phase"].unique())
    spare = iter(OTHER * len(phases))
    colours = {p: COLOURS.get(p) or next(spare) for p in phases}
    with style.house_style():
        figure, axes = style.subplots(0.9 + 0.19 * len(drawn))
        for y, method in enumerate(drawn):
            left = 0.0
            for part in table[table["method"] == method].sort_values("turn", kind="stable").itertuples():
                hatch = {"hatch": "/////", "alpha": 0.75} if part.turn == "later" else {}
                axes.barh(
                    y,
                    1000 * part.seconds,
                    left=left,
                    height=0.7,
                    color=colours[part.phase],
                    edgecolor="white",
                    linewidth=0.3,
                    **hatch,
                )
                left += 1000 * part.seconds
            axes.text(left, y, f" {left:.3g}", va="center", fontsize=6)
        axes.set_yticks(range(len(drawn)), [names.short(table.loc[table["method"] == m, "label"].iloc[0]) for m in drawn])
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.set_xlabel("milliseconds a document", loc="right")
        style.title(figure, title)
        handles = [Patch(color=c) for c in colours.values()] + [Patch(fc="#dddddd", ec="white", hatch="/////")]
        style.legend(figure, handles, [*colours, "later turns"], 3, handlelength=1.2)
        style.footnote(figure, [*notes, f"Times: {machine}.", *cut])
    return figure
