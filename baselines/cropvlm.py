"""CropVLM: a small cropper names one box that helps with the question; the model sees the image and that crop.

Paper    Carvalho and Martins, CVPRW 2026, https://arxiv.org/abs/2511.19820
Code     https://github.com/miguelscarv/cropvlm at 7618d0e, ``generate_bboxes.py`` and ``generate_final_answers.py``
Needs    a cropper trained for it; the model under test stays as it is
Cost     every visual token plus the crop (view=low: a quarter plus the crop); the cropper's own in the aux columns
Differs  a box that cannot be read means no crop and an event, not the pixels 0 to 99; a model under test that cuts pictures into tiles shows the crop in its share of them, not in all
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from awares_bench import Event, EventKind, Policy, Sample, Turn, TurnGenerator
from awares_bench.methods.crop_grid import Box
from awares_bench.methods.crop_turns import note_half_view, without_crops
from awares_bench.methods.images import HALF_SHARE, half, share_of, within
from awares_bench.methods.policy import UNDER_TEST

ASK = "{question}\nOutline the region in the image that would help answer this question."
NOT_NEEDED = "not needed"
BOX_BUDGET = 32
"""Tokens a box may take (the authors' GRPO setting)."""

LONGEST = 2048
"""Longest edge of the authors' cropper, a SmolVLM of 256M, as it is released."""


@dataclass(frozen=True)
class CropVLM(Policy):
    """Ask the cropper for a box, then the model with the image and the crop.

    cropper: checkpoint that proposes the box; ``pretrained``: the model under test does, and its tokens count as its own
    view:    what stands beside the crop: the ``full`` image (the paper) or the ``low`` half-size view
    longest: longer side in pixels of what the cropper sees (the authors train at 2,048); a cropper that cuts pictures into tiles takes the
        share of its tiles that this is of 2,048, squared: 1,024 is 2 x 2 tiles for the authors' SmolVLM, as their ``--longest_edge 1024``
    crop_longest: longer side in pixels of the crop that the model sees, larger ones are shrunk; 0: all its own pixels. The authors' target
        shows every picture at the same size (512), so that a larger box is no free look at the whole; this is that limit
    """

    cropper: str = UNDER_TEST
    view: Literal["full", "low"] = "full"
    longest: int = LONGEST
    crop_longest: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("longest", 1), ("crop_longest", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it is a number of pixels, at least {least}")

    @property
    def models(self) -> dict[str, str]:
        return {"cropper": self.cropper}

    def turns(self, sample: Sample) -> TurnGenerator:
        if len(sample.images) != 1:
            return (yield from without_crops(sample))
        (image,) = sample.images
        ask = ASK.format(question=sample.question.capitalize())
        seen, tiles = within(image, self.longest), min(1.0, (self.longest / LONGEST) ** 2)
        said = yield Turn((seen,), ask, shares=(tiles,), model="cropper", min_reply_tokens=BOX_BUDGET, until=())
        low = self.view == "low"
        views: tuple[Image.Image, ...] = (half(image) if low else image,)
        shares: tuple[float, ...] = (HALF_SHARE if low else 1.0,)
        boxes: tuple[Box, ...] = ()
        if said.text.strip(" .").lower() != NOT_NEEDED:
            try:
                box = parse_box(said.text, *image.size)
            except ValueError as error:
                yield Event(EventKind.MALFORMED_BOX, f"{error}; the image is shown in full, without a crop")
                views, shares = (image,), (1.0,)
            else:
                crop, boxes = image.crop(box), (box,)
                crop = within(crop, self.crop_longest) if self.crop_longest else crop
                views, shares = (*views, crop), (*shares, share_of(crop, image))
        reply = yield sample.ask(views, shares=shares, boxes=boxes)
        if len(views) == 1 and views[0] is not image:
            yield from note_half_view(sample, reply)
        return reply


def parse_box(text: str, width: int, height: int) -> Box:
    """``[x1, y1, x2, y2].`` in percent of the sides -> pixels of a (width, height) image, at least one a side.

    Raises ValueError when the text is not four numbers from 0 to 100 with x1 < x2 and y1 < y2.
    """
    number = r"\s*(\d+(?:\.\d+)?)\s*"
    match = re.search(rf"\[{number},{number},{number},{number}\]", text)
    if not match:
        raise ValueError(f"expected a box [x1, y1, x2, y2] in percent, got {text[:80]!r}")
    x1, y1, x2, y2 = map(float, match.groups())
    if not (x1 < x2 <= 100 and y1 < y2 <= 100):
        raise ValueError(f"expected 0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 100, got {text[:80]!r}")
    left, top = min(round(x1 * width / 100), width - 1), min(round(y1 * height / 100), height - 1)
    return left, top, max(round(x2 * width / 100), left + 1), max(round(y2 * height / 100), top + 1)
