"""Writes the nano suite as parquet in the schemas of the six official datasets, with its task files beside it."""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from .world import FAMILIES, SEEDS, Document, document

STRIDE = 1_000_000
"""Suite S holds the document seeds from ``SEEDS["suite"].start + S * STRIDE``; the shipped suite is number 0."""

DOCUMENTS = 200


def suite_seeds(suite: int, documents: int) -> range:
    """The document seeds of a suite. Raises ValueError where suites would overlap."""
    if not 0 < documents <= STRIDE:
        raise ValueError(f"documents is {documents}; allowed: 1 to {STRIDE:,}")
    start = SEEDS["suite"].start + suite * STRIDE
    if suite < 0 or start + documents > SEEDS["suite"].stop:
        raise ValueError(f"seed is {suite}; allowed: 0 to {(len(SEEDS['suite']) // STRIDE) - 1:,}")
    return range(start, start + documents)


def row(d: Document, index: int) -> dict:
    """A document in its official dataset's columns, plus ``evidence``, ``low_is_enough`` and ``seed``.

    The shipped suite is these rows with the same pixels packed once more (quality 100, method 6: a twentieth smaller, 30 times slower).
    """
    encoded = io.BytesIO()
    d.image.save(encoded, "WEBP", lossless=True, quality=50, method=2)
    image, name = {"bytes": encoded.getvalue(), "path": None}, f"{d.family}-{d.seed}"
    options = " ".join(f"({letter}) {option}" for letter, option in zip("ABCD", d.options, strict=False))
    official: Any = {
        "chart": {"type": ("human_test", "augmented_test")[index % 2], "question": d.question, "answer": d.answer},
        "doc": {
            "questionId": str(index),
            "question": d.question,
            "question_types": ["form"],
            "docId": index,
            "answers": [d.answer],
            "data_split": "val",
        },
        "ocr": {
            "dataset": "nano",
            "question": d.question,
            "question_type": "Regular Text Recognition",
            "answer": [d.answer],
        },
        "pope": {
            "id": str(index),
            "question_id": str(index),
            "question": d.question,
            "answer": d.answer,
            "image_source": name,
            "category": "nano",
        },
        "real": {"question": d.question, "answer": d.answer, "image_path": f"{name}.webp"},
        "vstar": {
            "text": f"{d.question} {options}",
            "category": "direct_attributes",
            "label": d.answer,
            "question_id": str(index),
        },
    }[d.family]
    extra = {"evidence": [list(box) for box in d.evidence], "low_is_enough": d.low_is_enough, "seed": d.seed}
    return {"image": image, **official, **extra}


def write(out: Path, suite: int, documents: int, progress: Callable = iter) -> None:
    """Write ``documents`` per task and the task files to ``out``, a folder that lmms-eval's ``--include_path`` takes."""
    from datasets import Dataset, Image

    out.mkdir(parents=True, exist_ok=True)
    seeds = suite_seeds(suite, documents)
    for family in progress(FAMILIES):
        rows = [row(document(family, seed), i) for i, seed in enumerate(seeds)]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(out / f"nano_{family}.parquet")
    for source in files("awares_bench.tasks.nano").iterdir():
        if source.name.startswith(("nano_", "awares_nano")) and source.name.endswith(".yaml"):
            target = out / source.name
            if not (target.exists() and target.samefile(str(source))):
                shutil.copyfile(str(source), target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, required=True, help="suite number; 0 is the shipped suite")
    parser.add_argument("--documents", type=int, default=200, help="documents per task")
    parser.add_argument("--out", type=Path, required=True)


def main(args: argparse.Namespace) -> int:
    """``awares-bench nano-data``."""
    from tqdm import tqdm

    write(args.out, args.seed, args.documents, tqdm)
    print(f"{args.documents} documents per task in {args.out}; try: awares-bench demo --suite {args.out}")
    return 0
