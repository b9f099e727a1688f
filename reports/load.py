"""Joins what a run recorded (tokens, crops, events) with what lmms-eval scored, one row per document, and refuses to guess."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from awares_bench.record import read_records

METRIC = {
    "chartqa": "relaxed_overall",
    "docvqa_val": "anls",
    "ocrbench": "ocrbench_accuracy",
    "pope": "pope_accuracy",
    "realworldqa": "exact_match",
    "vstar_bench": "vstar_overall_acc",
    "nano_chart": "relaxed_overall",
    "nano_doc": "anls",
    "nano_ocr": "ocrbench_accuracy",
    "nano_pope": "pope_accuracy",
    "nano_real": "exact_match",
    "nano_vstar": "vstar_overall_acc",
}
"""The accuracy of each task: the metric whose per-document value is a score from 0 to 1."""

ORDER = list(METRIC)
"""Tasks in the order of the paper's Table 1."""


class ReportError(ValueError):
    """Runs that must not be reported as they are: says which, why and what to do."""


def scores(samples: Path, task: str) -> dict[int, float]:
    """lmms-eval's samples file of a task -> score (0 to 1) of each document."""
    if task not in METRIC:
        raise ReportError(f"no accuracy is defined for task {task!r}; known: {', '.join(METRIC)}")
    out: dict[int, float] = {}
    for number, line in enumerate(samples.read_text().splitlines(), 1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{samples}, line {number} is not JSON ({error}); rerun lmms-eval for {task}") from error
        value = sample.get(METRIC[task])
        value = value.get("score") if isinstance(value, dict) else value
        if value is None or value != value:
            raise ReportError(f"{samples}: document {sample.get('doc_id')} has no {METRIC[task]} score")
        if sample["doc_id"] in out:
            raise ReportError(f"{samples}: document {sample['doc_id']} appears twice; aggregate repeats before reporting")
        out[sample["doc_id"]] = float(value)
    return out


def samples_files(folder: Path) -> dict[str, Path]:
    """Task -> its newest samples file below an lmms-eval output folder."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*_samples_*.jsonl"), key=lambda p: p.name):
        found[path.stem.split("_samples_", 1)[1]] = path
    return found


def load(method: str, run: Path, lmms_output: Path) -> pd.DataFrame:
    """One method's run folder and lmms-eval output -> a row per document.

    Columns: method, task, doc_id, score (0 to 1), rtr, visual_tokens, full_tokens, called, crops, malformed, turns,
    seconds, answer, replies, question, usage, events. Raises ReportError when a scored document has no record.
    """
    files = samples_files(lmms_output)
    if not files:
        raise ReportError(f"{lmms_output} holds no samples file; run lmms-eval with --log_samples --output_path {lmms_output}")
    records = {(r.task, r.doc_id): r for r in read_records(run) if r.error is None}
    rows = []
    for task in sorted(files, key=lambda t: ORDER.index(t) if t in ORDER else len(ORDER)):
        scored = scores(files[task], task)
        missing = [d for d in scored if (task, d) not in records]
        if missing:
            raise ReportError(
                f"{method}, {task}: {len(scored)} scores but no record for {len(missing)} of them (document {missing[0]} first). "
                "lmms-eval may have answered them from its own cache: rerun without --use_cache"
            )
        for doc_id, score in sorted(scored.items()):
            r = records[task, doc_id]
            kinds = [e["kind"] for e in r.events]
            rows.append(
                {
                    "method": method,
                    "task": task,
                    "doc_id": doc_id,
                    "score": score,
                    "rtr": r.rtr,
                    "visual_tokens": sum(u["prefill"] for u in r.usage),
                    "full_tokens": r.full_tokens,
                    "called": bool(r.crops) or "malformed_call" in kinds,
                    "malformed": "malformed_call" in kinds,
                    "crops": ",".join(r.crops),
                    "turns": len(r.usage),
                    "seconds": sum(v for u in r.usage for k, v in u.items() if k.endswith("_seconds")),
                    "answer": r.answer,
                    "replies": r.replies,
                    "question": r.question,
                    "usage": r.usage,
                    "events": r.events,
                }
            )
    return pd.DataFrame(rows)
