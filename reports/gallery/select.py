"""Chooses the documents of a gallery and gathers what it shows: texts from the records, pictures from the task's data."""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

import pandas as pd
from PIL import Image

from awares_bench.evaluation.records import read_records
from awares_bench.methods.options import unknown_option

from ..data import discover
from ..data.load import ReportError, Run, samples_lines
from . import markup

SHOWN = ("question", "replies", "usage", "events", "image_sizes", "models", "boxes", "keep_masks")

ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Compare,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple,
)  # fmt: skip


def write(
    run: str | Run,
    out: Path,
    where: str | None = None,
    compare: str | Run | None = None,
    images: Path | None = None,
    count: int = 60,
    metrics: dict[str, str] | None = None,
    choose: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
) -> int:
    """A run (see ``discover.runs``) -> ``out``, one HTML file; returns how many documents it shows.

    where: expression over the columns of ``load.load`` plus ``correct`` (score above 0.5), and with ``compare`` the other run's
    under ``other_…``. images: folder of TASK.parquet files, when the task's own data is not at hand. count: documents at the most.
    choose: picks the rows instead of the first ``count`` of each task in turn.
    """
    if count < 1:
        raise ReportError(f"--count is {count}; it must be at least 1")
    # The rows to choose from: the run's documents, with a second run's beside them, and of two runs those on which they differ.
    first, second = _one(run, metrics), _one(compare, metrics) if compare else None
    frame = _plain(first.documents)
    if second:
        other = _plain(second.documents).add_prefix("other_")
        frame = frame.merge(other, left_on=["task", "doc_id"], right_on=["other_task", "other_doc_id"])
        if frame.empty:
            raise ReportError(f"{first.name} and {second.name} share no document")
    candidates = select(frame, where)
    if second and not where:
        candidates = candidates[candidates["correct"] != candidates["other_correct"]]
    if candidates.empty:
        raise ReportError(
            f"no document of {first.name} is left{f' where {where}' if where else ': both runs are right and wrong on the same ones'}"
        )
    in_turn = candidates.assign(turn=candidates.groupby("task").cumcount()).sort_values("turn", kind="stable")
    rows = choose(candidates) if choose else in_turn.head(count)
    # A card each: texts from the records, the picture from the task's data.
    keys = set(zip(rows["task"], rows["doc_id"], strict=True))
    texts = [_texts(r, keys) for r in (first, second) if r]
    picture = pictures(first, images)
    cards = []
    for row in rows.to_dict("records"):
        key = row["task"], row["doc_id"]
        image = picture(*key, texts[0][key]["question"])
        sides = [markup.Side(_shown(first), row, texts[0][key])]
        if second:
            theirs = {k.removeprefix("other_"): v for k, v in row.items() if k.startswith("other_")}
            sides.append(markup.Side(_shown(second), theirs, texts[1][key]))
        cards.append(markup.card(image, sides))
    title = f"{_shown(first)}{f' beside {_shown(second)}' if second else ''}: {len(rows)} of {len(candidates)} documents{f' where {where}' if where else ''}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markup.page(cards, title), encoding="utf-8")
    return len(rows)


