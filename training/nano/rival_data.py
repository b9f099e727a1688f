"""Rows from which nano learns the rivals' protocols: VisionThink's calls, CropVLM's boxes; the start that their GRPO needs.

    python -m awares_bench.training.nano.rival_data visionthink --data runs/nano-curate/labels.parquet --out runs/nano-visionthink.parquet
    python -m awares_bench.training.nano.rival_data cropvlm --data nano:4000 --out runs/nano-cropvlm.parquet

``--data`` is a file of rows with ``label`` (visionthink) or ``boxes`` in pixels (cropvlm), or ``nano:COUNT``, whose labels and
boxes are the world's own. The result has ``replies`` and ``answers``, for ``train sft`` and ``train grpo``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from awares_bench.methods.crop_grid import hull

from .. import examples
from ..curation.crop_oracles import checked
from ..curation.pipeline import nano_rows
from ..recipe import RecipeError

CALL = '<tool_call>\n{"name": "resize_image", "arguments": {"action": "resize"}}\n</tool_call>'
"""What ``baselines/visionthink.py`` reads as a call for the original image."""

STEP = 25
"""Percent of a side to whose multiples labelled boxes are widened (ours; the authors enlarge by up to 45 times, as their boxes hold single
words). Crops of nano's pictures are then of whole visual tokens: with tenths they are stretched to such, and with the right box nano read
49 % of 240 held-out documents, with quarters 98."""


def visionthink(row: dict, size: tuple[int, int]) -> list[str]:
    """A call where the label is HR, an answer after it. The thought is the question again: it then stands behind the picture that was
    shown last, where nano's base is used to it."""
    first = row["question"].splitlines()[0]
    thought = f"<think>{first[: first.find('?') + 1] or first}</think>"
    answer = f"{thought}<answer>{examples.answers(row)[0]}</answer>"
    return [thought + CALL, answer] if row["label"] == "HR" else [answer]


def cropvlm(row: dict, size: tuple[int, int]) -> list[str]:
    """The box around the evidence, widened to the next ``STEP`` percent of the sides: ``[x1, y1, x2, y2].`` (the authors' format)."""
    box, (width, height) = hull(checked(row["boxes"], *size)), size
    x1, y1 = (100 * v // side // STEP * STEP for v, side in zip(box[:2], (width, height), strict=True))
    x2, y2 = (-(-100 * v // side // STEP) * STEP for v, side in zip(box[2:], (width, height), strict=True))
    return [f"[{x1}, {y1}, {x2}, {y2}]."]


STYLES = {"visionthink": (visionthink, "label"), "cropvlm": (cropvlm, "boxes")}


def write(style: str, data: str, out: Path, seed: int = 0) -> int:
    """-> how many rows were written. Raises DataError, BoxError, RecipeError; rows without a label or box are left out."""
    reply, needs = STYLES[style]
    if data.startswith("nano:"):
        if not data[5:].isdigit() or not int(data[5:]):
            raise RecipeError(f"data is {data!r}; nano rows are asked for as nano:COUNT, such as nano:4000")
        table = nano_rows(int(data[5:]), seed, labelled=True)
    else:
        table = examples.rows(data, ("image", "question", "answers"))
        if needs not in table.column_names:
            raise examples.DataError(f"{data!r} has no column {needs}; it has: {', '.join(table.column_names)}")
    table = table.filter(lambda value: bool(value), input_columns=[needs])
    replies = [reply(row, examples.pictures(row, 10**9)[0].size) for row in table]
    table = (table.remove_columns("replies") if "replies" in table.column_names else table).add_column("replies", replies)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out)
    return len(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("style", choices=sorted(STYLES))
    parser.add_argument("--data", required=True, help="parquet or JSON-lines file, or nano:COUNT")
    parser.add_argument("--seed", type=int, default=0, help="of nano:COUNT")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"{write(args.style, args.data, args.out, args.seed)} rows in {args.out}")


if __name__ == "__main__":
    main()
