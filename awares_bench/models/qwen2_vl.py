"""Qwen2-VL: as Qwen2.5-VL, with a vision tower whose blocks all see the whole picture."""

from __future__ import annotations

from transformers import Qwen2VLForConditionalGeneration

from .qwen2_5_vl import Qwen2_5_VL


class Qwen2VL(Qwen2_5_VL):
    model_types = ("qwen2_vl",)
    model_class = Qwen2VLForConditionalGeneration
    decoder_layer = "Qwen2VLDecoderLayer"

    @property
    def window(self) -> int:
        return 0
