"""ERGO: from a view of few tokens the model must name a region, and answers from view and region together.

Paper    Lee et al., ICLR 2026, https://arxiv.org/abs/2509.21991
Code     https://github.com/nota-github/ERGO at c6d6742, ``src/ergo/eval.py``
Needs    a checkpoint trained for it (the authors release Qwen2.5-VL-7B weights), and processor limits of 4 to 16,384 tokens
Cost     at most about twice ``cap`` tokens and always two pictures: below about a megapixel more than full resolution
Differs  a region that cannot be read or is empty shows the whole image under the cap, with an event (released: the whole image at any size, or the document is left out of the score); floats and spaces are read; both turns ask the whole question (released: without options first). ``compat=official`` as released but for the options
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from awares_bench import Event, EventKind, Failure, Policy, Sample, Turn, TurnGenerator
from awares_bench.methods.crop_grid import Box
from awares_bench.methods.crop_turns import without_crops
from awares_bench.methods.images import rounded_size, share_of
from awares_bench.methods.options import parse_int
from awares_bench.methods.tool_calls import CallError, answered, first_answer, share_of_box, tagged

# Quoted from the authors' code (Apache-2.0), slips of the pen included: the released checkpoint expects these strings exactly.
SYSTEM = (
    "You are a helpful assistant. Given an image and one question. First, identify the coordinates of the key image area relevant "
    "to solving the problem. Append the coordinates in [x1, y1, x2, y2] format at the end of your response and stop. This will "
    "trigger cropping of the corresponding area in the original image and enlarge it for improved clarity. Once the enlarged image "
    "is available, provide the final answer."
)
FIRST = (
    " First, consider how to zoom in on the image to include only the region containing all the information necessary to answer the "
    "question. Output the thinking process in <think> </think> tags and then output the region's bounding box coordinates in the "
    "following format <zoom>[x1, y1, x2, y2]</zoom> tags."
)
SECOND = (
    "\nCarefully analyze both the original image and the enlarged sub-image to solve the question step by step. Present your "
    "reasoning clearly the following format strictly <think> ... {closing}, and provide the final answer enclosed within <answer> "
    "... </answer>"
)
CLOSING = {"evaluation": "<think>", "demo": "</think>"}

LEAST = 4 * 28**2
"""Pixels of a view or crop at the least."""

BOXES = {
    "official": re.compile(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]"),
    "corrected": re.compile(r"\[" + ",".join([r"\s*(-?\d{1,9}(?:\.\d*)?)\s*"] * 4) + r"\]"),
}


@dataclass(frozen=True)
class Ergo(Policy):
    """Look at ``cap`` tokens, zoom once, answer.

    cap:    visual tokens of the view, and of the crop; rounding may exceed it by a few (the paper's 640 and 1,280)
    budget: tokens of each turn, whatever the task allows (the authors' 1,024)
    prompt: the second question as the ``evaluation`` asks it, or with the closing tag that the ``demo`` repairs
    compat: ``corrected``, or ``official``: an unread region shows the whole image uncapped, and an empty one fails the document
    """

    cap: int = 1280
    budget: int = 1024
    prompt: Literal["evaluation", "demo"] = "evaluation"
    compat: Literal["corrected", "official"] = "corrected"

    def __post_init__(self):
        super().__post_init__()
        parse_int("cap", self.cap, 4)
        parse_int("budget", self.budget)

    def shown(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """``image`` in whole tokens under the cap, never enlarged but to four tokens."""
        size = rounded_size(*image.size, LEAST, self.cap * 28**2, round)
        return image if size == image.size else image.resize(size, resample)

    def turns(self, sample: Sample) -> TurnGenerator:
        if len(sample.images) != 1:
            return (yield from without_crops(sample))
        (image,) = sample.images
        how = {"min_reply_tokens": self.budget, "until": ()}
        view = self.shown(image, Image.Resampling.BICUBIC)
        shares = (share_of(view, image),)
        first = yield Turn((view,), sample.question + FIRST, shares=shares, system=SYSTEM, is_final=False, **how)
        box: Box = (0, 0, *image.size)
        try:
            asked = named_region(first.text, self.compat)
            box = pixels_of(asked, view.size, image.size)
            crop = self.cut(image, box)
        except CallError as error:
            if self.compat == "official" and not isinstance(error, NoRegion):
                return Failure(f"{error}; the released evaluation leaves such a document out of its score")
            yield Event(EventKind.MALFORMED_BOX, f"{error}; the whole image is shown again")
            crop = image if self.compat == "official" else self.shown(image, Image.Resampling.LANCZOS)
        second = SECOND.format(closing=CLOSING[self.prompt])
        share = min(share_of(crop, image), share_of_box(box, *image.size))
        reply = yield Turn((crop,), sample.question + second, shares=(share,), boxes=(box,), **how)
        answer = first_answer(reply.text)
        return answered(reply, reply.text.strip() if answer is None else answer)

    def cut(self, image: Image.Image, box: Box) -> Image.Image:
        """The crop as it is shown. Raises CallError when it is empty."""
        width, height = box[2] - box[0], box[3] - box[1]
        if min(width, height) > 0:
            return self.shown(image.crop(box), Image.Resampling.LANCZOS)
        if self.compat == "corrected" or min(width, height) < 0 or width == height:
            raise CallError(f"the region {list(box)} in pixels of the image is empty")
        wide, high = (max(28, round(side / 28) * 28) for side in (width, height))
        if wide * high < LEAST:  # the released rule then divides by the area
            raise CallError(f"the region {list(box)} in pixels of the image is empty")
        return Image.new("RGB", rounded_size(wide, high, LEAST, self.cap * 28**2, round))  # black, as released


class NoRegion(CallError):
    """A reply that names no region that can be read."""


def named_region(text: str, compat: str) -> tuple[float, ...]:
    """The one box in the first ``<zoom>`` tag, in pixels of the view. Raises NoRegion."""
    content = next(iter(tagged(text, "zoom")), None)
    if content is None:
        raise NoRegion("the reply has no <zoom> tag that closes")
    found = BOXES[compat].findall(content)
    if len(found) != 1:
        raise NoRegion(f"expected one box [x1, y1, x2, y2] in the <zoom> tag, got {content.strip()[:80]!r}")
    try:
        return tuple(float(value) for value in found[0])
    except (ValueError, OverflowError) as error:
        raise NoRegion("the box in the <zoom> tag has numbers too long to read") from error


def pixels_of(asked: tuple[float, ...], view: tuple[int, int], size: tuple[int, int]) -> Box:
    """A box in pixels of the view -> whole pixels of the image, clamped and truncated; it may be empty or inverted."""
    left, top, right, bottom = (
        limit if value >= side else max(0, int(value * (limit / side)))
        for value, side, limit in zip(asked, view * 2, size * 2, strict=True)
    )
    return left, top, right, bottom
