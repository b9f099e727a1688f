"""Figures of a GPU day: seconds of a page by batch and way, and what pruners cost. The device's name is in every title."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from . import style

READINGS = {
    "gpu_engine_seconds": "Lower is better: the time of a page falls as more pages share a batch; dashed is transformers' generate.",
    "gpu_pruners_share": "A bar is what a pruner adds to the prefill of the whole picture; its darker part is choosing the tokens.",
}
"""How to read each figure."""

COLOURS = {
    "full, ours": "#949494",
    "full, generate": "#949494",
    "AwaRes, ours": "#0173b2",
    "AwaRes, generate twice": "#0173b2",
}
"""Ways that are drawn; ``generate`` is dashed and hollow."""


def draw_engine(frame: pd.DataFrame, device: str, notes: tuple[str, ...] = ()) -> Figure:
    """``data.gpu_day.engine`` -> a panel per model and page size: milliseconds a page over the batch, at the lowest call rate there is."""
    shown = frame[frame["way"].isin(COLOURS)]
    panels = list(shown.groupby(["section", "model", "tokens"], sort=False))
    with style.house_style():
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = style.subplots(0.7 + 1.7 * rows, rows, columns, squeeze=False)
        for (place, own), ax in zip(panels, axes.flat, strict=False):
            _, model, tokens = place
            for way, line in own.groupby("way", sort=False):
                lowest = line.loc[line.groupby("batch")["call_rate"].idxmin()].sort_values("batch")
                stock = "generate" in str(way)
                ax.plot(
                    lowest["batch"], 1000 * lowest["seconds"], color=COLOURS[str(way)], ls="--" if stock else "-", marker="o", ms=3.5,
                    mfc="white" if stock else COLOURS[str(way)], lw=0.9, label=str(way),
                )  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_ylim(0)
            ax.set_xlabel("pages in a batch")
            batches = sorted(own["batch"].unique())
            ax.set_xticks(batches, [str(b) for b in batches])
            ax.minorticks_off()
            ax.set_title(f"{model}, {tokens:,} tokens", fontsize=6.5)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("ms a page")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        style.legend(figure, handles, labels, 2)
        style.title(figure, f"The engine on {device}")
        rates = ", ".join(f"{r:g}" for r in sorted(shown.groupby(["section", "tokens", "batch"])["call_rate"].min().unique()))
        style.footnote(figure, [f"Call rates of AwaRes: {rates}.", *notes])
    return figure


def draw_pruners(frame: pd.DataFrame, device: str, notes: tuple[str, ...] = ()) -> Figure:
    """``data.gpu_day.pruners`` -> a bar per pruner: its share of the prefill with the cut, scoring alone in the darker part."""
    one = frame[frame["retention"] == frame["retention"].max()].reset_index(drop=True)
    with style.house_style():
        figure, ax = style.subplots(0.9 + 0.2 * len(one))
        ax.barh(one.index, 100 * one["share"], color="#9ecae1", height=0.7, label="with the cut")
        ax.barh(one.index, 100 * one["scoring"], color="#0173b2", height=0.7, label="scoring")
        ax.set_yticks(one.index, one["pruner"])
        ax.set_ylim(len(one) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        first = one.iloc[0]
        ax.set_xlabel(f"% of the prefill, {first['model']}, {first['tokens']:,} tokens, retention {first['retention']:g}")
        handles, labels = ax.get_legend_handles_labels()
        style.legend(figure, handles, labels, 2)
        style.title(figure, f"Pruners on {device}")
        style.footnote(figure, notes)
    return figure
