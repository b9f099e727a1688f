"""Accuracy and retained token ratio as in the paper's Table 1, the comparison with the published cells, and what a document cost."""

from __future__ import annotations

import numpy as np
import pandas as pd

from awares_bench.methods.crop_grid import PAPER_GRID

from ..data import flops, hard_documents, names, stats
from ..data.load import Run
from ..data.summary import labels, reference, summary
from .table import DASH, Table, chance, number, percent, printed, span, subtract, thousand


def accuracy(frame: pd.DataFrame, published: pd.DataFrame, level: float = stats.LEVEL) -> Table:
    """Accuracy (percent) and RTR per task and on average, interval, paired differences to full resolution and to AwaRes, the paper's mean."""
    summaries, name = summary(frame), labels(frame)
    means = stats.intervals(frame, level).query("task == 'mean'").set_index("method")
    references = {
        word: run
        for family, word in (("full", "full resolution"), ("awares", "AwaRes"))
        if (run := reference(frame, family)) is not None
    }
    comparisons = {
        word: stats.compare(frame, run, level).query("task == 'mean'").set_index("method") for word, run in references.items()
    }
    hard = hard_documents.data(frame).set_index("method")
    paper = published[published["task"] == "mean"].set_index(["run", "quantity"])
    tasks = [str(t) for t in frame["task"].unique()]
    rows, printed_rows = [], []
    for method, cells in summaries.items():
        row: dict = {"method": method}
        text = {("", "method"): name[method]}
        # What was measured: each task, the mean over tasks and its interval.
        for task in [*tasks, "mean"]:
            cell = cells.get(task) or {"accuracy": None, "rtr": None}
            row |= {f"{task} acc": percent(cell["accuracy"]), f"{task} RTR": cell["rtr"]}
            text |= {(names.task(task), "acc"): number(row[f"{task} acc"], 1), (names.task(task), "RTR"): number(cell["rtr"], 2)}
        row |= {"mean low": percent(means.at[method, "low"]), "mean high": percent(means.at[method, "high"])}
        text["mean", f"{100 * level:g} %"] = span(row["mean low"], row["mean high"])
        # Where half size is wrong: a method that only looks at half size scores nothing there.
        if len(hard):
            row["where half size is wrong"] = percent(hard["accuracy"].get(method))
            text["where half size is wrong", "acc"] = number(row["where half size is wrong"], 1)
        # Paired differences; a run is not compared with itself.
        for word, comparison in comparisons.items():
            against = references[word]
            difference = comparison.loc[method] if method in comparison.index else None
            for key in ("difference", "low", "high"):
                row[f"vs {against} {key}"] = None if difference is None else percent(difference[key])
            for key in ("p", "p_holm"):
                row[f"vs {against} {key}"] = None if difference is None else difference[key]
            text[f"against {word}", "points"] = number(row[f"vs {against} difference"], 1, sign=True)
            text[f"against {word}", "p"] = DASH if difference is None else chance(difference["p_holm"])
        # The paper's mean, where the runs are of its six tasks.
        if len(paper):
            for quantity, short in (("accuracy", "acc"), ("rtr", "RTR")):
                cell = paper.loc[(method, quantity)] if (method, quantity) in paper.index else {"value": None, "doubt": ""}
                row[f"paper {short}"] = None if cell["value"] is None else float(cell["value"])
                text["paper", short] = number(row[f"paper {short}"], 2) + ("†" if cell["doubt"] else "")
            row["ours - paper"] = subtract(row["mean acc"], row["paper acc"])
            text["paper", "ours − paper"] = number(row["ours - paper"], 1, sign=True)
        rows.append(row)
        printed_rows.append(text)
    notes = [
        f"Accuracy in percent, RTR is the mean of per-document ratios, {100 * level:g} % bootstrap interval of the mean over documents, "
        "p of a paired sign-flip test, Holm-corrected over the methods."
    ]
    if len(hard):
        notes.append(
            f"Where half size is wrong: the {int(hard['documents'].max()):,} documents that half size scores below 0.5 on, the only ones where "
            "looking closer can help; mean over tasks."
        )
    if len(paper) and paper["doubt"].any():
        notes.append("† the published cell is doubted; the paper table says why.")
    title = f"Accuracy and retained token ratio: {names.suite(frame)}"
    return Table("table", title, pd.DataFrame(rows), printed(printed_rows), notes)


