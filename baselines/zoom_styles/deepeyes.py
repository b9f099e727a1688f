"""DeepEyes, https://arxiv.org/abs/2505.14362; Visual-Agent/DeepEyes at 6c5e796 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from PIL import Image

from awares_bench import Turn
from awares_bench.methods.images import rounded
from awares_bench.methods.tool_calls import CallError, argument, first_answer, numbers, read_json, tagged

from . import TOKEN, Picture, Region, Style

# Strings are quoted from the authors' code, slips of the pen included: the released checkpoint expects them exactly.


class DeepEyes(Style):
    """Boxes in pixels of the picture sent. ``official`` is eval_vstar.py; otherwise the tool of the weights' training."""

    system = """You are a helpful assistant.

# Tools
You may call one or more functions to assist with the user query.
You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type":"function","function":{"name":"image_zoom_in_tool","description":"Zoom in on a specific region of an image by cropping it based on a bounding box (bbox) and an optional object label.","parameters":{"type":"object","properties":{"bbox_2d":{"type":"array","items":{"type":"number"},"minItems":4,"maxItems":4,"description":"The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner and (x2, y2) is the bottom-right corner."},"label":{"type":"string","description":"The name or label of the object in the specified bounding box (optional)."}},"required":["bbox"]}}}
</tools>

# How to call a tool
Return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>

**Example**:\x20\x20
<tool_call>\x20\x20
{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200], "label": "the apple on the desk"}}\x20\x20
</tool_call>"""
    think = (
        "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
        "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> "
    )
    user = "Question: {question}\n" + think
    calls, budget = 10, 10240

    def view(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        return image, image

    def crop(self, cut: Image.Image) -> tuple[Image.Image, Image.Image]:
        return cut, rounded(cut, 4 * TOKEN, 16384 * TOKEN, Image.Resampling.BICUBIC)

    def read(self, text: str, official: bool) -> Any:
        if official:
            _, opened, rest = text.partition("<tool_call>")
            return read_json(rest.partition("</tool_call>")[0].strip()) if opened else None
        contents = tagged(text, "tool_call")
        if first_answer(text) or not contents or not contents[-1].strip():
            return None
        call = read_json(contents[-1])
        if argument(call, "name") != "image_zoom_in_tool":
            raise CallError(f"Unknown tool name: {call['name']}")
        return call

    def region(self, call: Any, pictures: list[Picture], images: int, official: bool) -> tuple[int, Region]:
        left, top, right, bottom = box = pictures[0].scaled(numbers(argument(call, "arguments", "bbox_2d")))
        if official:
            return 0, box
        source = pictures[0].source
        left, top, right, bottom = max(0, left), max(0, top), min(source.width, right), min(source.height, bottom)
        width, height = right - left, bottom - top
        if min(width, height) <= 30 or max(width, height) > 100 * min(width, height):
            raise CallError("ZOOM IN ARGUMENTS ARE INVALID")
        return 0, (left, top, right, bottom)

    def answers_too(self, text: str, official: bool) -> bool:
        return official and "</answer>" in text

    def after_crop(self, picture: Picture, replies: int) -> Turn:
        return Turn((picture.shown,), f"{self.think}</tool_response>", image_prefixes=("<tool_response>",))

    def after_error(self, error: CallError, first: Picture, replies: int, official: bool) -> Turn | None:
        return None if official else Turn((), f"Error: {error}")

    def answer(self, text: str) -> str:
        found = first_answer(text)
        return text if found is None else found

    def unanswered(self, text: str, official: bool) -> str:
        return text if official else ""
