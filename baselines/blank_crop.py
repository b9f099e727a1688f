"""Blank crop: AwaRes' own decisions, its crops replaced by grey of the same size; does it read what it fetches?

Paper    none; a control for AwaRes, https://arxiv.org/abs/2603.16932
Code     none
Needs    a checkpoint trained for AwaRes
Cost     exactly AwaRes'
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from awares_bench import AwaRes

GREY = (128, 128, 128)


@dataclass(frozen=True)
class BlankCrop(AwaRes):
    """Fetch what AwaRes asks for and show none of it. Options are AwaRes'."""

    def cut(self, image: Image.Image, names: tuple[str, ...]) -> list[Image.Image]:
        return [Image.new("RGB", crop.size, GREY) for crop in super().cut(image, names)]
