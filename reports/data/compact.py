"""Compact records of a sweep, small enough to commit: ``documents.csv.xz`` with a row per document, ``runs.json`` with what was run.

They hold every number that tables and figures need and neither texts nor images, so the gallery needs the run folders.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path

import pandas as pd

from . import flops
from .load import ReportError, Run, typed

RUNS, DOCUMENTS = "runs.json", "documents.csv.xz"
OLDER = "documents.csv.gz"
"""What was written before, and is read too."""
VERSION = 1


def write(runs: list[Run], folder: Path) -> None:
    """Runs -> ``folder/runs.json`` and ``folder/documents.csv.xz``; the same runs give the same bytes.

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
    text = table.to_csv(index=False, lineterminator="\n").encode()
    (folder / DOCUMENTS).write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def read(folder: Path) -> list[Run]:
    """What ``write`` wrote -> runs, their ``documents`` with the columns of ``load`` but without answers."""
    index = json.loads((folder / RUNS).read_text())
    if index.get("version") != VERSION:
        raise ReportError(f"{folder / RUNS} is of version {index.get('version')}; this release reads version {VERSION}")
    older = (folder / OLDER).exists() and not (folder / DOCUMENTS).exists()
    name, unpacked = (OLDER, gzip.open) if older else (DOCUMENTS, lzma.open)
    try:
        with unpacked(folder / name, "rt", encoding="utf-8") as file:
            header = file.readline().rstrip("\n").split(",")
            file.seek(0)
            words = dict.fromkeys(("method", "task", "crops", "events"), str)
            missing = {c: [""] for c in header if c not in words}
            table = pd.read_csv(file, keep_default_na=False, na_values=missing, dtype=words)
    except FileNotFoundError:
        raise ReportError(f"{folder} holds {RUNS} but no {DOCUMENTS}") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, pd.errors.ParserError) as error:
        raise ReportError(
            f"{folder / name} is damaged ({error}); write it again: awares-bench report RUNS --records {folder}"
        ) from error
    astray = set(index["runs"]) ^ set(table["method"])
    if astray:
        raise ReportError(f"{folder}: {RUNS} and {DOCUMENTS} do not name the same runs: {', '.join(sorted(astray))}")
    return [Run(name, index["runs"][name], _complete(part), folder, {}) for name, part in table.groupby("method", sort=False)]


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