def against_paper(frame: pd.DataFrame, published: pd.DataFrame) -> Table | None:
    """Each published cell beside ours, their difference and our interval; None where nothing was published (nano)."""
    if published.empty:
        return None
    summaries, name = summary(frame), labels(frame)
    intervals = stats.intervals(frame).set_index(["method", "task"])
    seconds = frame.groupby(["method", "task"], observed=True)["seconds"].mean()
    full = reference(frame, "full")
    rows, printed_rows = [], []
    for p in published.itertuples():
        cell = summaries[p.run].get(p.task, {})
        ours = percent(cell.get("accuracy")) if p.quantity == "accuracy" else cell.get("rtr")
        if p.quantity == "seconds":
            ours = float(seconds.get((p.run, p.task), np.nan))
        if p.quantity == "kept":
            ours = _kept(summaries, p.run, full)
        low, high = (
            (percent(intervals.at[(p.run, p.task), k]) for k in ("low", "high")) if p.quantity == "accuracy" else (None, None)
        )
        row = {"method": p.run, "task": p.task, "quantity": p.quantity, "ours": ours, "low": low, "high": high, "paper": p.value}
        row |= {"ours - paper": subtract(ours, p.value), "source": p.source, "limits": p.limits, "doubt": p.doubt}
        rows.append(row)
        digits = 1 if p.quantity == "accuracy" else 2
        printed_rows.append(
            {
                ("", "method"): name[p.run],
                ("", "task"): names.task(p.task),
                ("", "quantity"): {"rtr": "RTR", "kept": "% of full"}.get(p.quantity, p.quantity),
                ("", "ours"): number(ours, digits),
                ("", "95 %"): span(low, high),
                ("", "paper"): number(p.value, 2) + ("†" if p.doubt else ""),
                ("", "ours − paper"): number(row["ours - paper"], digits, sign=True),
                ("", "source"): p.source,
                ("", "limits"): p.limits,
                ("", "† why the cell is doubted"): p.doubt,
            }
        )
    return Table(
        "paper", "Published cells beside ours", pd.DataFrame(rows), printed(printed_rows), ["† doubted, see the last column."]
    )


def _kept(summaries: dict, run: str, full: str | None) -> float | None:
    """Mean over tasks of a run's accuracy as a share of full resolution's, in percent; None where either is unknown."""
    if full is None:
        return None
    tasks = [t for t in summaries[full] if t != "mean"]
    pairs = [(summaries[run].get(t, {}).get("accuracy"), summaries[full][t]["accuracy"]) for t in tasks]
    return 100 * float(np.mean([a / b for a, b in pairs])) if all(a is not None and b for a, b in pairs) else None


def cost(runs: list[Run], frame: pd.DataFrame, times: bool = True) -> Table:
    """What a document costs on average: tokens, RTR both ways, estimated FLOPs, seconds per phase, peak memory, auxiliary models."""
    abouts = {r.name: r.about for r in runs}
    name = labels(frame)
    # Columns that some run holds: phases (an auxiliary model's where it took any time), peaks, token counts beyond the usual four.
    tokens = ["encoded", "prefill", "text", "output"]
    phases = [c for c in frame.columns if c.endswith("_seconds") and not c.startswith("later_") and frame[c].notna().any()]
    phases = [c for c in phases if not c.startswith("aux") or frame[c].any()]
    peaks = [c for c in frame.columns if c.startswith("peak_") and frame[c].notna().any()]
    peaks += [c for c in ("peak_memory_bytes",) if c not in peaks and any(about.get(c) is not None for about in abouts.values())]
    later = [c.removeprefix("later_") for c in frame.columns if c.startswith("later_")]
    tokens += [c for c in later if not c.endswith("seconds") and c not in tokens and c in frame and frame[c].fillna(0).any()]
    rows, printed_rows = [], []
    for method, own in frame.groupby("method", sort=False, observed=True):
        config = flops.shapes(abouts.get(method, {}))
        row: dict = {"method": method, "documents": len(own)}
        row |= {k: _known_mean(own[k]) for k in tokens}
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
        # A peak that the records do not hold may be the whole run's, in run.json.
        row |= {k: own[k].max() if k in own and own[k].notna().all() else abouts.get(str(method), {}).get(k) for k in peaks}
        rows.append(row)
        # The same in words.
        text = {("", "method"): name[str(method)], ("", "documents"): f"{len(own):,}"}
        text |= {("tokens", k.replace("_", " ")): number(row[k], 1) for k in tokens}
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
        printed_rows.append(text)
    notes = [
        "Means over documents, all turns. GFLOPs are estimated from token counts and the model's shapes, without auxiliary models. "
        "RTR nominal is 0.25 plus the area of the crops, as if processor limits never bit."
    ]
    if times and (frame["batch_size"] > 1).any():
        notes.append("Seconds of a batch above 1 are the batch's time shared out by tokens: throughput, not latency.")
    return Table("cost", f"Cost of a document: {names.suite(frame)}", pd.DataFrame(rows), printed(printed_rows), notes)


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
