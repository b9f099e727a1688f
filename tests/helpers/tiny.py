"""A random Qwen2.5-VL of a few hundred thousand parameters, and prompts with pictures of many sizes."""

from __future__ import annotations

import copy
from functools import cache, lru_cache

import torch
from PIL import Image

from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Session
from awares_bench.methods.conversation import Turn
from awares_bench.methods.pruner import VisualTokens
from awares_bench.models.base import ImageInput
from awares_bench.models.prompt_chunk import PromptChunk
from awares_bench.models.qwen2_5_vl import Qwen2_5_VL, mrope_positions
from awares_bench.training.nano import model as nano

GEOMETRY = nano.Geometry(
    width=64, layers=3, heads=2, kv_heads=1, mlp=96, vision_width=64, vision_depth=4, vision_heads=2, vision_mlp=96
)


@cache
def tiny_tokenizer():
    """The nano tokenizer, which takes a second to train, made once a process."""
    return nano.nano_tokenizer()


@lru_cache(maxsize=1)
def tiny_vlm() -> LocalModel:
    """Weights large enough for attention to matter: the default initialisation hides mistakes."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = nano.build(tokenizer, GEOMETRY).float().eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15 if "patch_embed" not in name else 0.02)
    return LocalModel(Qwen2_5_VL(model, nano.processor(tokenizer)))


def tiny_copy() -> LocalModel:
    """The same weights in a model of their own, for tests that train."""
    return LocalModel(tiny_vlm().host.on(copy.deepcopy(tiny_vlm().host.model)))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed * 100003 + width * 1009 + height)
    values = torch.randint(0, 256, (max(1, height // 7), max(1, width // 7), 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.NEAREST)


# ---------------------------------------------------------------------- a host's parts, by patches and grids


def image_input(vlm: LocalModel, patches: torch.Tensor, grid: tuple[int, int, int]) -> ImageInput:
    """What the processor would make of a picture with these patches (P, 1176) and this grid (1, rows, columns)."""
    _, rows, columns = grid
    run = (rows // 2, columns // 2)
    inputs = {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
    return ImageInput(inputs, (run,), vlm.host.placeholder * (run[0] * run[1]))


def pixels(vlm: LocalModel, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int, int], list]:
    """RGB picture -> patches, grid, events."""
    made = vlm.host.image_input(image)
    return made.inputs["pixel_values"], tuple(made.inputs["image_grid_thw"][0].tolist()), list(made.events)


def chunk_ids(vlm: LocalModel, session: Session, turn: Turn) -> list[int]:
    """Token ids that a turn adds to a session."""
    images = [vlm.host.image_input(image) for image in turn.images]
    return session.unfed_tokens + vlm.host.render([*session.turns, turn], session.replies, images)


def see(vlm: LocalModel, patches: list, grids: list, pruner=None) -> list[VisualTokens]:
    return vlm.see([image_input(vlm, p, g) for p, g in zip(patches, grids, strict=True)], pruner)


def encode(vlm: LocalModel, patches: list, grids: list) -> torch.Tensor:
    return torch.cat([image.features for image in see(vlm, patches, grids)])


def embedded(vlm: LocalModel, ids: list[int], grids: list, images: list[VisualTokens], start: int = 0) -> PromptChunk:
    """Token ids and the images among them -> what the decoder gets."""
    return vlm.host.chunk(ids, [image_input(vlm, torch.zeros(1, 1176), grid) for grid in grids], images, start)


def positions(ids: list[int], grids: list, image_token: int, start: int = 0) -> tuple[torch.Tensor, int]:
    return mrope_positions(ids, [(rows // 2, columns // 2) for _, rows, columns in grids], image_token, start)
