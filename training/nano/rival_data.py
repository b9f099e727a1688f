"""Rows from which nano learns its rivals' protocols before their GRPO: the calls of VisionThink and AdaptVision, the boxes of CropVLM and ERGO.

    awares-bench nano rival-data visionthink --data runs/nano-curate/labels.parquet \
        --out runs/nano-visionthink.parquet
    awares-bench nano rival-data cropvlm --data nano:4000 --out runs/nano-cropvlm.parquet
    awares-bench nano rival-data ergo --data nano:4000 --out runs/nano-ergo.parquet --start runs/nano-base-ergo

``--data`` is a file of rows with ``label`` (visionthink, adaptvision) or ``boxes`` in pixels (the others, and adaptvision), or ``nano:COUNT``: new documents of
the nano world, with its own labels and boxes. The result has ``replies`` and ``answers``, for ``train sft`` and ``train grpo``.

``--start`` writes the checkpoint that AdaptVision's and ERGO's training begins with: nano-base with the sentences of the protocol as tokens of
their own, as those of AwaRes and VisionThink are. Letter by letter a prompt is 700 tokens that nano has never seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken

from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.crop_grid import hull
from awares_bench.methods.registry import method_class
from awares_bench.models.packaged import resolve

from .. import examples, script
from ..curation.crop_oracles import check_boxes
from ..curation.pipeline import asked_nano_rows
from . import model as nano

CALL = '<tool_call>\n{"name": "resize_image", "arguments": {"action": "resize"}}\n</tool_call>'
"""What ``baselines/visionthink.py`` reads as a call for the original image."""

STEP = 25
"""Labelled boxes are widened to multiples of this percentage of a side (ours; the authors' boxes hold single words, and they
enlarge them by up to 45 times). A quarter of a nano picture's side is a whole number of visual tokens, so such crops are not
resampled. With multiples of 10, crops are resampled: given the right box, nano then read 49 % of 240 held-out documents, with
quarters 98 %."""


def visionthink(row: dict, size: tuple[int, int]) -> list[str]:
    """The replies of a row: for label HR a call and then the answer, else the answer.

    The thought repeats the question, because nano-base has learned to answer a question that follows the picture.
    """
    first = row["question"].splitlines()[0]
    thought = f"<think>{first[: first.find('?') + 1] or first}</think>"
    answer = f"{thought}<answer>{examples.answers(row)[0]}</answer>"
    return [thought + CALL, answer] if row["label"] == "HR" else [answer]


def cropvlm(row: dict, size: tuple[int, int]) -> list[str]:
    """The reply of a row: the box around its evidence, widened to multiples of ``STEP``, in the authors' format."""
    x1, y1, x2, y2 = widened(row, size)
    return [f"[{x1}, {y1}, {x2}, {y2}]."]


def widened(row: dict, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box around a row's evidence in percent of the sides, widened to multiples of ``STEP``."""
    box, (width, height) = hull(check_boxes(row["boxes"], *size)), size
    x1, y1 = (100 * v // side // STEP * STEP for v, side in zip(box[:2], (width, height), strict=True))
    x2, y2 = (-(-100 * v // side // STEP) * STEP for v, side in zip(box[2:], (width, height), strict=True))
    return x1, y1, x2, y2


def in_view(row: dict, size: tuple[int, int], view: tuple[int, int]) -> list[int]:
    """``widened`` in pixels of a view."""
    return [percent * side // 100 for percent, side in zip(widened(row, size), view * 2, strict=True)]


def adaptvision(row: dict, size: tuple[int, int]) -> list[str]:
    """The replies of a row: for label HR a call for the box around its evidence and then the answer, else the answer."""
    direct = visionthink(row | {"label": "LR"}, size)[0]
    if row["label"] != "HR":
        return [direct]
    policy: Any = method_class("adaptvision")()
    view = policy.view(Image.new("RGB", size)).size
    call = {"name": "request_local_region", "arguments": {"bbox_2d": in_view(row, size, view)}}
    thought = direct.partition("<answer>")[0]
    return [f"{thought}<tool_call>\n{json.dumps(call)}\n</tool_call>", direct]


ERGO_CAP = 16
"""Tokens of ERGO's view on nano: a quarter of a nano picture."""


def ergo(row: dict, size: tuple[int, int]) -> list[str]:
    """The replies of a row: the box around its evidence, and then the answer."""
    direct = visionthink(row | {"label": "LR"}, size)[0]
    policy: Any = method_class("ergo")
    view = policy(cap=ERGO_CAP).shown(Image.new("RGB", size), Image.Resampling.BICUBIC).size
    return [f"{direct.partition('<answer>')[0]}<zoom>{in_view(row, size, view)}</zoom>", direct]


STARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adaptvision": ('<tool_call>\n{"name": "request_local_region", "arguments": {"bbox_2d": [', "]}}\n</tool_call>", {}),
    "ergo": ("<zoom>[", "]</zoom>", {"cap": ERGO_CAP}),
}
"""Protocol -> how a call begins and ends around its box, and the options of the policy."""


def write_start(style: str, out: Path) -> int:
    """nano-base with the sentences of a protocol as tokens, whose embeddings nobody has trained -> the number of tokens added."""
    begin, end, options = STARTS[style]
    host = LocalModel.load(resolve("nano-base"), "float32", "cpu").host
    phrases = nano.said_by(style, [f"<think></think>{begin}0, 0, 28, 28{end}", ""], **options)
    added = host.tokenizer.add_tokens([AddedToken(p, normalized=False, special=False) for p in [*phrases, begin, end]])
    rows = host.model.get_input_embeddings().num_embeddings
    if len(host.tokenizer) > rows:
        host.model.resize_token_embeddings(len(host.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    nano.save(host.model, host.processor, out)
    return added


STYLES = {
    "visionthink": (visionthink, ("label",)),
    "cropvlm": (cropvlm, ("boxes",)),
    "adaptvision": (adaptvision, ("label", "boxes")),
    "ergo": (ergo, ("boxes",)),
}


def write(style: str, data: str, out: Path, seed: int = 0) -> int:
    """Write the rows of ``data`` with the replies of a style, leaving out rows without a label or box -> the number written.

    Raises DataError, BoxError, RecipeError.
    """
    reply, needs = STYLES[style]
    if data.startswith("nano:"):
        table = asked_nano_rows(data, seed, labelled=True)
    else:
        table = examples.rows(data, ("image", "question", "answers"))
        for column in needs:
            if column not in table.column_names:
                raise examples.DataError(f"{data!r} has no column {column}; it has: {', '.join(table.column_names)}")
    for column in needs:
        table = table.filter(lambda value: bool(value), input_columns=[column])
    replies = [reply(row, examples.pictures(row, 10**9)[0].size) for row in table]
    table = (table.remove_columns("replies") if "replies" in table.column_names else table).add_column("replies", replies)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out)
    return len(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("style", choices=sorted(STYLES))
    parser.add_argument("--data", required=True, help="parquet or JSON-lines file, or nano:COUNT")
    parser.add_argument("--seed", type=int, default=0, help="of nano:COUNT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="adaptvision, ergo: also write nano-base with the protocol's sentences as tokens"
    )


def main(args: argparse.Namespace) -> int:
    if args.start:
        if args.style not in STARTS:
            raise examples.DataError(
                f"--start is for {' and '.join(STARTS)}; the sentences of {args.style} are tokens of nano's own"
            )
        print(f"{write_start(args.style, args.start)} tokens added in {args.start}")
    print(f"{write(args.style, args.data, args.out, args.seed)} rows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(script.run(__doc__, add_arguments, main))
