"""What families share that resize a picture to whole tiles, each encoded alone to a fixed number of tokens.

A picture costs the same whatever its size, so a half-size view and a crop are cheaper only because they are given fewer tiles: the share of
the original that they stand for (``Turn.shares``), of the tiles that a whole picture may have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from awares_bench.errors import CheckpointError, RunError
from awares_bench.methods.pruner import VisualTokens

from .attention_scores import column_attention
from .base import MAX_PIXELS, MIN_PIXELS, HostModel, ImageInput
from .cpu_kernels import onednn_linears

TOGETHER = 32
"""Tiles in one call of the vision encoder: a page and its views, and no more memory than that for a batch of many."""


class TilingHost(HostModel):
    """A family whose pictures are tiles. A run of visual tokens is a tile, in raster order; pruners and pooling see one tile at a time.

    Limits: ``max_pixels`` lowers the most tiles of a picture to what it has room for, never above the checkpoint's own setting, which
    the default of ``max_pixels`` leaves as it is. ``min_pixels`` is met by the smallest picture, which has a tile.
    """

    provides = frozenset({"attention", "vision_keys", "decoder_attention", "seed"})
    tiles = True

    def __init__(
        self, model: PreTrainedModel, processor: Any, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
    ) -> None:
        super().__init__(model, processor, min_pixels, max_pixels)
        side = self.tile_side(processor)
        if not min_pixels <= side**2 <= max_pixels:
            raise ValueError(
                f"min_pixels is {min_pixels:,} and max_pixels {max_pixels:,}; a {self.model_types[0]} checkpoint shows pictures in tiles of "
                f"{side} x {side} = {side**2:,} pixels, one at the least, which must lie between the two"
            )
        if self.tile_tokens(processor) != self.side**2:
            raise CheckpointError(
                f"the processor writes {self.tile_tokens(processor)} image tokens a tile, and the model makes {self.side**2}; "
                "copy processor_config.json from the checkpoint that this one was trained from"
            )

    # ------------------------------------------------------------------ what a family writes

    @staticmethod
    @abstractmethod
    def tile_side(processor: Any) -> int:
        """Pixels a side of a tile."""

    @staticmethod
    @abstractmethod
    def tile_tokens(processor: Any) -> int:
        """Image tokens that the processor writes for a tile."""

    @classmethod
    @abstractmethod
    def budget(cls, processor: Any, limits: dict[str, int], share: float) -> dict[str, Any]:
        """What the picture processor is told for a picture that stands for ``share`` of the original."""

    @classmethod
    @abstractmethod
    def count_tiles(cls, processor: Any, size: tuple[int, int], budget: dict[str, Any]) -> int:
        """Tiles of a picture of ``size`` (width, height) under a ``budget``, the small copy of the whole included."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Tiles (T, 3, S, S) -> their visual tokens (T, n, D) in raster order."""

    @abstractmethod
    def attention_module(self, block: int) -> nn.Module:
        """The attention of a vision block."""

    @abstractmethod
    def queries_and_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a vision block attends with, twice (T, N, heads x d), from its normed input (T, N, D)."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Visual tokens along a side of a tile."""

    # ------------------------------------------------------------------ shared

    @classmethod
    def count_tokens(cls, processor, limits: dict[str, int], image: Image.Image, share: float = 1.0) -> int:
        budget = cls.budget(processor, limits, share)
        return cls.count_tiles(processor, image.size, budget) * cls.tile_tokens(processor)

    def runs(self, tiles: int) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the runs of so many tiles."""
        return ((self.side, self.side),) * tiles

    @torch.no_grad()
    def encode(self, images: list[ImageInput], needs: Iterable[str] = (), block: int = -1) -> list[VisualTokens]:
        if not images:
            return []
        attention, keys = "attention" in needs, "vision_keys" in needs
        tiles = [image.inputs["pixel_values"] for image in images]
        pixels = torch.cat([t.to(self.device, non_blocking=True) for t in tiles]).to(self.dtype)
        with self.fast_tower(), self._probed(block, attention, keys) if attention or keys else nullcontext() as probe:
            features = torch.cat([self.features(part) for part in pixels.split(TOGETHER)])
        # a run is a tile; the tiles of a picture have seeds of their own
        n = self.side**2
        places = torch.arange(n, device=features.device)
        order = places if probe else None
        seeds = [
            i.seed + number if "seed" in needs else 0 for i, t in zip(images, tiles, strict=True) for number in range(len(t))
        ]
        received, mean_keys = (self._per_token(values) for values in (probe.attention, probe.keys)) if probe else (None, None)
        return [
            VisualTokens(
                tile,
                (self.side, self.side),
                places,
                None if received is None else received[at],
                None if mean_keys is None else mean_keys[at],
                seed=seed,
                tower_order=order,
            )
            for at, (tile, seed) in enumerate(zip(features, seeds, strict=True))
        ]

    def fast_tower(self) -> AbstractContextManager:
        return onednn_linears(*self.vision_parts)

    @property
    def vision_parts(self) -> tuple[nn.Module, ...]:
        """The vision encoder, and what stands between it and the decoder."""
        return (self.tower,)

    def _per_token(self, parts: list[Tensor]) -> Tensor | None:
        """Values of the patches of every tile (T, P) or (T, P, d), in float32 -> the mean over the patches of each token, (T, n) or (T, n, d).

        A token is a square of neighbouring patches, by the pixel shuffle of these families; what comes before the patches (CLS) is left out.
        """
        if not parts:
            return None
        values = torch.cat(parts)
        per = round((values.shape[1] // self.side**2) ** 0.5)  # patches along a side of a token
        patches = values[:, -((self.side * per) ** 2) :].unflatten(1, (self.side, per, self.side, per))
        return patches.mean((2, 4)).flatten(1, 2)

    @contextmanager
    def _probed(self, block: int, attention: bool, keys: bool) -> Iterator[_Probe]:
        """Within the block, vision block ``block`` (and no other) leaves what it attends with at every forward pass."""
        module, probe = self.attention_module(block), _Probe()

        def observe(_: nn.Module, args: tuple, kwargs: dict) -> None:
            q, k = self.queries_and_keys(module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            q, k = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k))  # (T, heads, N, d)
            if attention:
                scaling = q.shape[-1] ** -0.5
                probe.attention.append(torch.stack([column_attention(*tile, scaling) for tile in zip(q, k, strict=True)]))
            if keys:
                probe.keys.append(k.mean(1, dtype=torch.float32))

        hook = module.register_forward_pre_hook(observe, with_kwargs=True)
        try:
            yield probe
        finally:
            hook.remove()

    def block_number(self, block: int, blocks: int) -> int:
        """The number of a vision block, counted from the end where it is negative. Raises RunError for one that is not there."""
        if not -blocks <= block < blocks:
            raise RunError(f"vision block {block} is asked for, and this tower has {blocks}")
        return block % blocks


@dataclass
class _Probe:
    """What one vision block leaves behind, a tensor for each call."""

    attention: list[Tensor] = field(default_factory=list)
    """(T, N) attention that each patch receives, mean over heads and queries."""

    keys: list[Tensor] = field(default_factory=list)
    """(T, N, d) key of each patch, mean over heads."""
