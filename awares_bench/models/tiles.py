"""What families share that resize a picture to whole tiles, each encoded alone to a fixed number of tokens.

A picture costs the same whatever its size, so a half-size view and a crop are cheaper only because they are given fewer tiles: the share of
the original that they stand for (``Turn.shares``), of the tiles that a whole picture may have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import isqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from awares_bench.errors import CheckpointError, RunError
from awares_bench.methods.pruner import OF_THE_TOWER, VisualTokens

from .attention_scores import column_attention
from .base import HostModel, ImageInput
from .cpu_kernels import onednn_linears

DECODERS = ("llama", "qwen2", "qwen3")
"""``model_type`` of the decoders that are run a layer at a time here; others scale or mask in ways of their own."""

TOGETHER = 32
"""Tiles in one call of the vision encoder: a page and its views, and no more memory than that for a batch of many."""


class TilingHost(HostModel):
    """A family whose pictures are tiles. A run of visual tokens is a tile, in raster order; pruners and pooling see one tile at a time.

    Limits: the checkpoint's own are one tile and the most tiles that its processor is set to. ``max_pixels`` is the pixels of all tiles of
    a picture but the small copy of the whole, rounded down to whole tiles. ``min_pixels`` may be the pixels of a tile at the most.
    """

    provides = frozenset({*OF_THE_TOWER, "decoder_attention", "seed"})
    tiles = True

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        limits: str | None = None,
    ) -> None:
        super().__init__(model, processor, min_pixels, max_pixels, limits)
        text = self.decoder.config
        slides = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if text.model_type not in DECODERS or slides:
            kind = f"{text.model_type} decoder" + (f" with {', '.join(sorted(slides))}" if slides else "")
            raise CheckpointError(
                f"this {self.model_types[0]} checkpoint has a {kind}; known decoders: {', '.join(DECODERS)}, every layer with full attention. "
                "engine=generic runs it as it is"
            )
        tile, least, most = self.tile_side(processor) ** 2, self.limits["shortest_edge"], self.limits["longest_edge"]
        if not least <= tile <= most:
            raise ValueError(
                f"min_pixels is {least:,} and max_pixels {most:,}; this {self.model_types[0]} checkpoint shows every picture in tiles of "
                f"{tile:,} pixels, one at the least, which must lie between the two"
            )
        if self.tile_tokens(processor) != self.side**2:
            raise CheckpointError(
                f"the processor writes {self.tile_tokens(processor)} image tokens a tile, and the model makes {self.side**2}; "
                "copy processor_config.json from the checkpoint that this one was trained from"
            )

    # ------------------------------------------------------------------ what a family writes

    @classmethod
    @abstractmethod
    def own_limits(cls, processor: Any) -> tuple[int, int]:
        """Pixels of a tile, and of the most tiles that the processor is set to."""

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

    @property
    @abstractmethod
    def attention_modules(self) -> list[nn.Module]:
        """The attention of every vision block."""

    @abstractmethod
    def queries_and_keys(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a vision block attends with, twice (T, P, heads x d), from its normed input (T, P, D)."""

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

    def fast_tower(self) -> AbstractContextManager:
        return onednn_linears(*self.vision_parts)

    @torch.no_grad()
    def encode(self, images: list[ImageInput], needs: Iterable[str] = (), block: int = -1) -> list[VisualTokens]:
        if not images:
            return []
        needs = set(needs)
        looks = any(need in OF_THE_TOWER for need in needs)
        tiles = [image.inputs["pixel_values"] for image in images]
        pixels = torch.cat([t.to(self.device, non_blocking=True) for t in tiles]).to(self.dtype)
        watched: AbstractContextManager[dict[str, list[Tensor]]] = self._probed(block, needs) if looks else nullcontext({})
        with self.fast_tower(), watched as seen:
            features = torch.cat([self.features(part) for part in pixels.split(TOGETHER)])
        of_tokens = {name: self._per_token(torch.cat(parts)) for name, parts in seen.items()}
        # a run is a tile; the tiles of a picture have seeds of their own
        places = torch.arange(self.side**2, device=features.device)
        seeds = [
            i.seed + number if "seed" in needs else 0 for i, t in zip(images, tiles, strict=True) for number in range(len(t))
        ]
        out = []
        for at, (tile, seed) in enumerate(zip(features, seeds, strict=True)):
            fields: dict[str, Any] = {name: values[at] for name, values in of_tokens.items()}
            order = places if looks else None
            out.append(VisualTokens(tile, (self.side, self.side), places, seed=seed, tower_order=order, **fields))
        return out

    def _per_token(self, values: Tensor) -> Tensor:
        """Values of the patches of every tile (T, P) or (T, P, d) -> the mean over the patches of each token, (T, n) or (T, n, d).

        A token is a square of neighbouring patches, by the pixel shuffle of these families; what comes before the patches (CLS) is left out.
        """
        per = isqrt(values.shape[1] // self.side**2)  # patches along a side of a token
        patches = values[:, -((self.side * per) ** 2) :].unflatten(1, (self.side, per, self.side, per))
        return patches.mean((2, 4)).flatten(1, 2)

    @contextmanager
    def _probed(self, block: int, needs: set[str]) -> Iterator[dict[str, list[Tensor]]]:
        """Within the block every forward pass of the tower adds to a list for each need: attention that each patch receives (T, P), mean over
        heads and queries; its key (T, P, d), mean over heads; what enters the projector (T, P, d)."""
        modules = self.attention_modules
        seen: dict[str, list[Tensor]] = {need: [] for need in OF_THE_TOWER if need in needs}
        if not -len(modules) <= block < len(modules):
            raise RunError(f"vision block {block} is asked for, and this tower has {len(modules)}")

        def observe(module: Any, args: tuple, kwargs: dict, attention: str, keys: str = "") -> None:
            q, k = self.queries_and_keys(module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            q, k = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k))  # (T, heads, P, d)
            if attention in seen:
                scaling = q.shape[-1] ** -0.5
                seen[attention].append(torch.stack([column_attention(*tile, scaling) for tile in zip(q, k, strict=True)]))
            if keys in seen:
                seen[keys].append(k.mean(1, dtype=torch.float32))

        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            seen["unmerged"].append(out.last_hidden_state)

        hooks = []
        if "attention" in seen or "vision_keys" in seen:
            watch = partial(observe, attention="attention", keys="vision_keys")
            hooks.append(modules[block].register_forward_pre_hook(watch, with_kwargs=True))
        if "middle_attention" in seen:
            watch = partial(observe, attention="middle_attention")
            hooks.append(modules[(len(modules) - 1) // 2].register_forward_pre_hook(watch, with_kwargs=True))
        if "unmerged" in seen:
            hooks.append(self.tower.register_forward_hook(keep))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
