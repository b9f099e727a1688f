"""Qwen2.5-VL: native resolution, M-RoPE, a vision tower with windows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from awares_bench.methods.conversation import Event, EventKind
from awares_bench.methods.pruner import OF_THE_TOWER, VisualTokens

from .attention_scores import raster_order, window_order
from .base import HostModel, ImageInput
from .qwen_vision import VisionProbe, probed, windowed_attention

MAX_ASPECT = 200
"""Qwen2.5-VL's processor refuses images longer than 200 times their width (transformers ``smart_resize``)."""


class Qwen2_5_VL(HostModel):
    model_types = ("qwen2_5_vl",)
    model_class = Qwen2_5_VLForConditionalGeneration
    provides = frozenset({*OF_THE_TOWER, "decoder_attention", "seed"})
    position_axes = 3
    image_marks: ClassVar[tuple[str, ...]] = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    lora_targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    decoder_layer = "Qwen2_5_VLDecoderLayer"
    stock_packages: ClassVar[tuple[str, ...]] = ("qwen_vl_utils",)

    @classmethod
    def accepted(cls, image: Image.Image) -> tuple[Image.Image, list[Event]]:
        return within_aspect(image)

    @classmethod
    def count_tokens(cls, processor, limits: dict[str, int], image: Image.Image, share: float = 1.0) -> int:
        image, _ = cls.accepted(image)
        ip = processor.image_processor
        given = {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}  # it does not read ``size``
        return ip.get_number_of_image_patches(image.height, image.width, given) // ip.merge_size**2

    @classmethod
    def processor_sizes(cls, config, image_processor) -> dict[str, tuple[int | None, int]]:
        vision = config.vision_config
        sizes = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
        return {name: (getattr(image_processor, name, None), size) for name, size in sizes.items()}

    def image_input(self, image: Image.Image, key: str = "", share: float = 1.0) -> ImageInput:
        """inputs: pixel_values (P, 1176) and image_grid_thw (1, 3), the rows and columns in patches."""
        image, events = self.accepted(image)
        ip = self.processor.image_processor
        out = ip(images=[image], size=self.limits, return_tensors="pt")
        _, rows, columns = out["image_grid_thw"][0].tolist()
        run = (rows // ip.merge_size, columns // ip.merge_size)
        inputs = {name: out[name] for name in ("pixel_values", "image_grid_thw")}
        return ImageInput(inputs, (run,), self.placeholder * (run[0] * run[1]), tuple(events), key)

    def positions(self, ids: list[int], images: list[ImageInput], start: int = 0) -> tuple[Tensor, int]:
        return mrope_positions(ids, [image.runs[0] for image in images], self.image_token, start)

    def fast_tower(self) -> AbstractContextManager:
        return windowed_attention(self.tower)

    @torch.inference_mode()
    def encode(self, images: list[ImageInput], needs: Iterable[str] = (), block: int = -1) -> list[VisualTokens]:
        if not images:
            return []
        needs = set(needs)
        looks = any(need in OF_THE_TOWER for need in needs)
        # one call for all pictures: pixels concatenated, pictures told apart by their grids
        pixels = torch.cat([i.inputs["pixel_values"].to(self.device, non_blocking=True) for i in images]).to(self.dtype)
        grids = torch.cat([i.inputs["image_grid_thw"] for i in images]).to(self.device)
        with self.fast_tower(), probed(self.tower, block, needs) if looks else nullcontext() as probe:
            out = self.tower(pixels, grid_thw=grids)
        added = getattr(out, "deepstack_features", None)
        return runs_of(out.pooler_output, images, probe, needs, self.window, torch.stack(list(added)) if added else None)

    @property
    def window(self) -> int:
        """Side of an attention window of the tower in visual tokens; 0 without windows."""
        vision = self.model.config.vision_config
        return vision.window_size // vision.spatial_merge_size // vision.patch_size


def runs_of(
    features: Tensor,
    images: list[ImageInput],
    probe: VisionProbe | None,
    needs: Iterable[str],
    window: int,
    deepstack: Tensor | None = None,
) -> list[VisualTokens]:
    """Features (V, D) of several pictures and what the probe holds -> the visual tokens of each, in raster order.

    deepstack: (N, V, D), what is added after the first decoder layers.
    """
    out, start = [], 0
    for image in images:
        ((rows, columns),) = image.runs
        run = slice(start, start + rows * columns)
        seen: dict[str, Any] = {}
        if probe is not None:
            order = raster_order(rows, columns, window, features.device)
            values = {"attention": probe.attention, "vision_keys": probe.keys, "unmerged": probe.unmerged}
            values["middle_attention"] = None if probe.middle is None else probe.middle.attention
            seen = {name: _per_token(of_patches, len(features), run, order) for name, of_patches in values.items()}
            seen["tower_order"] = window_order(rows, columns, window, features.device)
        places = torch.arange(rows * columns, device=features.device)
        seed = image.seed if "seed" in needs else 0
        added = None if deepstack is None else deepstack[:, run]
        out.append(VisualTokens(features[run], (rows, columns), places, deepstack=added, seed=seed, **seen))
        start = run.stop
    return out


def _per_token(values: Tensor | None, total: int, run: slice, order: Tensor) -> Tensor | None:
    """Values of all patches in the tower's order -> the mean over the patches of each token of ``run``, in raster order.

    total: tokens of all pictures. order: the place in the tower's order of each token in raster order.
    """
    if values is None:
        return None
    return values.unflatten(0, (total, len(values) // total))[run].mean(1)[order]


def mrope_positions(ids: list[int], runs: list[tuple[int, int]], image_token: int, start: int = 0) -> tuple[Tensor, int]:
    """M-RoPE positions (3, L) of a chunk that begins at position ``start``, and the position after it.

    Text advances all three axes by one. An image's tokens share their time, count rows and columns from where the text
    stopped, and the text goes on after the larger of the two. Equal to Qwen2.5-VL's ``get_rope_index`` (tested), which
    cannot start in mid-conversation. runs: rows and columns of each image in tokens.
    """
    out, at, i, left = np.empty((3, len(ids)), dtype=np.int64), start, 0, iter(runs)
    marked = [*ids, image_token]
    while i < len(ids):
        if ids[i] == image_token:
            rows, columns = next(left)
            end = i + rows * columns
            out[0, i:end], (out[1, i:end], out[2, i:end]) = at, at + np.indices((rows, columns)).reshape(2, -1)
            at += max(rows, columns)
        else:
            end = marked.index(image_token, i)
            out[:, i:end] = np.arange(at, at + end - i)
            at += end - i
        i = end
    return torch.from_numpy(out), at


def within_aspect(image: Image.Image) -> tuple[Image.Image, list[Event]]:
    """Pad the short side with white until the processor accepts the shape; the pixels of the image stay as they are."""
    w, h = image.size
    need = -(-max(w, h) // (MAX_ASPECT - 1))
    if min(w, h) >= need:
        return image, []
    canvas = Image.new("RGB", (max(w, need), max(h, need)), (255, 255, 255))
    canvas.paste(image, (0, 0))
    return canvas, [
        Event(EventKind.IMAGE_PADDED, f"{w}x{h} padded to {canvas.width}x{canvas.height}: longer than 1:{MAX_ASPECT}")
    ]
