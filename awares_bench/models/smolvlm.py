"""SmolVLM and SmolVLM2 (``smolvlm``; the first SmolVLM is ``idefics3``) and Idefics3: tiles with text between them.

A picture is resized to a longest edge, up or down, cut into square tiles, and a small copy of the whole is added where there is more than
one (Idefics3, arXiv 2408.12637; SmolVLM, arXiv 2504.05299). Each tile has a mark of its row and column before it in
the prompt, so that its tokens are a run of their own: 81 of 384 pixels (2.2B), 64 of 512 (256M and 500M), 169 of 364 (Idefics3-8B).
"""

from __future__ import annotations

from functools import cached_property
from math import ceil, isqrt
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from .base import ImageInput
from .tiles import TilingHost

LARGEST = 4096
"""Pixels of the longest edge that the processors do not go beyond."""


class Idefics3(TilingHost):
    """Tiles of a share: the longest edge times the root of the share, in whole tiles, at least one. A quarter of 4 x 4 is 2 x 2.

    ``max_pixels`` is the square of the longest edge, which is rounded down to whole tiles where it is not the checkpoint's own.
    """

    model_types = ("idefics3",)
    model_class = Idefics3ForConditionalGeneration
    image_marks = (
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    )
    lora_targets = r".*text_model.*\.(q|k|v|o|gate|up|down)_proj"
    decoder_layer = "LlamaDecoderLayer"

    @cached_property
    def decoder(self):
        return self.model.model.text_model

    @cached_property
    def tower(self):
        return self.model.model.vision_model

    @property
    def vision_parts(self) -> tuple[nn.Module, ...]:
        return self.tower, self.model.model.connector

    @property
    def side(self) -> int:
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size // self.model.config.scale_factor

    @classmethod
    def processor_sizes(cls, config, image_processor) -> dict[str, tuple[int | None, int]]:
        return {"max_image_size": (image_processor.max_image_size["longest_edge"], config.vision_config.image_size)}

    @classmethod
    def own_limits(cls, processor) -> tuple[int, int]:
        edge, tile = processor.image_processor.size["longest_edge"], cls.tile_side(processor)
        return tile**2, max(edge, tile) ** 2

    @staticmethod
    def tile_side(processor) -> int:
        return processor.image_processor.max_image_size["longest_edge"]

    @staticmethod
    def tile_tokens(processor) -> int:
        return processor.image_seq_len

    @classmethod
    def budget(cls, processor, limits: dict[str, int], share: float) -> dict[str, Any]:
        tile, most = cls.tile_side(processor), processor.image_processor.size["longest_edge"]
        if limits["longest_edge"] != cls.own_limits(processor)[1]:
            most = max(1, min(LARGEST, isqrt(limits["longest_edge"])) // tile) * tile
        if share < 1:
            most = max(1, round(most / tile * share**0.5)) * tile
        return {"size": {"longest_edge": most}}

    @classmethod
    def count_tiles(cls, processor, size: tuple[int, int], budget: dict[str, Any]) -> int:
        if not processor.image_processor.do_image_splitting:
            return 1
        width, height = _whole_tiles(*size, budget["size"]["longest_edge"], cls.tile_side(processor))
        return width * height + (width * height > 1)

    def image_input(self, image: Image.Image, key: str = "", share: float = 1.0) -> ImageInput:
        """inputs: pixel_values (T, 3, S, S), the tiles in raster order and the small copy of the whole."""
        budget = self.budget(self.processor, self.limits, share)
        out = self.processor.image_processor(images=[[image]], return_tensors="pt", return_row_col_info=True, **budget)
        pixels = out["pixel_values"][0]
        return ImageInput({"pixel_values": pixels}, self.runs(len(pixels)), self.processor.replace_image_token(out, 0), key=key)

    def features(self, pixels: Tensor) -> Tensor:
        # not get_image_features, which takes a tile of zeros for padding and drops it
        return self.model.model.connector(self.tower(pixel_values=pixels).last_hidden_state)

    @property
    def attention_modules(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.tower.encoder.layers]

    def queries_and_keys(self, attention, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return attention.q_proj(hidden), attention.k_proj(hidden)


class SmolVLM(Idefics3):
    """As Idefics3; its processor needs the package num2words, for videos, also where there are none."""

    model_types = ("smolvlm",)
    model_class = SmolVLMForConditionalGeneration


def _whole_tiles(width: int, height: int, edge: int, tile: int) -> tuple[int, int]:
    """Columns and rows of tiles of a picture whose longest side becomes ``edge``: the processor's two resizings, with its rounding.

    Its own ``get_number_of_image_patches`` leaves out the second, which counts where ``edge`` is not whole tiles.
    """
    ratio = width / height
    if width >= height:
        width, height = edge, int(edge / ratio)
        height = max(1, height + height % 2)
    else:
        width, height = int(edge * ratio), edge
        width = max(1, width + width % 2)
    ratio = width / height
    if width >= height:
        columns = ceil(width / tile)
        return columns, ceil(int(columns * tile / ratio) / tile)
    rows = ceil(height / tile)
    return ceil(int(rows * tile * ratio) / tile), rows
