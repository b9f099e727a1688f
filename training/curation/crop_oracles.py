"""Which crops a question needs: from evidence boxes, or by trying the crops on the model itself."""

from __future__ import annotations

import ast
import base64
import io
from itertools import combinations

from PIL import Image

from awares_bench.inference.local_model import VLM
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Reply, Sample, Turn
from awares_bench.methods.crop_grid import ALL, PAPER_GRID, Box
from awares_bench.methods.policy import Policy

from ..packing import Features
from ..rollouts import Sampler
from .judges import Endpoint, Judge


class BoxError(ValueError):
    """An evidence box that is no box of its image."""


def checked(boxes: list, width: int, height: int, where: str = "a row") -> list[Box]:
    """Boxes (left, top, right, bottom) in pixels. Raises BoxError for one that is inverted, empty or outside the image."""
    out = []
    for box in boxes:
        if len(box) != 4:
            raise BoxError(f"{where}: {list(box)} is not (left, top, right, bottom)")
        left, top, right, bottom = (round(float(v)) for v in box)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise BoxError(f"{where}: box {list(box)} is inverted or outside its {width}x{height} image; boxes are in pixels")
        out.append((left, top, right, bottom))
    return out


def iou(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, across) * max(0, down)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def hull(boxes: list[Box]) -> Box:
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def crops_for(boxes: list[Box], width: int, height: int, mapping: str) -> tuple[str, ...]:
    """Evidence boxes -> crop names, perhaps none.

    coverage:    the one or two regions of least area such that each box lies in one of them, else all
    iou_argmax:  the region most like the boxes' hull
    iou_literal: every region with an IoU of 0.5 or more with the hull (paper Eq. 3): none for a hull below an eighth of the image
    """
    if not boxes:
        return ()
    if mapping == "coverage":
        return PAPER_GRID.cheapest_cover(boxes, width, height)
    names = (*PAPER_GRID.names, ALL)
    like = dict(zip(names, (iou(hull(boxes), b) for b in PAPER_GRID.boxes(width, height, names)), strict=True))
    if mapping == "iou_argmax":
        return (max(names, key=like.__getitem__),)
    if mapping == "iou_literal":
        found = tuple(n for n in names if like[n] >= 0.5)
        return (ALL,) if ALL in found else found
    raise ValueError(f"mapping is {mapping!r}; allowed: coverage, iou_argmax, iou_literal")


def candidates(pairs: bool = True) -> list[tuple[str, ...]]:
    """Crop sets worth trying, cheapest first: single regions, pairs of quarter-size regions, all."""
    singles = [(n,) for n in PAPER_GRID.names]
    small = [n for n in PAPER_GRID.names if PAPER_GRID.area((n,)) == 0.25]
    both = list(combinations(small, 2)) if pairs else []
    return [*sorted([*singles, *both], key=PAPER_GRID.area), (ALL,)]


def answers_with(
    vlm: VLM, policy: Policy, sample: Sample, tried: list[tuple[str, ...]], features: Features, max_new_tokens: int
) -> list[Reply]:
    """The greedy answer after each forced call; the first turn is prefilled once for all of them."""
    sampler, sessions = Sampler(vlm, features, 0.0), [Session() for _ in tried]
    looks = [policy.look(sample) for _ in tried]
    turns = [_next_turn(look, None) for look in looks]
    calls: list[str | None] = [PAPER_GRID.format(names) for names in tried]
    said = sampler.reply([Request(s, t, 1) for s, t in zip(sessions, turns, strict=True)], forced=calls)
    turns = [_next_turn(look, reply) for look, reply in zip(looks, said, strict=True)]
    return sampler.reply([Request(s, t, max_new_tokens) for s, t in zip(sessions, turns, strict=True)])


def _next_turn(look, reply: Reply | None) -> Turn:
    step = look.send(reply)
    while not isinstance(step, Turn):
        step = look.send(None)
    return step


def search(
    vlm: VLM, policy: Policy, sample: Sample, answers: tuple[str, ...], judge: Judge, features: Features, max_new_tokens: int
) -> tuple[str, ...]:
    """The cheapest crops after which the model answers right, the surest among equals; none when no crops do."""
    tried = candidates()
    replies = answers_with(vlm, policy, sample, tried, features, max_new_tokens)
    right = [
        (PAPER_GRID.area(names), -sum(reply.logps), names)
        for names, reply in zip(tried, replies, strict=True)
        if judge(sample.question, answers, reply.text) >= 0.5
    ]
    return min(right)[2] if right else ()


GROUND = """Find the regions of the image that the question is about and that hold its answer.

Question: {question}
Answer: {answer}

Output only a Python dict with the keys "question" and "answer". Each value is a list of tight boxes [left, top, right, bottom],
with coordinates from 0 to 1000."""
"""The task of the paper's oracle (supplement 7.2), in our words."""


def ground(endpoint: Endpoint, image: Image.Image, question: str, answer: str) -> list[Box] | None:
    """Question and answer boxes from a grounding model, in pixels; None when the reply is no such dict. Raises JudgeError."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    parts: list[dict] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": GROUND.format(question=question, answer=answer)},
    ]
    reply = endpoint.say(parts, max_tokens=512)
    try:
        said = ast.literal_eval(reply[reply.index("{") : reply.rindex("}") + 1])
        scaled = [
            (x0 * image.width / 1000, y0 * image.height / 1000, x1 * image.width / 1000, y1 * image.height / 1000)
            for x0, y0, x1, y1 in [*said.get("question", []), *said.get("answer", [])]
        ]
        return checked(scaled, image.width, image.height) or None
    except (ValueError, SyntaxError, TypeError, AttributeError):
        return None
