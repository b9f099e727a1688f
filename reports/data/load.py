"""Joins what a run recorded (tokens, crops, events) with what lmms-eval scored, one row per document, and refuses to guess."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from awares_bench.evaluation.records import read_records
from awares_bench.methods.conversation import EventKind

from . import names

METRIC = {
    "chartqa": "relaxed_overall",
    "docvqa_val": "anls",
    "ocrbench": "ocrbench_accuracy",
    "pope": "pope_accuracy",
    "realworldqa": "exact_match",
    "vstar_bench": "vstar_overall_acc",
    "ai2d": "exact_match",
    "scienceqa_img": "exact_match",
    "textvqa_val": "exact_match",
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


@dataclass(frozen=True)
class Run:
    """A method's run."""

    name: str
    """Its row in every table."""
    about: dict
    """run.json, and lmms-eval's settings under ``evaluation``; ``{}`` where unknown."""
    documents: pd.DataFrame
    """A row per document, see ``load``."""
    folder: Path | None
    """The run's, a foreign model's output or that of compact records."""
    samples: dict[str, Path]
    """Task -> lmms-eval's samples file; none for compact records."""


def samples_lines(path: Path) -> Iterator[dict]:
    """The lines of a samples file; a broken one is refused with its number."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                task = path.stem.split("_samples_")[-1]
                raise ReportError(f"{path}, line {number} is not JSON ({error}); rerun lmms-eval for {task}") from error


def samples_files(folder: Path) -> dict[str, Path]:
    """Task -> its newest samples file below an lmms-eval output folder, in the order of the paper's table."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.rglob("*_samples_*.jsonl"), key=lambda p: p.name):
        newest[path.stem.split("_samples_", 1)[1]] = path
    return {t: newest[t] for t in sorted(newest, key=lambda t: (ORDER.index(t) if t in ORDER else len(ORDER), t))}


def load(method: str, run: Path | None, lmms_output: Path, metrics: dict[str, str] | None = None) -> pd.DataFrame:
    """One method's run folder (None for a foreign model) and lmms-eval output -> a row per document.

    Columns: method, task, doc_id, score (0 to 1), rtr, full_tokens, called, malformed, crops, events (kinds), turns, answer, answer_logprob
    (of the reply that holds the answer), batch_size, prompt (checksum of the task's question), content (checksum of the document; null where the record does not
    know it), and what was spent over all turns (``encoded``, ``prefill``,
    ``text``, ``output``, ``*_seconds``, and whatever else the records hold), ``seconds`` in sum, and ``later_…``: the
    part spent after the first turn. Unknown is null, never 0. metrics: accuracy of tasks that METRIC does not know.
    Raises ReportError when a document is scored twice or not at all, or has no record.
    """
    files = samples_files(lmms_output)
    if not files:
        raise ReportError(f"{lmms_output} holds no samples file; run lmms-eval with --log_samples --output_path {lmms_output}")
    records = {}
    if run is not None:
        try:
            records = {(r.task, r.doc_id): r for r in read_records(run) if r.error is None}
        except (ValueError, TypeError) as error:
            raise ReportError(f"{method}: {error}") from error
        if not records:
            raise ReportError(f"{method}: {run} holds no records; run it first")
    rows = []
    for task, path in files.items():
        scored = _scored(path, task, METRIC | (metrics or {}), telemetry=run is None)
        missing = [] if run is None else [d for d in scored if (task, d) not in records]
        if missing:
            raise ReportError(
                f"{method}, {task}: {len(scored)} scores but no record for {len(missing)} of them (document {missing[0]} first). "
                "lmms-eval may have answered them from its own cache: rerun without --use_cache"
            )
        for doc_id, (score, telemetry) in sorted(scored.items()):
            record = records.get((task, doc_id))
            row = {"method": method, "task": task, "doc_id": doc_id, "score": score}
            rows.append(row | (_spent(telemetry) if record is None else _spent(vars(record))))
    return typed(pd.DataFrame(rows))


