"""The tables: accuracy and retained token ratio as in the paper's Table 1, the comparison with the published cells, what it cost.

Each is a ``Table``: numbers at full precision for CSV, and the same rows in words for Markdown, LaTeX and HTML.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from awares_bench.methods.crop_grid import PAPER_GRID

from ..data import flops, names, stats
from ..data.load import Run

DASH = "–"


@dataclass(frozen=True)
class Table:
    """name: of its files. numbers: for CSV. printed: strings; a column's name is (group, column), the group possibly empty."""

    name: str
    title: str
    numbers: pd.DataFrame
    printed: pd.DataFrame
    notes: list[str] = field(default_factory=list)


def summary(frame: pd.DataFrame) -> dict:
    """Documents -> {method: {task or "mean": {accuracy, rtr, documents, call_rate, malformed_rate}}}, fractions from 0 to 1.

    ``rtr`` is the mean of the per-document ratios (paper Eq. 9); "mean" is the mean over tasks, as in the paper's averages, and
    null for a method that lacks a task. malformed_rate is the share of the calls.
    """
    tasks = list(frame["task"].unique())
    out: dict = {}
    for method, rows in frame.groupby("method", sort=False, observed=True):
        cells = {}
        for task, some in rows.groupby("task", sort=False, observed=True):
            calls = int(some["called"].sum())
            cells[str(task)] = {
                "accuracy": float(some["score"].mean()),
                "rtr": None if some["rtr"].isna().any() else float(some["rtr"].mean()),
                "documents": len(some),
                "call_rate": float(some["called"].mean()),
                "malformed_rate": float(some["malformed"].sum() / calls) if calls else None,
            }
        whole = len(cells) == len(tasks)
        calls = int(rows["called"].sum())
        cells["mean"] = {
            k: _mean([c[k] for c in cells.values()]) if whole else None for k in ("accuracy", "rtr", "call_rate")
        } | {
            "documents": len(rows),
            "malformed_rate": float(rows["malformed"].sum() / calls) if calls else None,
        }
        out[str(method)] = cells
    return out


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def labels(frame: pd.DataFrame) -> dict[str, str]:
    """Method -> its name in print."""
    return {str(m): str(n) for m, n in frame.drop_duplicates("method")[["method", "label"]].to_numpy()}


def reference(frame: pd.DataFrame, family: str) -> str | None:
    """The run that stands for a family in comparisons: the one named like it, else the first; None without one."""
    own = [str(m) for m in frame.loc[frame["family"] == family, "method"].unique()]
    return next((m for m in own if m in (family, f"awares_{family}")), own[0] if own else None)


def main(frame: pd.DataFrame, published: pd.DataFrame, level: float = stats.LEVEL) -> Table:
    """Accuracy (percent) and RTR per task and on average, interval, paired differences to full resolution and to AwaRes, the paper's mean."""
    summaries, name = summary(frame), labels(frame)
    means = stats.intervals(frame, level).query("task == 'mean'").set_index("method")
    against = {f: reference(frame, f) for f in ("full", "awares")}
    compared = {f: stats.compare(frame, m, level).query("task == 'mean'").set_index("method") for f, m in against.items() if m}
    paper = published[published["task"] == "mean"].set_index(["run", "quantity"])
    tasks = [str(t) for t in frame["task"].unique()]
    rows, said = [], []
    for method, cells in summaries.items():
        row: dict = {"method": method}
        text = {("", "method"): name[method]}
        for task in [*tasks, "mean"]:
            cell = cells.get(task) or {"accuracy": None, "rtr": None}
            row |= {f"{task} acc": percent(cell["accuracy"]), f"{task} RTR": cell["rtr"]}
            text |= {(names.task(task), "acc"): number(row[f"{task} acc"], 1), (names.task(task), "RTR"): number(cell["rtr"], 2)}
        row |= {"mean low": percent(means.at[method, "low"]), "mean high": percent(means.at[method, "high"])}
        text["mean", f"{100 * level:g} %"] = span(row["mean low"], row["mean high"])
        for f, table in compared.items():
            word = {"full": "full resolution", "awares": "AwaRes"}[f]
            here = table.loc[method] if method in table.index else None
            for key in ("difference", "low", "high"):
                row[f"vs {against[f]} {key}"] = None if here is None else percent(here[key])
            for key in ("p", "p_holm"):
                row[f"vs {against[f]} {key}"] = None if here is None else here[key]
            gap = DASH if here is None else f"{number(row[f'vs {against[f]} difference'], 1, sign=True)}"
            text |= {
                (f"against {word}", "points"): gap,
                (f"against {word}", "p"): DASH if here is None else chance(here["p_holm"]),
            }
        if len(paper):
            for quantity, short in (("accuracy", "acc"), ("rtr", "RTR")):
                known = (method, quantity) in paper.index
                cell = paper.loc[(method, quantity)] if known else None
                row[f"paper {short}"] = float(cell["value"]) if known else None
                text["paper", short] = number(row[f"paper {short}"], 2) + ("†" if known and cell["doubt"] else "")
            row["ours - paper"] = subtract(row["mean acc"], row["paper acc"])
            text["paper", "ours − paper"] = number(row["ours - paper"], 1, sign=True)
        rows.append(row)
        said.append(text)
    notes = [
        f"Accuracy in percent, RTR is the mean of per-document ratios, {100 * level:g} % bootstrap interval of the mean over documents, "
        "p of a paired sign-flip test, Holm-corrected over the methods."
    ]
    if len(paper) and paper["doubt"].any():
        notes.append("† the published cell is doubted; the paper table says why.")
    title = f"Accuracy and retained token ratio: {names.suite(frame)}"
    return Table("table", title, pd.DataFrame(rows), _printed(said), notes)


