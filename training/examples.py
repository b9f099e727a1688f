"""Rows of questions and trajectories: parquet or JSON lines through ``datasets``, checked before any model is loaded.

Columns   image (or images): bytes, path or PIL; question: as the task words it for the model
          replies: what the model should say, turn by turn (SFT); answers: accepted answers (GRPO, curation)
          label: ``LR``, ``HR`` or null; crops: names of the oracle's regions; boxes: evidence in pixels (all optional)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image as Picture

from awares_bench.methods.conversation import Sample
from awares_bench.methods.images import as_rgb


class DataError(ValueError):
    """Rows that cannot be trained on: which, and what they lack."""


def rows(data: str, needs: tuple[str, ...], columns: dict[str, str] | None = None, split: str = "train"):
    """A file, a folder of parquet files or a hub name -> a ``datasets.Dataset`` whose images are not decoded yet.

    needs: columns that must be there and filled in every row. columns: our name -> the dataset's.
    Raises DataError: no such file, no rows, a column is missing, or rows lack a value (the first ones are named).
    """
    from datasets import Dataset, Image, Sequence, load_dataset
    from datasets.exceptions import DatasetGenerationError

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
    for ours, theirs in (columns or {}).items():
        if theirs not in table.column_names:
            raise DataError(f"{data!r} has no column {theirs!r} (for {ours}); it has: {', '.join(table.column_names)}")
        if ours != theirs:
            table = (table.remove_columns(ours) if ours in table.column_names else table).rename_column(theirs, ours)
    if "answers" in needs and "answers" not in table.column_names and "answer" in table.column_names:
        table = table.rename_column("answer", "answers")
    if not len(table):
        raise DataError(f"{data!r} has no rows")
    pictures = next((c for c in ("image", "images") if c in table.column_names), None)
    missing = [n for n in needs if n not in table.column_names and not (n == "image" and pictures)]
    if missing:
        raise DataError(f"{data!r} has no column {', '.join(missing)}; it has: {', '.join(table.column_names)}")
    if pictures:
        one = Image(decode=False)
        table = _rooted(table, pictures, path.parent).cast_column(pictures, one if pictures == "image" else Sequence(one))
    for name in needs:
        name = pictures if name == "image" else name
        if name == pictures:  # without reading the pictures themselves
            bad = [i for i, null in enumerate(table.data.column(name).is_null().to_pylist()) if null]
        else:
            bad = [i for i, value in enumerate(table[name]) if value is None or value == [] or value == ""]
        if bad:
            raise DataError(
                f"{data!r}: {len(bad)} of {len(table)} rows have no {name}, the first at {bad[:5]}; fill or drop them"
            )
    return table


def _rooted(table, column: str, root: Path):
    """Relative picture paths of a JSON-lines file are relative to the file."""
    first = table[0][column]
    first = first[0] if isinstance(first, list) and first else first
    if not isinstance(first, str):
        return table

    def fix(value):
        if isinstance(value, list):
            return [fix(v) for v in value]
        if not value or "://" in value or value.startswith("data:"):  # nothing, or an address
            return value or None
        return str(root / value)

    return table.map(lambda row: {column: fix(row[column])}, desc="image paths")


def pictures(row: dict, largest_side: int, index: int | None = None) -> tuple[Picture.Image, ...]:
    """The images of a row, RGB and upright, none longer than ``largest_side`` pixels. Raises DataError that names the row."""
    stored = row.get("images") if row.get("images") is not None else [row.get("image")]
    out = []
    for item in stored:
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
    return Sample(pictures(row, largest_side, index), row["question"], str(row.get("id", index)))


def check_texts(table, check: Callable[[str, str], None], data: str) -> None:
    """Every question and reply of the rows, before training begins. check: (text, what it is) raises ValueError.

    Raises DataError that names the first row with a text that the model would read as the place of a picture, or not at all.
    """
    for column in ("question", "replies"):
        for index, value in enumerate(table[column]) if column in table.column_names else ():
            for text in value if isinstance(value, (list, tuple)) else [value]:
                try:
                    check(str(text), "the question" if column == "question" else "the reply")
                except ValueError as error:
                    raise DataError(f"{data!r}, row {index}: {error}") from error


def answers(row: dict) -> tuple[str, ...]:
    """Accepted answers of a row: the column ``answers`` or ``answer``, one or several."""
    value = row.get("answers") if row.get("answers") is not None else row.get("answer")
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
