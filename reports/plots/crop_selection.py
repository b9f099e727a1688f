"""Figure: what is looked at: the share of each crop, run by run, such as oracle, SFT and GRPO (the paper's Figure 5)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from awares_bench.methods.crop_grid import PAPER_GRID

from ..data import names
from . import style

TITLE = "Which crops are asked for"
READING = "A bar is all documents of a run: grey were answered from the half-size view, colours are the crop that was asked for."

COLOURS = dict(
    zip(
        ["direct", *PAPER_GRID.names, "several", "all", "malformed"],
        [
            "#d9d9d9",
            "#c6dbef",
            "#9ecae1",
            "#6baed6",
            "#3182bd",
            "#de8f05",
            "#c7e9c0",
            "#a1d99b",
            "#74c476",
            "#31a354",
            "#9e7bb5",
            "#444444",
            "#d62728",
        ],
        strict=True,
    )
)
"""No crop grey, quadrants blue, centre orange, halves green, two or more crops violet, the whole image dark."""
MOST = 30


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> method, label, crop ("direct" for none, "several" for two or more), share of the documents; runs that never call are left out."""
    rows = []
    for method, own in frame.groupby("method", sort=False, observed=True):
        if not own["called"].any():
            continue
        kind = own["crops"].astype(str).mask(own["crops"].astype(str).str.contains(","), "several").replace("", "direct")
        kind = kind.mask(own["malformed"], "malformed")
        shares = kind.where(kind.isin(list(COLOURS)), "several").value_counts(normalize=True)
        rows += [{"method": method, "label": own["label"].iloc[0], "crop": c, "share": shares.get(c, 0.0)} for c in COLOURS]
    return pd.DataFrame(rows, columns=["method", "label", "crop", "share"])


def draw(table: pd.DataFrame, on: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: a stacked bar per run; shares of 7 % and more are written in."""
    runs = list(table["method"].unique())
    methods = runs[:MOST]
    cut = [f"{MOST} of {len(runs)} runs; all are in the CSV."] if len(runs) > MOST else []
    with style.house_style():
        figure, axes = style.subplots(1.25 + 0.24 * len(methods))
        for y, method in enumerate(methods):
            left = 0.0
            for part in table[table["method"] == method].itertuples():
                axes.barh(y, 100 * part.share, left=left, height=0.75, color=COLOURS[part.crop], edgecolor="white", linewidth=0.4)
                if part.share >= 0.07:
                    dark = part.crop in ("all", "malformed", "bottom-right", "right", "several")
                    axes.text(
                        left + 50 * part.share,
                        y,
                        f"{100 * part.share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=5.8,
                        color="white" if dark else "black",
                    )
                left += 100 * part.share
        axes.set_yticks(range(len(methods)), [names.short(table.loc[table["method"] == m, "label"].iloc[0]) for m in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of documents (%)")
        style.title(figure, TITLE, on)
        seen = [c for c in COLOURS if table.loc[table["crop"] == c, "share"].any()]
        words = {"direct": "no crop", "all": "whole image", "several": "two or more"}
        handles = [Patch(color=COLOURS[c]) for c in seen]
        style.legend(figure, handles, [words.get(c, c) for c in seen], 4, handlelength=1)
        style.footnote(figure, [*notes, *cut])
    return figure
