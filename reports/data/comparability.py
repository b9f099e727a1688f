"""What must not stand in one table. Each refusal says which run, why and what to do; ``--allow NAME`` lets it through and is printed."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from .load import ReportError, Run

EXCEPTIONS = {
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
    unknown = [a for a in allow if a not in EXCEPTIONS]
    if unknown:
        raise ReportError(f"--allow {unknown[0]}: unknown; allowed: {', '.join(EXCEPTIONS)}")
    found = {
        "partial": _partial(runs),
        "pixels": _differ(runs, _pixels, "processor limits (min_pixels, max_pixels)"),
        "weights": _weights(runs),
        "versions": _versions(runs),
        "tasks": _tasks(frame),
        "documents": _documents(runs, frame),
        "prompts": _prompts(frame),
        "hardware": _differ(runs, _hardware(frame), "machine, batch size, precision and attention kernel") if times else None,
    }
    refused = [f"{said}. {_remedy(name)}" for name, said in found.items() if said and name not in allow]
    if refused:
        raise ReportError("\n".join(refused))
    return [f"allowed ({name}): {said}" for name, said in found.items() if said]


def notes(runs: list[Run]) -> list[str]:
    """What a reader should know and nobody needs to allow: equal ``--limit``, commits, uncommitted changes, foreign models."""
    out = []
    out += _left_out(runs)
    limits = {_evaluation(r).get("limit") for r in runs} - {None}
    if limits:
        out.append(f"--limit {min(limits):g}: only the first documents of each task")
    commits = {(r.about.get("commit") or {}).get("head") for r in runs} - {None}
    if len(commits) > 1:
        out.append(f"runs are of {len(commits)} commits of awares-bench (see the provenance table)")
    if any((r.about.get("commit") or {}).get("dirty") for r in runs):
        out.append("some runs were made with uncommitted changes (see the provenance table)")
    foreign = [r.name for r in runs if r.about.get("status", "foreign") == "foreign"]
    if foreign:
        out.append(f"not run by awares-bench, so without token counts unless lmms-eval's samples hold them: {', '.join(foreign)}")
    return out


def _left_out(runs: list[Run]) -> list[str]:
    """Documents that could not be answered, named under every table: they are in no number."""
    out = []
    for run in runs:
        lost = {
            task: dict(sorted(ids.items(), key=lambda x: int(x[0]))) for task, ids in (run.about.get("left_out") or {}).items()
        }
        count = sum(map(len, lost.values()))
        if count:
            named = "; ".join(f"{task} {', '.join(list(ids)[:10])}{', …' if len(ids) > 10 else ''}" for task, ids in lost.items())
            why = " ".join(next(iter(next(iter(lost.values())).values())).split())
            why = why if len(why) <= 200 else f"{why[:200]}…"
            s = "s" if count > 1 else ""
            out.append(
                f"{count} document{s} left out of {run.name}, which could not answer {'them' if s else 'it'}: {named} (the first: {why})"
            )
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
        what = what or _differ(
            runs, lambda r, t=task: (_evaluation(r).get("versions") or {}).get(t), f"versions of the task {task}"
        )
    return what


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
        if weights is None:
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
        held = {m: set(d) for m, d in rows.groupby("method", observed=True, sort=False)["doc_id"]}
        widest = max(held, key=lambda m: len(held[m]))
        for method, documents in held.items():
            if documents != held[widest]:
                missing = (
                    min(held[widest] - documents, default=None) if documents < held[widest] else min(documents ^ held[widest])
                )
                cut = [f"{r.name} ran with --limit {_evaluation(r)['limit']:g}" for r in runs if _evaluation(r).get("limit")]
                cut += [
                    f"{r.name} could not answer {len(lost)}"
                    for r in runs
                    if (lost := (r.about.get("left_out") or {}).get(str(task)))
                ]
                why = f" ({'; '.join(cut[:2])})" if cut else ""
                return f"{method}, {task}: {len(documents)} documents, {widest} has {len(held[widest])}{why}; document {missing} is in one only"
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
