"""Small tables in a terminal: what a run cost, task by task, and the alignment that other tables share."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

from .records import Record, read_records

COLUMNS = ("task", "documents", "RTR", "calls", "malformed", "visual tokens", "ms per document")


def of_run(folder: Path, tasks: Collection[str], keys: Collection[tuple[str, int, str]] | None = None) -> str:
    """The table of a run folder: one line a task, and where the records are.

    tasks: those of this call. keys: (task, doc_id, question) of its documents; None: every document of these tasks in the
    folder, for a call that several processes share.
    """
    records = (r for r in read_records(folder) if r.task in tasks)
    return table(r for r in records if keys is None or (r.task, r.doc_id, r.question) in keys) + f"\nrecords: {folder}"


def table(records: Iterable[Record]) -> str:
    """Records -> means over the documents of each task, aligned; a value that no document has is a dash.

    calls: share of the documents that asked for crops, well-formed or not. malformed: number of calls that the grammar does not
    allow. Documents that could not be answered are counted apart and are in no mean.
    """
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    failed = any(r.error is not None for group in by_task.values() for r in group)
    rows = [[*COLUMNS, *(["failed"] if failed else [])]]
    for task in sorted(by_task):
        answered = [r for r in by_task[task] if r.error is None]
        malformed = [r.malformed_call is not None for r in answered]
        called = [bool(r.crops) or bad for r, bad in zip(answered, malformed, strict=True)]
        row = [
            task,
            str(len(answered)),
            _mean([r.rtr for r in answered], "{:.3f}"),
            _mean([100 * c for c in called], "{:.0f} %"),
            str(sum(malformed)),
            _mean([_tokens(r) for r in answered], "{:.1f}"),
            _mean([_milliseconds(r) for r in answered], "{:.1f}"),
        ]
        rows.append([*row, *([str(len(by_task[task]) - len(answered))] if failed else [])])
    return aligned(rows)


def aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Rows of words -> lines with columns under one another; the columns ``left`` begin, the others end, in one line."""
    widths = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, wide) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (wide - width(cell))
            cells.append(cell + gap if i in left else gap + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _tokens(record: Record) -> float | None:
    return sum(u["prefill"] for u in record.usage) if record.usage else None


def _milliseconds(record: Record) -> float | None:
    if not record.usage:
        return None
    return 1000 * sum(v for u in record.usage for k, v in u.items() if k.endswith("_seconds") and v is not None)


def _mean(values: list[float | None], form: str) -> str:
    known = [v for v in values if v is not None]
    return form.format(sum(known) / len(known)) if known else "-"
