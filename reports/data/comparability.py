"""What must not stand in one table. Each refusal says which run, why and what to do; ``--allow NAME`` lets it through and is printed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from .load import ReportError, Run

REASONS = {
    "pixels": "processor limits differ",
    "weights": "one checkpoint name, different weights",
    "versions": "scored by different versions of lmms-eval or of a task",
    "prompts": "the same document was asked differently, or shows other pictures",
    "documents": "runs hold different documents, or --limit cut some of them",
    "tasks": "some runs lack a task",
    "hardware": "times of different machines, batch sizes, precisions or attention kernels",
    "partial": "runs that were not finished",
}
"""Name of ``--allow`` -> what it lets through."""


def check(runs: list[Run], frame: pd.DataFrame, allow: tuple[str, ...] = (), times: bool = True) -> list[str]:
    """Runs and their documents -> the sentences on what was allowed, for the footnote.

    times: whether times stand in the report; without them the hardware may differ.
    Raises ReportError with every reason that is not allowed.
    """
    unknown = [a for a in allow if a not in REASONS]
    if unknown:
        raise ReportError(f"--allow {unknown[0]}: unknown; allowed: {', '.join(REASONS)}")
    # Reason -> the sentence on what differs, None where nothing does.
    differences = {
        "partial": _partial(runs),
        "pixels": _differ(runs, _pixels, "processor limits (min_pixels, max_pixels)"),
        "weights": _weights(runs),
        "versions": _versions(runs),
        "tasks": _tasks(frame),
        "documents": _documents(runs, frame),
        "prompts": _prompts(frame),
        "hardware": _differ(runs, _hardware(frame), "machine, batch size, precision and attention kernel") if times else None,
    }
    refused = [f"{what}. {_remedy(name)}" for name, what in differences.items() if what and name not in allow]
    if refused:
        raise ReportError("\n".join(refused))
    return [f"allowed ({name}): {what}" for name, what in differences.items() if what]


def notes(runs: list[Run]) -> list[str]:
    """What a reader should know and nobody needs to allow: equal ``--limit``, commits, uncommitted changes, foreign models."""
    out = _left_out(runs)
    limits = [limit for r in runs if (limit := _evaluation(r).get("limit")) is not None]
    if limits:
        out.append(f"--limit {min(limits):g}: only the first documents of each task")
    commits = {(r.about.get("commit") or {}).get("head") for r in runs} - {None}
    if len(commits) > 1:
        out.append(f"The runs are of {len(commits)} commits of awares-bench (see the provenance table)")
    if any((r.about.get("commit") or {}).get("dirty") for r in runs):
        out.append("Some runs were made with uncommitted changes (see the provenance table)")
    foreign = [r.name for r in runs if r.about.get("status", "foreign") == "foreign"]
    if foreign:
        out.append(f"Not run by awares-bench, so without token counts unless lmms-eval's samples hold them: {', '.join(foreign)}")
    return out


def _left_out(runs: list[Run]) -> list[str]:
    """Documents that could not be answered, named under every table: they are in no number."""
    out = []
    for run in runs:
        lost = run.about.get("left_out") or {}
        lost = {task: dict(sorted(reasons.items(), key=lambda x: int(x[0]))) for task, reasons in lost.items()}
        count = sum(map(len, lost.values()))
        if not count:
            continue
        # The first ten of each task by number, and the first one's reason, cut to a line or two.
        ids = "; ".join(f"{task} {', '.join(list(own)[:10])}{', …' if len(own) > 10 else ''}" for task, own in lost.items())
        why = " ".join(next(iter(next(iter(lost.values())).values())).split())
        why = why if len(why) <= 200 else f"{why[:200]}…"
        s, them = ("s", "them") if count > 1 else ("", "it")
        out.append(f"{count} document{s} left out of {run.name}, which could not answer {them}: {ids} (the first: {why})")
    return out


def _remedy(name: str) -> str:
    if name == "hardware":
        return "Leave times out with --no-times, or pass --allow hardware"
    return f"Report them apart, or pass --allow {name}"


def _evaluation(run: Run) -> dict:
    return run.about.get("evaluation") or {}


def _differ(runs: list[Run], fact: Callable[[Run], object], what: str) -> str | None:
    """The first two runs whose known facts differ, in words."""
    known = [(r.name, fact(r)) for r in runs]
    known = [(name, value) for name, value in known if value is not None]
    for name, value in known[1:]:
        if value != known[0][1]:
            return f"{known[0][0]} and {name} differ in {what}: {known[0][1]} and {value}"
    return None


def _pixels(run: Run) -> object:
    identity = run.about.get("identity") or {}
    return None if identity.get("max_pixels") is None else (identity.get("min_pixels"), identity["max_pixels"])


def _versions(runs: list[Run]) -> str | None:
    what = _differ(runs, lambda r: (r.about.get("versions") or {}).get("lmms-eval"), "versions of lmms-eval")
    for task in sorted({t for r in runs for t in _evaluation(r).get("versions") or {}}):
        if what is None:
            what = _differ(runs, partial(_task_version, task), f"versions of the task {task}")
    return what


def _task_version(task: str, run: Run) -> object:
    return (_evaluation(run).get("versions") or {}).get(task)


def _hardware(frame: pd.DataFrame) -> Callable[[Run], object]:
    sizes = frame.groupby("method", observed=True)["batch_size"].agg(lambda s: sorted(s.dropna().unique()))

    def fact(run: Run) -> object:
        identity, machine = run.about.get("identity") or {}, run.about.get("machine")
        facts = ("dtype", "attn_implementation", "engine", "served", "constrained")
        kernel = ", ".join(f"{k} {identity[k]}" for k in facts if identity.get(k) is not None)
        batch = "/".join(f"{s:g}" for s in sizes[run.name]) or "unknown"
        return machine and f"{', '.join(str(v) for v in machine.values())}, batch {batch}, {kernel}"

    return fact


def _partial(runs: list[Run]) -> str | None:
    for run in runs:
        if run.about.get("status") == "partial":
            return f"{run.name} is a partial run ({run.folder}); finish it with the command that started it"
    return None


def _weights(runs: list[Run]) -> str | None:
    seen: dict[str, tuple[str, str]] = {}
    for run in runs:
        identity = run.about.get("identity") or {}
        name, weights = identity.get("pretrained"), identity.get("weights")
        if name is None or weights is None:
            continue
        first = seen.setdefault(name, (run.name, weights))
        if first[1] != weights:
            return f"{first[0]} and {run.name} name the checkpoint {name} and hold different weights ({first[1]}, {weights})"
    return None


def _tasks(frame: pd.DataFrame) -> str | None:
    tasks = set(frame["task"].unique())
    for method, own in frame.groupby("method", observed=True, sort=False)["task"].unique().items():
        lacking = sorted(tasks - set(own))
        if lacking:
            return f"{method} has no scores for {', '.join(lacking)}; its mean would be over other tasks than the others'"
    return None


def _documents(runs: list[Run], frame: pd.DataFrame) -> str | None:
    for task, rows in frame.groupby("task", observed=True, sort=False):
        documents_of = {m: set(d) for m, d in rows.groupby("method", observed=True, sort=False)["doc_id"]}
        widest = max(documents_of, key=lambda m: len(documents_of[m]))
        most = documents_of[widest]
        for method, documents in documents_of.items():
            if documents == most:
                continue
            # Name a document that one of them lacks, and what is known of why.
            missing = min(most ^ documents)
            causes = [f"{r.name} ran with --limit {_evaluation(r)['limit']:g}" for r in runs if _evaluation(r).get("limit")]
            lost = {r.name: len((r.about.get("left_out") or {}).get(str(task)) or ()) for r in runs}
            causes += [f"{name} could not answer {count}" for name, count in lost.items() if count]
            why = f" ({'; '.join(causes[:2])})" if causes else ""
            return (
                f"{method}, {task}: {len(documents)} documents, {widest} has {len(most)}{why}; document {missing} is in one only"
            )
    return None


def _prompts(frame: pd.DataFrame) -> str | None:
    """The first document whose question or, as far as records tell, content is not the same in two runs."""
    for column, what in (
        ("prompt", "with different words, or it is another document"),
        ("content", "about other pictures or data"),
    ):
        if column not in frame:  # compact records of an earlier release
            continue
        values = frame.groupby(["task", "doc_id"], observed=True)[column]  # minimum and maximum leave nulls out
        differs = frame[column].notna() & (values.transform("min") != values.transform("max"))
        if not differs.any():
            continue
        first = frame[differs].iloc[0]
        same = frame[differs & (frame["task"] == first["task"]) & (frame["doc_id"] == first["doc_id"])]
        other = same[same[column] != first[column]].iloc[0]
        return f"{first['method']} and {other['method']} asked {first['task']} document {first['doc_id']} {what}"
    return None
