"""Compact records of a sweep, small enough to commit: ``columns.csv.xz``, where each line is one column of the table of documents (its
name, then a value for each document), and ``runs.json`` with what was run. By columns the table takes two thirds of the bytes.

They hold every number that tables and figures need and neither texts nor images, so the gallery needs the run folders.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from . import flops
from .load import ReportError, Run, typed

RUNS, DOCUMENTS = "runs.json", "columns.csv.xz"
OLDER = ("documents.csv.xz", "documents.csv.gz")
"""What was written before, a row per document, and is read too."""
VERSION = 1


def write(runs: list[Run], folder: Path) -> None:
    """Runs -> ``folder/runs.json`` and ``folder/columns.csv.xz``; the same runs give the same bytes.

    Seconds are rounded to microseconds. Sums over phases, and RTR where it is prefill over full tokens, are taken again on reading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {r.name: portable({**r.about, "model_config": flops.shapes(r.about)}) for r in runs}
    (folder / RUNS).write_text(json.dumps({"version": VERSION, "runs": about}, indent=0, sort_keys=True) + "\n")
    frames = []
    for run in runs:
        frame = run.documents.drop(columns=["label", "family", "seconds", "later_seconds", "answer"])
        if (frame["rtr"].fillna(-1) == _ratio(frame).fillna(-1)).all():
            frame = frame.drop(columns="rtr")
        seconds = [c for c in frame.columns if c.endswith("_seconds")]
        frames.append(frame.assign(**{c: frame[c].round(6) for c in seconds}).sort_values(["task", "doc_id"]))
    table = pd.concat(frames, ignore_index=True)
    kept_late = ("content", "answer_logprob")  # of records that did not keep them
    unknown = [c for c in table.columns if c in kept_late and table[c].isna().all()]
    if "answer_logprob" in table:
        table["answer_logprob"] = table["answer_logprob"].astype(float).round(6)
    table = table.drop(columns=unknown)
    for column in table.select_dtypes("float").columns:
        if (table[column].dropna() % 1 == 0).all():
            table[column] = table[column].astype("Int64")
    with lzma.open(folder / DOCUMENTS, "wt", preset=9 | lzma.PRESET_EXTREME, encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        for name in table.columns:  # one at a time: the words of all of them would take half a gigabyte for 240,000 documents
            lines.writerow(
                [cells[0] for cells in csv.reader(io.StringIO(table[[name]].to_csv(index=False, lineterminator="\n")))]
            )
    for name in OLDER:  # of a release before, and not of these runs
        (folder / name).unlink(missing_ok=True)


def read(folder: Path) -> list[Run]:
    """What ``write`` wrote -> runs, their ``documents`` with the columns of ``load`` but without answers."""
    index = json.loads((folder / RUNS).read_text())
    if index.get("version") != VERSION:
        raise ReportError(f"{folder / RUNS} is of version {index.get('version')}; this release reads version {VERSION}")
    name = next((n for n in (DOCUMENTS, *OLDER) if (folder / n).exists()), None)
    if name is None:
        raise ReportError(f"{folder} holds {RUNS} but no {DOCUMENTS}")
    try:
        with (gzip.open if name.endswith(".gz") else lzma.open)(folder / name, "rt", encoding="utf-8", newline="") as file:
            table = _by_columns(file) if name == DOCUMENTS else _parsed(file, file.readline().rstrip("\n").split(","))
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise ReportError(
            f"{folder / name} is damaged ({error}); write it again: awares-bench report RUNS --records {folder}"
        ) from error
    astray = set(index["runs"]) ^ set(table["method"])
    if astray:
        raise ReportError(f"{folder}: {RUNS} and {DOCUMENTS} do not name the same runs: {', '.join(sorted(astray))}")
    return [Run(name, index["runs"][name], _complete(part), folder, {}) for name, part in table.groupby("method", sort=False)]


def _by_columns(file: TextIO) -> pd.DataFrame:
    """A table from lines of which each is a column."""
    columns = []
    for name, *cells in csv.reader(file):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([c] for c in cells)
        text.seek(0)
        columns.append(_parsed(text, [name]))
    if len({len(c) for c in columns}) != 1:
        raise ValueError("its columns are not of one length")
    return pd.concat(columns, axis="columns")


def _parsed(file: TextIO, names: list[str]) -> pd.DataFrame:
    """A CSV whose header was read: what is empty is missing, except in columns of words."""
    words = dict.fromkeys(("method", "task", "crops", "events"), str)
    missing = {c: [""] for c in names if c not in words}
    options: dict[str, Any] = {"keep_default_na": False, "na_values": missing, "skip_blank_lines": False}
    return pd.read_csv(file, header=None, names=names, dtype={c: t for c, t in words.items() if c in names}, **options)


def _complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Put back what follows from the rest: rtr, the sums over phases, zero where no turn came later."""
    frame = frame.reset_index(drop=True).dropna(axis="columns", how="all").copy()
    for key in ("encoded", "prefill", "text", "output", "turns", "full_tokens", "batch_size", "content", "answer_logprob"):
        frame[key] = frame.get(key)
    frame["answer"] = None
    phases = [c for c in frame.columns if c.endswith("_seconds") and not c.startswith("later_")]
    single = frame["turns"].eq(1)
    for key in ("encoded", "prefill", "text", "output", *phases):
        later = frame.get(f"later_{key}", pd.Series(float("nan"), frame.index))
        frame[f"later_{key}"] = later.mask(single & frame[key].notna(), 0)
    frame["seconds"] = frame[phases].sum(axis=1, min_count=len(phases)) if phases else None
    frame["later_seconds"] = frame[[f"later_{p}" for p in phases]].sum(axis=1, min_count=len(phases)) if phases else None
    frame["rtr"] = frame["rtr"] if "rtr" in frame else _ratio(frame)
    return typed(frame)


def _ratio(frame: pd.DataFrame) -> pd.Series:
    """Prefill tokens over full-resolution tokens; NaN where either is unknown."""
    return pd.to_numeric(frame["prefill"]) / pd.to_numeric(frame["full_tokens"]).mask(lambda n: n == 0)


def portable(value):
    """Provenance without the folders of the machine it was made on: ``/a/b/c`` -> ``…/c``."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    return re.sub(r"(?<![\w.…])/(?:[^/\s,='\"]+/)+", "…/", value) if isinstance(value, str) else value
