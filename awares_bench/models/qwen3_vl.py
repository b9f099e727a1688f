"""Qwen3-VL, dense and mixture of experts: patches of 16 pixels, a tower without windows, DeepStack.

DeepStack (arXiv 2406.04334): features of three inner vision blocks are added to the visual tokens after the first three decoder layers.
``Qwen2_5_VL.encode`` hands them on where a tower has them; a pruner's cut drops those of the tokens that it drops.
Released limits are 65,536 to 16,777,216 pixels (``preprocessor_config.json``): 64 to 16,384 tokens of 32 x 32 pixels, so that a picture of
112 x 112 costs as much as one of 256 x 256.
"""

from __future__ import annotations

from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from .limits import areas
from .qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    model_types = ("qwen3_vl",)
    model_class = Qwen3VLForConditionalGeneration
    default_limits = areas(32, 64, 16384)
    decoder_layer = "Qwen3VLTextDecoderLayer"


class Qwen3VLMoe(Qwen3VL):
    """The experts are parameters of three axes, which adapters by module name do not reach: LoRA trains attention, and no expert."""

    model_types = ("qwen3_vl_moe",)
    model_class = Qwen3VLMoeForConditionalGeneration
    lora_targets = r".*language_model.*\.(q|k|v|o)_proj"
    decoder_layer = "Qwen3VLMoeTextDecoderLayer"
