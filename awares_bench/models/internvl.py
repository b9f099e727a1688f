"""InternVL 3 and 3.5 as transformers has them (``internvl``; decoders of Qwen2 or Qwen3): tiles of 448 pixels, 256 tokens each.

A picture is stretched to the grid of at most ``max_patches`` tiles whose shape is nearest to its own (12 in the releases), and a small copy of
the whole is added where there is more than one (dynamic resolution of InternVL 1.5, arXiv 2404.16821). Its tokens are one line in the prompt.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from .base import ImageInput
from .tiles import TilingHost


class InternVL(TilingHost):
    """Tiles of a share: that share of ``max_patches``, rounded, at least one. A quarter of 12 is 3, which has room for few shapes: a page of
    3 x 4 tiles becomes a single one. Under ``max_pixels=3211264``, 16 tiles, it becomes 2 x 2.
    """

    model_types = ("internvl",)
    model_class = InternVLForConditionalGeneration
    image_marks = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    lora_targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

    @property
    def decoder_layer(self) -> str:  # type: ignore[override]  # of the decoder's family, which the checkpoint decides
        return type(self.decoder.layers[0]).__name__

    @cached_property
    def tower(self):
        return self.model.model.vision_tower

    @property
    def vision_parts(self) -> tuple[nn.Module, ...]:
        return self.tower, self.model.model.multi_modal_projector

    @property
    def side(self) -> int:
        vision = self.model.config.vision_config
        return round(vision.image_size[0] // vision.patch_size[0] * self.model.config.downsample_ratio)

    @classmethod
    def processor_sizes(cls, config, image_processor) -> dict[str, tuple[int | None, int]]:
        return {"size": (image_processor.size["height"], config.vision_config.image_size[0])}

    @classmethod
    def own_limits(cls, processor) -> tuple[int, int]:
        tile = cls.tile_side(processor) ** 2
        return tile, processor.image_processor.max_patches * tile

    @staticmethod
    def tile_side(processor) -> int:
        return processor.image_processor.size["height"]

    @staticmethod
    def tile_tokens(processor) -> int:
        return processor.image_seq_length

    @classmethod
    def budget(cls, processor, limits: dict[str, int], share: float) -> dict[str, Any]:
        most = limits["longest_edge"] // cls.tile_side(processor) ** 2
        tiles = max(1, round(most * share))
        least = min(processor.image_processor.min_patches, tiles)
        return {"crop_to_patches": True, "min_patches": least, "max_patches": tiles}

    @classmethod
    def count_tiles(cls, processor, size: tuple[int, int], budget: dict[str, Any]) -> int:
        return processor.image_processor.get_number_of_image_patches(size[1], size[0], budget)

    def image_input(self, image: Image.Image, key: str = "", share: float = 1.0) -> ImageInput:
        """inputs: pixel_values (T, 3, S, S), the tiles in raster order and the small copy of the whole."""
        budget = self.budget(self.processor, self.limits, share)
        out = self.processor.image_processor(images=[image], return_tensors="pt", **budget)
        pixels = out["pixel_values"]
        text = self.processor.replace_image_token({"num_patches": [len(pixels)]}, 0)
        return ImageInput({"pixel_values": pixels}, self.runs(len(pixels)), text, key=key)

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output

    @property
    def attention_modules(self) -> list[nn.Module]:
        return [layer.attention for layer in self.tower.encoder.layer]

    def queries_and_keys(self, attention, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return attention.q_norm(attention.q_proj(hidden)), attention.k_norm(attention.k_proj(hidden))