def against_paper(frame: pd.DataFrame, published: pd.DataFrame) -> Table | None:
    """Each published cell beside ours, their difference and our interval; None where nothing was published (nano)."""
    if published.empty:
        return None
    summaries, name = summary(frame), labels(frame)
    intervals = stats.intervals(frame).set_index(["method", "task"])
    seconds = frame.groupby(["method", "task"], observed=True)["seconds"].mean()
    rows, said = [], []
    for p in published.itertuples():
        cell = summaries[p.run].get(p.task, {})
        ours = percent(cell.get("accuracy")) if p.quantity == "accuracy" else cell.get("rtr")
        if p.quantity == "seconds":
            ours = float(seconds.get((p.run, p.task), np.nan))
        low, high = (
            (percent(intervals.at[(p.run, p.task), k]) for k in ("low", "high")) if p.quantity == "accuracy" else (None, None)
        )
        row = {"method": p.run, "task": p.task, "quantity": p.quantity, "ours": ours, "low": low, "high": high, "paper": p.value}
        row |= {"ours - paper": subtract(ours, p.value), "source": p.source, "doubt": p.doubt}
        rows.append(row)
        digits = 1 if p.quantity == "accuracy" else 2
        said.append(
            {
                ("", "method"): name[p.run],
                ("", "task"): names.task(p.task),
                ("", "quantity"): {"rtr": "RTR"}.get(p.quantity, p.quantity),
                ("", "ours"): number(ours, digits),
                ("", "95 %"): span(low, high),
                ("", "paper"): number(p.value, 2) + ("†" if p.doubt else ""),
                ("", "ours − paper"): number(row["ours - paper"], digits, sign=True),
                ("", "source"): p.source,
                ("", "† why the cell is doubted"): p.doubt,
            }
        )
    return Table("paper", "Published cells beside ours", pd.DataFrame(rows), _printed(said), ["† doubted, see the last column."])