def select(frame: pd.DataFrame, where: str | None) -> pd.DataFrame:
    """The rows that an expression holds for: comparisons of columns and constants, joined with and, or, not, in; nothing is called.

    Raises ReportError for anything else and for unknown columns.
    """
    if where is None:
        return frame
    try:
        tree = ast.parse(where, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ReportError(
            f"--where {where!r} is not an expression ({error}); example: task=='nano_doc' and not correct"
        ) from None
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise ReportError(
                f"--where {where!r}: {type(node).__name__} is not allowed; compare columns with constants, join with and, or, not, in"
            )
        if isinstance(node, ast.Name) and node.id not in frame.columns:
            raise ReportError(f"--where: {unknown_option(node.id, list(frame.columns))}")
    try:
        matches = frame.eval(where, engine="python")
    except (TypeError, ValueError, NotImplementedError, AttributeError, ZeroDivisionError) as error:
        raise ReportError(f"--where {where!r} cannot be evaluated: {error}") from error
    if not isinstance(matches, pd.Series) or matches.dtype != bool:
        raise ReportError(f"--where {where!r} is not true or false for each document")
    return frame[matches]


def _one(path: str | Run, metrics: dict[str, str] | None) -> Run:
    run = path if isinstance(path, Run) else discover.one(path, metrics)
    if run.folder is None or not run.samples:
        raise ReportError(f"{run.name if isinstance(path, Run) else path}: compact records hold no texts; show a run folder")
    return run


def _shown(run: Run) -> str:
    """A run's name, with its name in print where that is another."""
    label = str(run.documents["label"].iloc[0])
    return run.name if label == run.name else f"{label} ({run.name})"


def _plain(documents: pd.DataFrame) -> pd.DataFrame:
    """Words as words, so that expressions compare them; ``correct`` added."""
    words = {c: str for c in ("method", "label", "family", "task", "crops", "events")}
    return documents.astype(words).assign(correct=documents["score"] > 0.5)


def _texts(run: Run, keys: set[tuple[str, int]]) -> dict[tuple[str, int], dict]:
    """(task, doc_id) -> question, replies, usage per turn, image sizes, events and the task's target."""
    out: dict[tuple[str, int], dict] = {}
    for task, path in run.samples.items():
        for sample in samples_lines(path):
            key = task, sample["doc_id"]
            if key in keys:
                telemetry = next(iter(sample.get("token_counts") or []), None) or {}
                reply = sample.get("filtered_resps")
                out[key] = {"question": str(sample.get("input", "")), "target": sample.get("target"), "image_sizes": None}
                out[key] |= {"usage": telemetry.get("usage") or [], "events": telemetry.get("events") or []}
                out[key] |= {"replies": telemetry.get("replies") or [reply if isinstance(reply, str) else json.dumps(reply)]}
    if run.folder and (run.folder / "run.json").exists():
        for r in read_records(run.folder):
            if (r.task, r.doc_id) in out and r.error is None:
                out[r.task, r.doc_id] |= {k: v for k, v in vars(r).items() if k in SHOWN}
    return out


def pictures(run: Run, folder: Path | None = None) -> Callable[[str, int, str], Image.Image]:
    """(task, doc_id, question) -> the document's picture, from ``folder/TASK.parquet``, the run's own data files, or the hub's cache."""
    datasets = (run.about.get("evaluation") or {}).get("datasets") or {}

    @cache
    def rows(task: str):
        dataset = datasets.get(task, {})
        data_file = ((dataset.get("dataset_kwargs") or {}).get("data_files") or {}).get(dataset.get("test_split"))
        bundled = Path(str(files("awares_bench.tasks.nano") / f"{task}.parquet"))
        paths = [folder / f"{task}.parquet"] if folder else [Path(str(data_file)), bundled]
        path = next((p for p in paths if p.is_file()), None)
        if path:
            return pd.read_parquet(path)
        if folder or not dataset.get("dataset_path") or dataset["dataset_path"] == "parquet":
            raise ReportError(
                f"the pictures of {task} are not at hand ({paths[0]}); pass --images FOLDER with {task}.parquet in it"
            )
        from datasets import load_dataset

        try:
            return load_dataset(dataset["dataset_path"], dataset.get("dataset_name"), split=dataset.get("test_split"))
        except (OSError, ValueError) as error:
            raise ReportError(
                f"the pictures of {task} cannot be loaded ({error}); pass --images FOLDER with {task}.parquet in it"
            ) from error

    def picture(task: str, doc_id: int, question: str) -> Image.Image:
        table = rows(task)
        if doc_id >= len(table):
            raise ReportError(f"{task} has no document {doc_id}: these pictures are of another suite; pass --images FOLDER")
        document = table.iloc[doc_id] if isinstance(table, pd.DataFrame) else table[doc_id]
        question_here = document.get("question") or document.get("text") or ""
        if _words(str(question_here))[:60] not in _words(question):
            raise ReportError(
                f"{task} document {doc_id} asks {question_here!r}, the run was asked {question!r}: another suite; pass --images FOLDER"
            )
        image = document["image"]
        return (image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image["bytes"]))).convert("RGB")

    return picture


def _words(text: str) -> str:
    """The words alone: tasks set options and line breaks in their own way."""
    return " ".join(re.findall(r"\w+", text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder, OUT/runs/NAME")
    parser.add_argument("--where", metavar="EXPR", help="such as \"task=='nano_doc' and not correct\"")
    parser.add_argument(
        "--compare", metavar="RUN2", help="a second run beside it; without --where, the documents on which they differ"
    )
    parser.add_argument("--count", type=int, default=60, help="documents at the most, tasks in turn (default: 60)")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder with TASK.parquet, when the task's own data is not at hand"
    )
    parser.add_argument("--out", type=Path, default=Path("gallery.html"))


def main(args: argparse.Namespace) -> int:
    """``awares-bench show``."""
    count = write(args.run, args.out, args.where, args.compare, args.images, args.count)
    print(f"{count} documents in {args.out}")
    return 0
