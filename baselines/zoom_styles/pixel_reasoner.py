"""Pixel Reasoner, https://arxiv.org/abs/2505.15966; TIGER-AI-Lab/Pixel-Reasoner at a3a6c3a (MIT)."""

from __future__ import annotations

from typing import Any

from PIL import Image

from awares_bench import Turn
from awares_bench.methods.images import enlarged, rounded
from awares_bench.methods.tool_calls import CallError, argument, numbers, read_json

from . import TOKEN, Picture, Region, Style

# Strings are quoted from the authors' code, slips of the pen included: the released checkpoint expects them exactly.


class PixelReasoner(Style):
    """Boxes from 0 to 1 (pixels where a value is above) of the view or of an earlier crop as it was shown, a tenth wider on every side."""

    system = """You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "crop_image_normalized", "description": "Zoom in on the image based on the bounding box coordinates. It is useful when the object or text in the image is too small to be seen.", "parameters": {"type": "object", "properties": {"bbox_2d": {"type": "array", "description": "coordinates for bounding box of the area you want to zoom in. Values should be within [0.0,1.0].", "items": {"type": "number"}}, "target_image": {"type": "number", "description": "The index of the image to crop. Index from 1 to the number of images. Choose 1 to operate on original image."}}, "required": ["bbox_2d", "target_image"]}}}
{"type": "function", "function": {"name": "select_frames", "description": "Select frames from a video.", "parameters": {"type": "object", "properties": {"target_frames": {"type": "array", "description": "List of frame indices to select from the video (no more than 8 frames in total).", "items": {"type": "integer", "description": "Frame index from 1 to 16."}}}, "required": ["target_frames"]}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
    user = (
        "{question}\n\n\n\nGuidelines: Understand the given visual information and the user query. Determine if it is beneficial to employ "
        "the given visual operations (tools). For a video, we can look closer by `select_frames`. For an image, we can look closer by "
        "`crop_image`. Reason with the visual information step by step, and put your final answer within \\boxed{{}}."
    )
    calls, budget = 4, 2048
    video = (
        "Execution Error: You attempted to `select_frames` from **image** not **video**. You should use `crop_image_normalized` instead "
        "for inspecting **image**."
    )

    def view(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        return self.sized(enlarged(image), 8000)

    def crop(self, cut: Image.Image) -> tuple[Image.Image, Image.Image]:
        return self.sized(cut, 5120)

    def sized(self, image: Image.Image, most: int) -> tuple[Image.Image, Image.Image]:
        """The toolkit's own picture of 256 to ``most`` tokens, and what its processor's limits of 512 to 5,120 make of that."""
        source = rounded(image, 256 * TOKEN, most * TOKEN, Image.Resampling.BICUBIC)
        return source, rounded(source, 512 * TOKEN, 5120 * TOKEN, Image.Resampling.BICUBIC)

    def read(self, text: str, official: bool) -> Any:
        if not (text if official else text.rstrip()).endswith("</tool_call>") or "<tool_call>" not in text:
            return None
        call = read_json(text.rpartition("<tool_call>")[2].partition("</tool_call>")[0].strip())
        name = argument(call, "name")
        if name == "select_frames":
            raise CallError(self.video)
        if name != "crop_image_normalized":
            raise CallError(f"unknown function {str(name)[:80]!r}")
        return argument(call, "arguments")

    def region(self, call: Any, pictures: list[Picture], images: int, official: bool) -> tuple[int, Region]:
        target, box = argument(call, "target_image"), argument(call, "bbox_2d")
        box = numbers(box[:4] if official and isinstance(box, list) else box)
        whole = isinstance(target, int) if official else isinstance(target, (int, float)) and not isinstance(target, bool)
        if not whole or target != target // 1:
            raise CallError(f"`target_image` is {str(target)[:80]!r}, which is not a whole number")
        if target > len(pictures) or target < (1 - len(pictures) if official else 1):
            where = f"You can only pick an image within [1,{len(pictures)}]"
            raise CallError(f"Execution Error: Incorrect `target_image` argument in `crop_image_normalized` operation. {where}")
        index = (int(target) - 1) % len(pictures)  # as released, image 0 is the last one
        width, height = pictures[index].source.size
        if not official and not (box[0] < box[2] and box[1] < box[3]):
            raise CallError("Coordinate 'right' is less than 'left', or 'lower' less than 'upper'")
        if not all(value < 1 or (value == 1 and not official) for value in box):  # as released, a 1 makes all four pixels
            box = box[0] / width, box[1] / height, box[2] / width, box[3] / height
        left, top, right, bottom = max(0, box[0] - 0.1), max(0, box[1] - 0.1), min(1, box[2] + 0.1), min(1, box[3] + 0.1)
        region = left * width, top * height, right * width, bottom * height
        wide, high = round(region[2]) - round(region[0]), round(region[3]) - round(region[1])
        if min(wide, high) < 0:
            raise CallError("Coordinate 'right' is less than 'left', or 'lower' less than 'upper'")
        if min(wide, high) <= 28:
            raise CallError(f"Cropped image is too small: {wide}x{high}")
        return index, region

    def after_crop(self, picture: Picture, replies: int) -> Turn:
        size = f"{picture.source.width}x{picture.source.height}"
        return Turn((picture.shown,), image_prefixes=(f"\nHere is the cropped image (Image Size: {size}):",))

    def after_error(self, error: CallError, first: Picture, replies: int, official: bool) -> Turn | None:
        return Turn((), f"\nExecution error:\n{error}\n")

    def answer(self, text: str) -> str:
        return boxed(text)


def boxed(text: str) -> str:
    r"""What stands in the last ``\boxed{}``, braces within it included; all of the text without one."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[:at].strip()
    return rest.strip() if found else text.strip()
