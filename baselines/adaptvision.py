"""AdaptVision: reason over a half-size view, and call for one box of the original when that is not enough.

Paper    Lin et al., CVPR 2026, https://arxiv.org/abs/2512.03794
Code     https://github.com/AdaptVision/AdaptVision at 9b7d57c, ``scripts/vllm_adaptvision.py``
Needs    a checkpoint trained for it (the authors release Qwen2.5-VL-7B weights), and processor limits of 4 to 16,384 tokens
Cost     the half-size view plus the box's share of every visual token after a call; hundreds of output tokens
Differs  the box is scaled by the true ratio of original to view (released: doubled, off by up to 28 pixels, and black or misplaced above 2048x2048); line breaks, spaces and fences in the JSON are read; no number ends the run. ``compat=official`` as released
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from awares_bench import Event, EventKind, Policy, Sample, Turn, TurnGenerator
from awares_bench.methods.crop_grid import Box
from awares_bench.methods.crop_turns import note_half_view
from awares_bench.methods.images import HALF_SHARE, LONGEST_RATIO, enlarged, half, rounded
from awares_bench.methods.options import parse_int
from awares_bench.methods.tool_calls import (
    CallError,
    answered,
    argument,
    enclosing,
    json_values,
    last_answer,
    numbers,
    read_json,
    share_of_box,
    tagged,
)

# Quoted from the authors' code (Apache-2.0): the released checkpoint expects these strings exactly.
SYSTEM = """You are a helpful assistant.

# Tools
You may call the function tool shown below to assist with the user query.

