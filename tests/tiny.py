"""A random Qwen2.5-VL of a few hundred thousand parameters, and prompts with pictures of many sizes."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from PIL import Image

from awares_bench.inference.local_model import VLM
from awares_bench.training.nano import model as nano

GEOMETRY = nano.Geometry(
    width=64, layers=3, heads=2, kv_heads=1, mlp=96, vision_width=64, vision_depth=4, vision_heads=2, vision_mlp=96
)


@lru_cache(maxsize=1)
def tiny_vlm() -> VLM:
    """Weights large enough for attention to matter: the default initialisation hides mistakes."""
    torch.manual_seed(0)
    tokenizer = nano.nano_tokenizer()
    model = nano.build(tokenizer, GEOMETRY).float().eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15 if "patch_embed" not in name else 0.02)
    return VLM(model, nano.processor(tokenizer))


def tiny_copy() -> VLM:
    """The same weights in a model of their own, for tests that train."""
    return VLM(copy.deepcopy(tiny_vlm().model), tiny_vlm().processor)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed * 100003 + width * 1009 + height)
    values = torch.randint(0, 256, (max(1, height // 7), max(1, width // 7), 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.NEAREST)
