"""Which crops a question needs: from evidence boxes, or by trying the crops on the model itself."""

from __future__ import annotations

import ast
from dataclasses import replace
from itertools import combinations

from PIL import Image

from awares_bench.errors import AwaresError
from awares_bench.inference.local_model import LocalModel, SampledReply
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Reply, Sample, Turn
from awares_bench.methods.crop_grid import ALL, PAPER_GRID, Box, hull, iou
from awares_bench.methods.policy import Policy, TurnGenerator

from ..rollouts import SamplingModel
from .judges import Endpoint, Judge


class BoxError(AwaresError, ValueError):
    """An evidence box that is no box of its image. Its text names the row and the box."""


def check_boxes(boxes: list, width: int, height: int, where: str = "a row") -> list[Box]:
    """Boxes (left, top, right, bottom) in whole pixels. Raises BoxError for one that is inverted, empty or outside the image.

    where: the row, for the error.
    """
    out = []
    for box in boxes:
        if len(box) != 4:
            raise BoxError(f"{where}: {list(box)} is not (left, top, right, bottom)")
        left, top, right, bottom = (round(float(v)) for v in box)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise BoxError(f"{where}: box {list(box)} is inverted or outside its {width}x{height} image; boxes are in pixels")
        out.append((left, top, right, bottom))
    return out


def crops_for(boxes: list[Box], width: int, height: int, mapping: str) -> tuple[str, ...]:
    """Evidence boxes -> crop names, perhaps none.

    coverage:    the one or two regions of least area such that each box lies in one of them, else all
    iou_argmax:  the region with the largest IoU with the boxes' hull
    iou_literal: every region with an IoU of at least 0.5 with the hull (paper Eq. 3), or all if that is among them; none for a
                 hull below an eighth of the image
    """
    if not boxes:
        return ()
    if mapping == "coverage":
        return PAPER_GRID.cheapest_cover(boxes, width, height)
    names = (*PAPER_GRID.names, ALL)
    overlap = dict(zip(names, (iou(hull(boxes), b) for b in PAPER_GRID.boxes(width, height, names)), strict=True))
    if mapping == "iou_argmax":
        return (max(overlap, key=overlap.__getitem__),)
    if mapping == "iou_literal":
        regions = tuple(n for n in names if overlap[n] >= 0.5)
        return (ALL,) if ALL in regions else regions
    raise ValueError(f"mapping is {mapping!r}; allowed: coverage, iou_argmax, iou_literal")


def candidates(pairs: bool = True) -> list[tuple[str, ...]]:
    """Crop sets worth trying, cheapest first: single regions, pairs of quarter-size regions, all."""
    singles = [(n,) for n in PAPER_GRID.names]
    small = [n for n in PAPER_GRID.names if PAPER_GRID.area((n,)) == 0.25]
    both = list(combinations(small, 2)) if pairs else []
    return [*sorted([*singles, *both], key=PAPER_GRID.area), (ALL,)]


def answers_with(
    vlm: LocalModel, policy: Policy, sample: Sample, crop_sets: list[tuple[str, ...]], max_new_tokens: int
) -> list[SampledReply]:
    """The greedy answer after each forced call. The first turn is prefilled once for all of them. Raises ValueError where there is none."""
    sampling, sessions = SamplingModel(vlm, 0.0), [Session() for _ in crop_sets]
    exchanges = [policy.turns(sample) for _ in crop_sets]
    turns = [_next_turn(exchange, None) for exchange in exchanges]
    calls = [PAPER_GRID.format(names) for names in crop_sets]
    forced = [replace(turn, forced_reply=call) for turn, call in zip(turns, calls, strict=True)]
    replies = _answered(sample, sampling.reply([Request(s, t, 1) for s, t in zip(sessions, forced, strict=True)]))
    turns = [_next_turn(exchange, reply) for exchange, reply in zip(exchanges, replies, strict=True)]
    return _answered(sample, sampling.reply([Request(s, t, max_new_tokens) for s, t in zip(sessions, turns, strict=True)]))


def _answered(sample: Sample, replies: list[SampledReply | Failure]) -> list[SampledReply]:
    failures = [reply.error for reply in replies if isinstance(reply, Failure)]
    if failures:
        raise ValueError(f"sample {sample.key!r} cannot be answered: {failures[0]}")
    return [reply for reply in replies if isinstance(reply, SampledReply)]


def _next_turn(exchange: TurnGenerator, reply: Reply | None) -> Turn:
    step = exchange.send(reply)
    while not isinstance(step, Turn):
        step = exchange.send(None)
    return step


def search(
    vlm: LocalModel, policy: Policy, sample: Sample, answers: tuple[str, ...], judge: Judge, max_new_tokens: int
) -> tuple[str, ...]:
    """The cheapest crops after which the model answers right; of equally cheap ones, those with the most probable answer.

    () when it answers right after none.
    """
    crop_sets = candidates()
    replies = answers_with(vlm, policy, sample, crop_sets, max_new_tokens)
    successes = [
        (PAPER_GRID.area(names), -sum(reply.logprobs), names)
        for names, reply in zip(crop_sets, replies, strict=True)
        if judge(sample.question, answers, reply.text) >= 0.5
    ]
    return min(successes)[2] if successes else ()


GROUND = """Find the regions of the image that the question is about and that hold its answer.

Question: {question}
Answer: {answer}

Output only a Python dict with the keys "question" and "answer". Each value is a list of tight boxes [left, top, right, bottom],
with coordinates from 0 to 1000."""
"""The task of the paper's oracle (supplement 7.2), in our words."""


def ground(endpoint: Endpoint, image: Image.Image, question: str, answer: str) -> list[Box] | None:
    """Question and answer boxes from a grounding model, in pixels; None when the reply is no such dict. Raises JudgeError."""
    from awares_bench.inference.openai_client import image_part

    parts = [image_part(image), {"type": "text", "text": GROUND.format(question=question, answer=answer)}]
    reply = endpoint.say(parts, max_tokens=512)
    try:
        regions = ast.literal_eval(reply[reply.index("{") : reply.rindex("}") + 1])
        scaled = [
            (x0 * image.width / 1000, y0 * image.height / 1000, x1 * image.width / 1000, y1 * image.height / 1000)
            for x0, y0, x1, y1 in [*regions.get("question", []), *regions.get("answer", [])]
        ]
        return check_boxes(scaled, image.width, image.height) or None
    except (ValueError, SyntaxError, TypeError, AttributeError):
        return None
