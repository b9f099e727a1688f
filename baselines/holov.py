"""HoloV: a quota of visual tokens for every band of the image, so that no band is lost.

Paper    Zou et al., NeurIPS 2025, https://arxiv.org/abs/2510.02912
Code     https://github.com/obananas/HoloV (``qwen-model-HoloV``, 1d2e65e9)
Needs    attention received in the last vision block; no text, no training
Cost     one more QK^T of that block, in float32 blocks; the share ``retention`` of the tokens in every decoder layer
Differs  scores in raster order (released: window order, near random), the image's own span, raster output, no zero padding. ``compat=official`` as released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from awares_bench.attention_scores import window_order
from awares_bench.method import Pruner, Visual

ALPHA, BETA, SCALE, EPSILON = 1.0, 0.09, 1e3, 1e-6
"""Weights of attention and of diversity in a band's score, scale of attention, guard of divisions: those of the released code."""


@dataclass(frozen=True)
class HoloV(Pruner):
    """Bands of the flattened image share the budget by their mean attention; within a band the most attended tokens stay.

    The released diversity term is rescaled to the band's mean attention, so it multiplies every band's score by the same
    1.09 and cannot change a quota; it is not computed.

    compat: ``corrected``; ``official``, as released; ``fixed``, the released code with its scores in raster order and its
    span on the image, still ordered by attention and padded with zeros.
    """

    compat: Literal["corrected", "fixed", "official"] = "corrected"
    needs = ("attention",)

    @property
    def offset(self) -> int:
        """The released span begins one token early, on the vision-start mark."""
        return -1 if self.compat == "official" else 0

    def budget(self, visual: int, share: float) -> int:
        """The released code rounds the product as floats do."""
        return super().budget(visual, share) if self.compat == "corrected" else max(1, int(visual * share))

    def score(self, image: Visual) -> Tensor:
        """Attention received; the released code gives it to the wrong tokens."""
        if self.compat != "official":
            return image.attention
        return image.attention[window_order(*image.grid).to(image.attention.device)]

    def bands(self, visual: int, n: int) -> int:
        """Bands that the image is cut into, in proportion to how much of it goes."""
        return min(visual, max(1, int((1024 / 576) * visual / n)))

    def reduce(self, image: Visual, n: int) -> tuple[Tensor, Tensor]:
        """Quotas by band, then the most attended tokens of each."""
        attention, total = self.score(image).cpu(), len(image.features)  # one copy, then no waiting for the GPU
        bands = self.bands(total, n)
        parts = attention.split([total // bands + (i < total % bands) for i in range(bands)])
        chosen, start = [], 0
        for part, quota in zip(parts, self.quotas(parts, n), strict=True):
            whole = quota >= len(part)
            best = torch.arange(len(part)) if whole else part.argsort(descending=True, stable=True)[:quota]
            chosen.append(start + (best.sort().values if self.compat == "corrected" else best))
            start += len(part)
        indices = torch.cat(chosen).to(image.features.device)
        missing = n - len(indices)  # released: full bands are made up for with zeros
        zeros = image.features.new_zeros((missing, image.features.shape[1]))
        return torch.cat([image.features[indices], zeros]), torch.cat([indices, indices.new_full((missing,), -1)])

    def quotas(self, parts: tuple[Tensor, ...], n: int) -> list[int]:
        """Tokens to keep of each band, by its mean attention; corrected: what a full band cannot use goes to the largest others."""
        sizes = torch.tensor([len(p) for p in parts])
        score = torch.stack([(ALPHA + BETA) * SCALE * p.mean() for p in parts])
        if self.compat != "corrected":
            score = torch.where(sizes > 1, score, torch.stack([p.mean() for p in parts]))  # released: one token is not scaled
        weight = score / (score.sum() + EPSILON)
        order = weight.argsort(descending=True, stable=True)
        quota = (weight * n).floor().long()
        quota[order[: n - int(quota.sum())]] += 1
        while self.compat == "corrected" and int(over := (quota - sizes).clamp(min=0).sum()):
            quota = torch.minimum(quota, sizes)
            room = order[quota[order] < sizes[order]][: int(over)]
            quota[room] += int(over) // len(room)
            quota[room[: int(over) % len(room)]] += 1
        return quota.tolist()