def cost(runs: list[Run], frame: pd.DataFrame, times: bool = True) -> Table:
    """What a document costs on average: tokens, RTR both ways, estimated FLOPs, seconds per phase, peak memory, auxiliary models."""
    abouts = {r.name: r.about for r in runs}
    name = labels(frame)
    known = ("encoded", "prefill", "text", "output")
    phases = [c for c in frame.columns if c.endswith("_seconds") and not c.startswith("later_") and frame[c].notna().any()]
    phases = [c for c in phases if not c.startswith("aux") or frame[c].any()]
    peaks = [c for c in frame.columns if c.startswith("peak_") and frame[c].notna().any()]
    peaks += [c for c in ("peak_memory_bytes",) if c not in peaks and any(about.get(c) is not None for about in abouts.values())]
    more = [
        c.removeprefix("later_")
        for c in frame.columns
        if c.startswith("later_") and not c.endswith("_seconds") and c != "later_seconds"
    ]
    more = [c for c in more if c not in known and c in frame and frame[c].fillna(0).any()]
    rows, said = [], []
    for method, own in frame.groupby("method", sort=False, observed=True):
        config = flops.shapes(abouts.get(method, {}))
        row: dict = {"method": method, "documents": len(own)}
        row |= {k: _known_mean(own[k]) for k in (*known, *more)}
        row["RTR"] = _known_mean(own["rtr"])
        row["ratio of sums"] = None if own["rtr"].isna().any() else own["prefill"].sum() / own["full_tokens"].sum()
        row["RTR nominal"] = _nominal(own)
        row["GFLOPs"] = None if config is None else _known_mean(flops.of_documents(own, config) / 1e9)
        if times:
            row |= {"seconds": _known_mean(own["seconds"]), "seconds after turn 1": _known_mean(own["later_seconds"])}
            quartiles = own["seconds"].quantile([0.25, 0.5, 0.75]) if own["seconds"].notna().all() else [None] * 3
            row |= dict(zip(("seconds q25", "seconds median", "seconds q75"), quartiles, strict=True))
            row |= {k: _known_mean(own[k]) for k in phases}
            row["batch size"] = "/".join(f"{b:g}" for b in sorted(own["batch_size"].dropna().unique())) or None
        row |= {k: own[k].max() if k in own and own[k].notna().all() else abouts.get(str(method), {}).get(k) for k in peaks}
        rows.append(row)
        text = {("", "method"): name[str(method)], ("", "documents"): f"{len(own):,}"}
        text |= {("tokens", k.replace("_", " ")): number(row[k], 1) for k in (*known, *more)}
        text |= {("RTR", "mean of ratios"): number(row["RTR"], 3), ("RTR", "ratio of sums"): number(row["ratio of sums"], 3)}
        text |= {("RTR", "nominal"): number(row["RTR nominal"], 3), ("", "GFLOPs"): number(row["GFLOPs"], 3)}
        if times:
            text["milliseconds", "mean"] = number(thousand(row["seconds"]), 1)
            text["milliseconds", "median (quartiles)"] = (
                f"{number(thousand(row['seconds median']), 1)} ({span(thousand(row['seconds q25']), thousand(row['seconds q75']))})"
            )
            text |= {("milliseconds", k.removesuffix("_seconds").replace("_", " ")): number(thousand(row[k]), 1) for k in phases}
            text["milliseconds", "after turn 1"] = number(thousand(row["seconds after turn 1"]), 1)
            text["", "batch"] = row["batch size"] or DASH
        for k in peaks:
            scale, unit = (2**20, " (MiB)") if k.endswith("_bytes") else (1, "")
            text["", k.removesuffix("_bytes").replace("_", " ") + unit] = number(None if row[k] is None else row[k] / scale, 0)
        said.append(text)
    notes = [
        "Means over documents, all turns. GFLOPs are estimated from token counts and the model's shapes, without auxiliary models. "
        "RTR nominal is 0.25 plus the area of the crops, as if processor limits never bit."
    ]
    if times and (frame["batch_size"] > 1).any():
        notes.append("Seconds of a batch above 1 are the batch's time shared out by tokens: throughput, not latency.")
    return Table("cost", f"Cost of a document: {names.suite(frame)}", pd.DataFrame(rows), _printed(said), notes)


def _known_mean(values: pd.Series) -> float | None:
    """The mean, or None where any value is unknown."""
    return None if values.isna().any() or values.empty else float(values.mean())


def _nominal(own: pd.DataFrame) -> float | None:
    """0.25 + area of the crops, of policies that begin with the half-size view and call for crops; None for others."""
    if not own["called"].any() or own["malformed"].any():
        return None
    areas = {
        c: PAPER_GRID.area(c.split(",")) if c else 0.0
        for c in own["crops"].unique()
        if set(c.split(",")) <= {"", *PAPER_GRID.names, "all"}
    }
    return None if len(areas) < own["crops"].nunique() else 0.25 + float(own["crops"].astype(str).map(areas).mean())


def _printed(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows).fillna(DASH)
    table.columns = pd.MultiIndex.from_tuples(list(table.columns))
    return table


def percent(fraction: float | None) -> float | None:
    return None if fraction is None or fraction != fraction else 100 * float(fraction)


def thousand(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def subtract(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or a != a or b != b else a - b


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number in print; an unknown one is a dash, never 0."""
    if value is None or value != value:
        return DASH
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def span(low: float | None, high: float | None) -> str:
    return DASH if low is None or low != low else f"{number(low, 1)} to {number(high, 1)}"


def chance(p: float) -> str:
    return DASH if p != p else ("<0.001" if p < 0.001 else f"{p:.3f}")
