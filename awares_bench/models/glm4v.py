"""GLM-4.1V and GLM-4.6V: built as Qwen2-VL is, with learned places in the tower and a convolution before its merger.

Their processor counts a picture as two frames, so its limits, and ``min_pixels`` and ``max_pixels`` here, are twice the pixels of a picture.
Without others the checkpoint's own hold; transformers' defaults are 12,544 to 11,760,000, which is 8 to 7,500 tokens of 28 x 28. A template that thinks is told not to; GLM-4.1V-9B-Thinking's cannot be.
"""

from __future__ import annotations

from PIL import Image
from transformers import Glm4vForConditionalGeneration, Glm46VForConditionalGeneration

from .limits import areas
from .qwen2_vl import Qwen2VL


class Glm4v(Qwen2VL):
    model_types = ("glm4v",)
    model_class = Glm4vForConditionalGeneration
    default_limits = areas(28, 16, 15000)
    image_marks = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_up_proj|down_proj)"
    decoder_layer = "Glm4vTextDecoderLayer"
    stock_packages = ()

    @classmethod
    def own_limits(cls, processor) -> tuple[int, int]:
        size = processor.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    @classmethod
    def count_tokens(cls, processor, limits: dict[str, int], image: Image.Image, share: float = 1.0) -> int:
        image, _ = cls.accepted(image)
        ip = processor.image_processor
        return ip.get_number_of_image_patches(image.height, image.width, {"size": limits}) // ip.merge_size**2


class Glm46V(Glm4v):
    """The same layers under another name."""

    model_types = ("glm46v",)
    model_class = Glm46VForConditionalGeneration
