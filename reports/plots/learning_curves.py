"""Figure: learning curves of training runs, from their JSON-lines logs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..data import names
from ..data.load import ReportError
from . import style

TITLE = "Learning curves"
READING = "The losses of all training runs stand in the first panel, what each run was judged by in a panel of its own."

WATCHED = ("reward", "answer_score", "call_rate", "rtr")
"""What a GRPO run is judged by while it runs; its loss says little."""

LINES = ("-", "--", ":", "-.")
MOST = 11
"""Panels of evaluations; the CSV has every run's."""


def read(logs: list[Path]) -> pd.DataFrame:
    """Logs (``run/log.jsonl`` or ``NAME.jsonl``) -> run, step, seconds, kind ("loss" or "evaluation"), group, series, value.

    A line is ``{"step", "seconds", "loss", parts…}``, ``{"step", "evaluation": {name: number or {name: number}}}``, or GRPO's with a
    ``reward``, whose ``WATCHED`` metrics stand for an evaluation. An unfinished last line is left out; other broken lines are refused.
    """
    rows = []
    for path in logs:
        run = path.parent.name if path.stem == "log" else path.stem
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise ReportError(f"{path}, line {number} is not JSON ({error})") from error
            same = {"run": run, "step": entry.get("step"), "seconds": entry.get("seconds")}
            metrics = entry.get("evaluation") or {k: entry[k] for k in WATCHED if k in entry and "reward" in entry}
            kind = "evaluation" if metrics else "loss"
            metrics = metrics or {k: v for k, v in entry.items() if k not in ("step", "seconds")}
            rows += [same | {"kind": kind, "group": k.split("/")[0], "series": k, "value": v} for k, v in _numbers(metrics)]
    return pd.DataFrame(rows, columns=["run", "step", "seconds", "kind", "group", "series", "value"])


def _numbers(metrics: dict, prefix: str = "") -> list[tuple[str, float]]:
    """Nested metrics -> (names joined with ``/``, number); what is not a number is left out."""
    out = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            out += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out.append((prefix + key, float(value)))
    return out


def data(curves: pd.DataFrame) -> pd.DataFrame:
    """``read`` -> run, step, kind, series, value: the total loss, and of evaluations each group's ``mean``, or the mean of its parts."""
    loss = curves[(curves["kind"] == "loss") & (curves["series"] == "loss")]
    parts = curves[curves["kind"] == "evaluation"]
    keys = ["run", "step", "kind", "group"]
    own = parts[parts["series"].str.endswith("mean")].set_index(keys)["value"]
    means = parts.groupby(keys, sort=False)["value"].mean()
    means.update(own[~own.index.duplicated()])
    return pd.concat([loss.rename(columns={"group": "_"}), means.reset_index().rename(columns={"group": "series"})])[
        ["run", "step", "kind", "series", "value"]
    ]


def draw(table: pd.DataFrame, on: str, notes: tuple[str, ...] = ()) -> Figure:
    """Plot ``data``: the losses of all runs, and the evaluations of each in a panel of its own."""
    runs = list(table["run"].unique())
    colours = "colorblind" if len(runs) <= 10 else "husl"  # the first has ten
    palette = dict(zip(runs, sns.color_palette(colours, len(runs)).as_hex(), strict=True))
    loss, evaluation = (table[table["kind"] == kind] for kind in ("loss", "evaluation"))
    panels = [r for r in runs if (evaluation["run"] == r).any()]
    cut = [f"Evaluations of {MOST} of {len(panels)} runs; all are in the CSV."] if len(panels) > MOST else []
    panels = panels[:MOST]
    with style.house_style():
        columns = 1 if len(panels) < 4 else 2
        rows = -(-(len(panels) + 1) // columns)
        figure, grid = style.subplots(0.7 + 1.4 * rows, rows, columns, columns * style.WIDTH, squeeze=False)
        # The losses of all runs in the first panel, on a logarithmic axis where they allow one.
        top, *others = grid.flat
        for axes in others[len(panels) :]:
            axes.remove()
        others = others[: len(panels)]
        for run, line in loss.groupby("run", sort=False):
            top.plot(line["step"], line["value"], color=palette[run])
        if len(loss) and loss["value"].min() > 0:
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_major_formatter("{x:g}")
            top.yaxis.set_minor_formatter(NullFormatter())
        top.set_ylabel("loss")
        handles = [top.plot([], [], color=c)[0] for c in palette.values()]
        style.legend(figure, handles, [names.short(names.readable(r)) for r in runs], 3 * columns, handlelength=1.2)
        # Each run's evaluations, named at the end of their lines, to the right of the last step.
        for axes, run in zip(others, panels, strict=True):
            ends = []
            for i, (series, line) in enumerate(evaluation[evaluation["run"] == run].groupby("series", sort=False)):
                axes.plot(
                    line["step"], line["value"], color=palette[run], ls=LINES[i % len(LINES)], marker=".", ms=3, label=series
                )
                ends.append((line["step"].iloc[-1], line["value"].iloc[-1], names.short(series, 18), palette[run]))
            axes.margins(y=0.2)
            axes.set_ylabel(names.short(names.readable(run), 24))
            axes.set_xlim(right=axes.get_xlim()[1] + 0.25 * (axes.get_xlim()[1] - axes.get_xlim()[0]))
            style.place_labels(
                axes, sorted(ends, key=lambda e: -e[1]), offsets=[(5, dy) for s in range(0, 40, 2) for dy in (s, -s)]
            )
        for axes in [top, *others][-columns:]:
            axes.set_xlabel("step")
        style.title(figure, TITLE, on)
        style.footnote(figure, [*notes, *cut, "An evaluation is each group's mean."])
    return figure