You are provided with the function signature within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name_for_human": "request_local_region", "name": "request_local_region", "description": "Request a high-resolution local region of the current image and zoom in", "parameters": {"properties": {"bbox_2d": {"type": "array", "items":{"type":"integer"}, "minItems":4, "maxItems":4, "description": "The bounding box of the region to crop, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner of the target region and (x2, y2) is the bottom-right corner of the target region. The bounding box should be in the absolute pixel coordinates of the current image."}}, "required": ["bbox_2d"], "type": "object"}, "args_format": "Format the arguments as a JSON object."}}
</tools>
For each function call, return a json object with the function name and the corresponding argument within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
"""

BEFORE = (
    "Answer the question based on the image provided. You must conduct reasoning within <think> and </think> first in each of "
    "your reasoning steps. You may call ONE function tool per step to help you better solve the problem. Place the function tool "
    "within <tool_call> and </tool_call> at the end of each step to perform a function call. You should continue your reasoning "
    "process within <think> and </think> based on the content returned by the function tool. Once you confirm your final answer, "
    "place the final answer inside <answer> and </answer>. For mathematical or multiple-choice problem, wrap the answer value or "
    "choice with \\boxed{}. Here is the image and question:\n"
)
CROPPED = "<tool_response>\nThe cropped region of the image is shown below:\n"
CONTINUE = (
    "\n</tool_response>\nPlease carefully analyze the content returned from the request_local_region tool in combination with the "
    "original question and image from the user, continue your reasoning process inside <think> and </think> and then write your "
    "final answer inside <answer> and </answer>."
)
AFTER_ERROR = (
    "Please analyze the error information obtained from the function tool and adjust your response. Countinue your reasoning "
    "process inside <think> and </think>."
)
TOOL = "request_local_region"
EMPTY = "Empty tool call: no JSON object found inside <tool_call>."
UNREADABLE = "Error: Failed to parse bbox from response"

LEAST, MOST_OF_A_CROP = 4 * 28**2, 3840**2
"""Pixels of a picture that is shown, at the least, and of a crop at the most."""


@dataclass(frozen=True)
class AdaptVision(Policy):
    """Think at half size; at most one call for a box of the (first) image.

    budget:  tokens of each turn, whatever the task allows (the authors' 1,600)
    largest: the original that crops are cut from has at most this many pixels squared (the authors' 2,048, which the weights saw)
    compat:  ``corrected``, or ``official``: calls and boxes as the released code reads them
    """

    budget: int = 1600
    largest: int = 2048
    compat: Literal["corrected", "official"] = "corrected"

    def __post_init__(self):
        super().__post_init__()
        parse_int("budget", self.budget)
        parse_int("largest", self.largest, 56)

    def view(self, image: Image.Image) -> Image.Image:
        """What is shown first: half the sides, then whole tokens."""
        return rounded(enlarged(half(image)), LEAST, self.largest**2)

    def original(self, image: Image.Image) -> Image.Image:
        """What crops are cut from."""
        return rounded(enlarged(image), LEAST, self.largest**2)

    def turns(self, sample: Sample) -> TurnGenerator:
        how = {"min_reply_tokens": self.budget, "until": ()}
        views = tuple(self.view(image) for image in sample.images)
        before = (BEFORE, *["\n"] * (len(views) - 1))
        question = f"\n{sample.question}" if views else BEFORE + sample.question
        shares = (HALF_SHARE,) * len(views)
        first = yield Turn(views, question, shares=shares, system=SYSTEM, image_prefixes=before, is_final=False, **how)
        yield from note_half_view(sample, first)
        if not sample.images:
            if tagged(first.text, "tool_call"):
                yield Event(EventKind.NO_IMAGE, "a call for a region of an image that is not there counts as the answer")
            return answered(first, last_answer(first.text))
        image, original = sample.images[0], self.original(sample.images[0])
        try:
            asked = requested_box(first.text, self.compat)
            if asked is None:
                return answered(first, last_answer(first.text))
            box = self.box(asked, views[0].size, original.size)
        except CallError as error:
            yield Event(EventKind.MALFORMED_CALL, str(error))
            second = yield Turn((), f"{error}{AFTER_ERROR}", omit_newline=True, **how)
        else:
            if original.width * original.height < 0.9 * image.width * image.height:
                size = f"{original.width}x{original.height}"
                yield Event(EventKind.ORIGINAL_SHRUNK, f"the crop is cut from {size} of {image.width}x{image.height} pixels")
            crop = rounded(original.crop(box), LEAST, MOST_OF_A_CROP)
            scale = image.width / original.width, image.height / original.height
            place = enclosing(tuple(v * s for v, s in zip(box, scale * 2, strict=True)), *image.size)
            said = {"boxes": (place,) if len(sample.images) == 1 else (), "shares": (share_of_box(place, *image.size),)}
            second = yield Turn((crop,), CONTINUE, image_prefixes=(CROPPED,), omit_newline=True, **said, **how)
        if tagged(second.text, "tool_call"):
            yield Event(EventKind.CALL_IN_ANSWER, "a second call is not answered")
        return answered(second, last_answer(first.text + second.text))

    def box(self, asked: tuple[float, ...], view: tuple[int, int], original: tuple[int, int]) -> Box:
        """A box in pixels of the view -> whole pixels of the original. Raises CallError when nothing to show is left."""
        limits = original if self.compat == "corrected" else (2 * view[0], 2 * view[1])
        left, top, right, bottom = (
            limit if value >= side else max(0, int(value * limit / side))
            for value, side, limit in zip(asked, view * 2, limits * 2, strict=True)
        )
        width, height = right - left, bottom - top
        if min(width, height) <= 0 or max(width, height) > LONGEST_RATIO * min(width, height):
            raise CallError(UNREADABLE)
        return left, top, right, bottom


def requested_box(text: str, compat: str) -> tuple[float, ...] | None:
    """The box that a reply calls for, in pixels of the view; None without a closed tag. Raises CallError with the authors' words."""
    contents = tagged(text, "tool_call")
    if not contents:
        return None
    if compat == "official":  # an object ends at the first two adjacent braces of its line
        calls = [found for content in contents for found in re.findall(r"\{.*?\}\}", content)]
    else:
        unfenced = [re.sub(r"^\s*```(json)?|```\s*$", "", content) for content in contents]
        try:
            calls = [value for content in unfenced for value in json_values(content)]
        except CallError:
            raise CallError(EMPTY) from None
    if not calls:
        raise CallError(EMPTY)
    if len(calls) > 1:
        raise CallError(f"You should only call function `{TOOL}` once per function call.")
    call = read_json(calls[0]) if compat == "official" else calls[0]
    name = call.get("name") if isinstance(call, dict) else None
    if name != TOOL:
        raise CallError(f"Unknown Tool Type: {name}. Available function tools are: `{TOOL}`")
    try:
        asked = argument(call, "arguments", "bbox_2d")
    except CallError:
        raise CallError("Missing `bbox_2d` in tool call arguments.") from None
    box = numbers(asked)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise CallError(f"Invalid bounding box coordinates: x1 must be > x0 and y1 must be > y0: {str(asked)[:200]}")
    if compat == "official":
        try:
            read_json(contents[0])
        except CallError:
            raise CallError(UNREADABLE) from None
    return box