def left_out(run: Path | None, documents: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Task -> {document: why}: those of a run's tasks that could not be answered and have no score; {} when every one was.

    Documents are strings, as in the JSON of compact records.
    """
    out: dict[str, dict[str, str]] = {}
    scored = set(zip(documents["task"], documents["doc_id"], strict=True))
    tasks = set(documents["task"])
    for r in sorted(read_records(run), key=lambda r: (r.task, r.doc_id)) if run is not None else ():
        if r.error is not None and r.task in tasks and (r.task, r.doc_id) not in scored:
            out.setdefault(r.task, {})[str(r.doc_id)] = r.error.encode(errors="backslashreplace").decode()
    return out


def _scored(path: Path, task: str, metrics: dict[str, str], telemetry: bool) -> dict[int, tuple[float, dict]]:
    """Document -> (score from 0 to 1, a record as far as the samples file itself tells it; {} without ``telemetry``)."""
    if task not in metrics:
        raise ReportError(
            f"no accuracy is defined for task {task!r}; known: {', '.join(metrics)}. Name one: --metric {task}=METRIC"
        )
    out: dict[int, tuple[float, dict]] = {}
    for sample in samples_lines(path):
        value = sample.get(metrics[task])
        value = value.get("score") if isinstance(value, dict) else value
        if not isinstance(value, (int, float)) or value != value:
            raise ReportError(f"{path}: document {sample.get('doc_id')} has no {metrics[task]} score")
        if not 0 <= value <= 1:
            raise ReportError(f"{path}: document {sample['doc_id']} scores {value} in {metrics[task]}; a score lies in 0 to 1")
        if sample["doc_id"] in out:
            raise ReportError(f"{path}: document {sample['doc_id']} appears twice; aggregate repeats before reporting")
        out[sample["doc_id"]] = float(value), _telemetry(sample) if telemetry else {}
    return out


def _telemetry(sample: dict) -> dict:
    """A line of lmms-eval's samples file -> the fields of a record; a foreign model's tell the tokens it wrote at most."""
    counts = next(iter(sample.get("token_counts") or []), None) or {}
    answer = sample.get("filtered_resps")
    usage = counts.get("usage") or ([{"output": counts["output_tokens"]}] if counts.get("output_tokens") is not None else [])
    return {**counts, "usage": usage, "answer": answer, "question": str(sample.get("input", ""))}


def _spent(record: dict) -> dict:
    """A record, or the telemetry in a line of lmms-eval's samples -> the columns of ``load`` that tell what was done and spent."""
    turns = [_flat(u) for u in record["usage"]]
    keys = dict.fromkeys(("encoded", "prefill", "text", "output")) | {k: None for u in turns for k in u}
    kinds = [e["kind"] for e in record.get("events") or []]
    crops, malformed = record.get("crops") or [], EventKind.MALFORMED_CALL in kinds
    asked = bool(record.get("boxes")) and not record.get(
        "models"
    )  # a box that an auxiliary model names is no call of the model's
    row = {
        "full_tokens": record.get("full_tokens"),
        "called": bool(crops) or malformed or asked,
        "malformed": malformed,
        "crops": ",".join(crops),
        "events": ",".join(kinds),
        "turns": len(turns) or None,
        "answer": record.get("answer"),
        "answer_logprob": record.get("answer_logprob"),
        "batch_size": record.get("batch_size"),
        "prompt": zlib.crc32(str(record["question"]).encode()),
        "content": zlib.crc32(record["content"].encode()) if record.get("content") else None,
    }
    spent: dict[str, float | None] = {}
    for key in keys:
        spent[key] = _sum(key, turns)
        if not key.startswith("peak_"):
            spent[f"later_{key}"] = _sum(key, turns[1:]) if len(turns) > 1 else (None if spent[key] is None else 0)
    phases = [k for k in keys if k.endswith("_seconds")]
    spent["seconds"] = _sum_known([spent[k] for k in phases])
    spent["later_seconds"] = _sum_known([spent[f"later_{k}"] for k in phases])
    return row | spent | {"rtr": record.get("rtr")}


def _flat(usage: dict, before: str = "") -> dict[str, float | None]:
    """Nested usage, of auxiliary models for one, -> names joined with ``_``; what is not a number is left out."""
    out: dict[str, float | None] = {}
    for key, value in usage.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{before}{key}_")
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            out[before + key] = value
    return out


def _sum(key: str, turns: list[dict]) -> float | None:
    """Over turns: the sum, of a peak the maximum; null where a turn does not know."""
    values = [u.get(key) for u in turns]
    if not key.startswith("peak_"):
        return _sum_known(values)
    known = [v for v in values if v is not None]
    return max(known) if known and len(known) == len(values) else None


def _sum_known(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None


TEXT = ("method", "label", "family", "task", "crops", "events")


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The documents with their display names, repeated words as categories, numbers as numbers."""
    if frame.empty:
        return frame
    for column in frame.columns:
        if column in ("called", "malformed"):
            frame[column] = frame[column].astype(bool)
        elif column not in (*TEXT, "answer"):
            frame[column] = pd.to_numeric(frame[column])
    method = frame["method"].iloc[0]
    for column, value in (("label", names.label(method)), ("family", names.family(method))):
        if column not in frame:
            frame[column] = value
    for column in TEXT:
        frame[column] = frame[column].astype("category")
    return frame
