"""Chain-of-Focus, https://arxiv.org/abs/2505.15436; xtong-zhang/Chain-of-Focus at 431ff0d (no licence: strings as facts, no code)."""

from __future__ import annotations

from typing import Any

from PIL import Image

from awares_bench import Turn
from awares_bench.methods.images import enlarged, rounded, rounded_size
from awares_bench.methods.tool_calls import CallError, argument, numbers, read_json, tagged

from . import Picture, Region, Style

# Strings are quoted from the authors' code, slips of the pen included: the released checkpoint expects them exactly.


class ChainOfFocus(Style):
    """Boxes in pixels of the view, half as wide again about their centre, cut from the view and shown at twice the size."""

    system = """You are a helpful assistant.

# Tools
You may call one or more functions to assist with the user query.
You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name":"image_zoom_in_tool","description":"Zoom in on a specific region of an image by cropping it based on a bounding box (bbox_2d) and an optional object label.","parameters":{"properties":{"bbox_2d":{"type":"array","items":{"type":"number"},"minItems":4,"maxItems":4,"description":"The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner and (x2, y2) is the bottom-right corner."},"label":{"type":"string","description":"The name or label of the object in the specified bounding box (optional)."}},"required":["bbox_2d"], "type":"object"},"args_format": "Format the arguments as a JSON object."}}
</tools>

For the function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
    think = (
        "\nThink in the mind first, and then decide whether to call tools one or more times OR provide final answer. Format strictly as: "
        "<think>...</think> <tool_call>...</tool_call> <tool_call>...</tool_call> (if any tools needed) OR <answer>...</answer> (if no "
        "tools needed)."
    )
    user = "Question: {question}" + think
    calls, budget, limits = 5, 512, (112**2, 3840**2)

    def view(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        view = rounded(enlarged(image), *self.limits)
        return view, view

    def crop(self, cut: Image.Image) -> tuple[Image.Image, Image.Image]:
        size = rounded_size(2 * cut.width, 2 * cut.height, *self.limits)
        return cut, cut.resize(size, Image.Resampling.LANCZOS)

    def read(self, text: str, official: bool) -> Any:
        if "<tool_call>" not in text:
            return None
        contents = tagged(text, "tool_call")
        if not contents:
            raise CallError("the call does not close")
        return read_json(contents[0])

    def region(self, call: Any, pictures: list[Picture], images: int, official: bool) -> tuple[int, Region]:
        try:
            box = argument(call, "arguments", "bbox_2d")
        except CallError as error:
            raise ShapeError(str(error)) from error
        if not isinstance(box, list) or len(box) != 4:
            raise ShapeError(f"the box is {str(box)[:80]}, which is not four numbers")
        left, top, right, bottom = numbers(box)
        width, height = pictures[0].shown.size
        if not official:
            left, top, right, bottom = max(0, left), max(0, top), min(width, right), min(height, bottom)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise CallError(f"the box {box} is not inside the view of {width}x{height} pixels")
        across, down = (right - left) / 4, (bottom - top) / 4
        left, top, right, bottom = (
            max(0, left - across),
            max(0, top - down),
            min(width, right + across),
            min(height, bottom + down),
        )
        whole = (int(left), int(top), max(int(right), int(left) + 1), max(int(bottom), int(top) + 1))
        return 0, pictures[0].scaled(whole)

    def after_crop(self, picture: Picture, replies: int) -> Turn:
        return Turn((picture.shown,), self.think)

    def after_error(self, error: CallError, first: Picture, replies: int, official: bool) -> Turn | None:
        twice = official and not isinstance(error, ShapeError)
        return Turn((self.crop(first.source)[1] if twice else first.shown,), self.think)


class ShapeError(CallError):
    """A call without four coordinates at their place: the released Chain-of-Focus shows the view as it is, not twice as large."""
