"""Mini-o3, https://arxiv.org/abs/2509.07969; Mini-o3/Mini-o3 at 8654dbf (code Apache-2.0; weights CC BY-NC 4.0)."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

from awares_bench import Turn
from awares_bench.methods.images import LONGEST_RATIO, TOKEN_SIDE
from awares_bench.methods.tool_calls import CallError, argument, numbers, read_json

from . import Picture, Region, Style

# Strings are quoted from the authors' code, slips of the pen included: the released checkpoint expects them exactly.


class MiniO3(Style):
    """Boxes from 0 to 1 of the full-size original or of an earlier crop as it was cut."""

    system = (
        "You are a helpful assistant. Answer the user's question based on the image provided. Output your thinking process within the "
        "<think> and </think> tags. Whenever you find anything unclear, you can zoom in a specific region in the given image to see more "
        'clearly by outputing <grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>, where (x0, y0) and '
        "(x1, y1) are the top-left and bottom-right coordinates of the region that you want to zoom in, respectively (suppose the width "
        "and height of the image are 1.0), and 'source' refers to the image that you zoom in and could be either 'original_image' or "
        "'observation_i'. Once the final answer is confirmed, put it within <answer> and </answer>."
    )
    calls, budget = 11, 4096
    seen = (
        ".\nContinue your reasoning process inside <think> and </think>. If needed, you can continue to zoom in on the original image or "
        "any of the observations, by outputting <grounding> and </grounding> as before. If the final answer is confirmed, put your final "
        "answer inside <answer> and </answer>."
    )
    failed = (
        "ERROR occurs during grounding. Error Information: {error}.\nPlease analyze the error information obtained from the function tool "
        "and adjust your response. Countinue your reasoning process inside <think> and </think>."
    )
    written = re.compile(r'.*<grounding>\{"bbox_2d": (.*), "source": ["\'](.*)["\']\}</grounding>')

    def view(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        return image, within_pixels(image, Image.Resampling.LANCZOS)

    def crop(self, cut: Image.Image) -> tuple[Image.Image, Image.Image]:
        return cut, within_pixels(cut, Image.Resampling.NEAREST)

    def read(self, text: str, official: bool) -> Any:
        before, closed, _ = text.rpartition("</grounding>")
        if not closed or "<grounding>" not in before:
            return None
        if not official:
            return read_json(before.rpartition("<grounding>")[2])
        if not (found := self.written.search(text)):
            raise CallError("the call is not written as the system message shows it")
        return {"bbox_2d": read_json(found[1]), "source": found[2]}

    def region(self, call: Any, pictures: list[Picture], images: int, official: bool) -> tuple[int, Region]:
        source, box = argument(call, "source"), numbers(argument(call, "bbox_2d"))
        named = re.fullmatch(r"observation_([0-9]{1,9})", str(source))
        if source != "original_image" and not named:
            raise CallError(f"The 'source' argument \"{str(source)[:80]}\" does not match the pattern 'observation_([0-9]*)'.")
        index = int(named[1]) if named else 0
        if index and images - 1 + index >= len(pictures):
            raise CallError(f'Error in predicting the source observation: "{source}".')
        index = index and images - 1 + index
        width, height = pictures[index].source.size
        left, top = max(0, int(box[0] * width)), max(0, int(box[1] * height))
        right, bottom = min(width - 1, int(box[2] * width)), min(height - 1, int(box[3] * height))
        for name, low, high in (("width", left, right), ("height", top, bottom)):
            if low >= high:
                raise CallError(f"The bounding box is not valid in {name}: {[left, top, right, bottom]}")
        if max(right - left, bottom - top) >= LONGEST_RATIO * min(right - left, bottom - top):
            raise CallError("The absolute aspect ratio of the bounding box exceeds 200, which is too large.")
        return index, (left, top, right, bottom)

    def after_crop(self, picture: Picture, replies: int) -> Turn:
        before = f"After the above Action {replies - 1}, here is the the zoom-in image (Observation {replies}):\n"
        return Turn((picture.shown,), self.seen, image_prefixes=(before,))

    def after_error(self, error: CallError, first: Picture, replies: int, official: bool) -> Turn | None:
        return Turn((), self.failed.format(error=error))


def within_pixels(image: Image.Image, resample: Image.Resampling, least: int = 40_000, most: int = 2_000_000) -> Image.Image:
    """Mini-o3's rule: ``least`` to ``most`` pixels, sides truncated and no multiple of a token; then 28 pixels a side and one more."""
    width, height = image.size
    if not least <= width * height <= most:
        scale = ((least if width * height < least else most) / (width * height)) ** 0.5
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    if min(width, height) < TOKEN_SIDE:
        scale = TOKEN_SIDE / min(width, height)
        width, height = int(width * scale) + 1, int(height * scale) + 1
    return image if (width, height) == image.size else image.resize((width, height), resample)
