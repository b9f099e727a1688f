"""Rows of questions and trajectories: parquet or JSON lines through ``datasets``, checked before any model is loaded.

Columns   image (or images): bytes, path or PIL image
          question: as the task words it for the model
          replies: what the model should say, turn by turn (SFT)
          answers: the accepted answers (GRPO, curation)
          label: ``LR``, ``HR`` or null; crops: names of the oracle's regions; boxes: evidence in pixels (all optional)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image as Picture

from awares_bench.errors import AwaresError
from awares_bench.methods.conversation import Sample
from awares_bench.methods.images import as_rgb


class DataError(AwaresError, ValueError):
    """Rows that cannot be trained on. Its text says which rows, and what they lack."""


def rows(data: str, needs: tuple[str, ...], columns: dict[str, str] | None = None, split: str = "train"):
    """A file, a folder of parquet files or a hub name -> a ``datasets.Dataset`` whose images are not decoded yet.

    needs: columns that must exist and hold a value in every row. columns: our name of a column -> the dataset's.
    Raises DataError: no such file, no rows, a column is missing, or rows lack a value (the first of them are named).
    """
    from datasets import Dataset, Image, Sequence, load_dataset
    from datasets.exceptions import DatasetGenerationError

    # 1) Open: a file or a folder here, else a dataset of the hub.
    path = Path(data).expanduser()
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    if path.suffix in kinds or data.startswith((".", "/", "~")):
        if not path.exists():
            raise DataError(f"no data at {data!r}; pass a parquet or JSON-lines file, a folder of parquet files, or a hub name")
        files = sorted(str(p) for p in path.glob("*.parquet")) if path.is_dir() else [str(path)]
        if not files or path.suffix not in (*kinds, ""):
            raise DataError(f"{data!r} holds no rows this reads; allowed: .parquet, .jsonl, or a folder of .parquet files")
        try:
            table: Dataset = load_dataset(kinds.get(path.suffix, "parquet"), data_files=files, split="train")
        except DatasetGenerationError as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise DataError(f"{data!r} has no rows, or rows that cannot be read: {cause}") from error
    else:
        table = load_dataset(data, split=split)

    # 2) Give the columns our names.
    for ours, theirs in (columns or {}).items():
        if theirs not in table.column_names:
            raise DataError(f"{data!r} has no column {theirs!r} (for {ours}); it has: {', '.join(table.column_names)}")
        if ours != theirs:
            table = (table.remove_columns(ours) if ours in table.column_names else table).rename_column(theirs, ours)
    if "answers" in needs and "answers" not in table.column_names and "answer" in table.column_names:
        table = table.rename_column("answer", "answers")

    # 3) Check that the columns are there; images are decoded when a row is used.
    if not len(table):
        raise DataError(f"{data!r} has no rows")
    pictures = next((c for c in ("image", "images") if c in table.column_names), None)
    missing = [n for n in needs if n not in table.column_names and not (n == "image" and pictures)]
    if missing:
        raise DataError(f"{data!r} has no column {', '.join(missing)}; it has: {', '.join(table.column_names)}")
    if pictures:
        encoded = Image(decode=False)
        table = _resolve_paths(table, pictures, path.parent)
        table = table.cast_column(pictures, encoded if pictures == "image" else Sequence(encoded))

    # 4) Check that every row has a value.
    for name in needs:
        column = pictures if name == "image" and pictures else name
        if column == pictures:  # the column's null bits, so that no picture is read
            empty = [i for i, is_null in enumerate(table.data.column(column).is_null().to_pylist()) if is_null]
        else:
            empty = [i for i, value in enumerate(table[column]) if value is None or value == [] or value == ""]
        if empty:
            raise DataError(
                f"{data!r}: {len(empty)} of {len(table)} rows have no {column}, the first at {empty[:5]}; fill or drop them"
            )
    return table


def _resolve_paths(table, column: str, root: Path):
    """Picture paths as strings are relative to the folder of their file."""
    first = table[0][column]
    first = first[0] if isinstance(first, list) and first else first
    if not isinstance(first, str):
        return table

    def resolve(value):
        if isinstance(value, list):
            return [resolve(v) for v in value]
        if not value or "://" in value or value.startswith("data:"):  # empty, or a URL
            return value or None
        return str(root / value)

    return table.map(lambda row: {column: resolve(row[column])}, desc="image paths")


def pictures(row: dict, largest_side: int, index: int | None = None) -> tuple[Picture.Image, ...]:
    """The images of a row, RGB and upright, none longer than ``largest_side`` pixels. Raises DataError that names the row."""
    encoded = row.get("images")
    out = []
    for item in [row.get("image")] if encoded is None else encoded:
        try:
            image, _ = as_rgb(item)
        except OSError as error:
            raise DataError(f"row {row.get('id', '?' if index is None else index)}: the image cannot be read: {error}") from error
        if max(image.size) > largest_side:
            image = image.copy()
            image.thumbnail((largest_side, largest_side), Picture.Resampling.LANCZOS)
        out.append(image)
    return tuple(out)


def sample(row: dict, index: int, largest_side: int) -> Sample:
    """A row as evaluation's sample; its key is the row's ``id``, else ``index``. Raises DataError as ``pictures`` does."""
    return Sample(pictures(row, largest_side, index), row["question"], str(row.get("id", index)))


def check_texts(table, check: Callable[[str, str], None], data: str) -> None:
    """Check every question and reply before training begins.

    check: takes a text and what it is, and raises ValueError for text that the model would read as the place of a picture, or
    cannot read. Raises DataError, which names the first such row.
    """
    for column in ("question", "replies"):
        for index, value in enumerate(table[column]) if column in table.column_names else ():
            for text in value if isinstance(value, (list, tuple)) else [value]:
                try:
                    check(str(text), "the question" if column == "question" else "the reply")
                except ValueError as error:
                    raise DataError(f"{data!r}, row {index}: {error}") from error


def answers(row: dict) -> tuple[str, ...]:
    """The accepted answers of a row, from its column ``answers`` or ``answer``; one or several."""
    value = row.get("answers") if row.get("answers") is not None else row.get("answer")
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
