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

import numpy as np
import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens
from awares_bench.methods.pruner import ReleasedQuirks

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
    def quirks(self) -> ReleasedQuirks:
        """The released span begins one token early, on the vision-start mark."""
        return ReleasedQuirks(span_offset=-1 if self.compat == "official" else 0)

    def tokens_to_keep(self, visual: int, share: float) -> int:
        """The released code rounds the product as floats do."""
        return super().tokens_to_keep(visual, share) if self.compat == "corrected" else max(1, int(visual * share))

    def score(self, image: VisualTokens) -> Tensor:
        """Attention received; the released code gives it to the wrong tokens."""
        if self.compat != "official":
            return image.attention
        return image.attention[image.tower_order]

    def bands(self, visual: int, n: int) -> int:
        """Bands that the image is cut into, in proportion to how much of it goes."""
        return min(visual, max(1, int((1024 / 576) * visual / n)))

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        """Quotas by band, then the most attended tokens of each; in NumPy, whose small steps are cheap."""
        attention, total = self.score(image).cpu().numpy(), len(image.features)  # one copy, then no waiting for the GPU
        bands = self.bands(total, n)
        sizes = np.full(bands, total // bands)
        sizes[: total % bands] += 1
        starts = sizes.cumsum() - sizes
        quota = self.quotas(np.add.reduceat(attention, starts) / sizes.astype(np.float32), sizes, n)
        band = np.repeat(np.arange(bands), sizes)
        # best first within each band, the first of equals first; a band that goes on whole stays in order
        order = np.lexsort((np.where(quota < sizes, -1, 0)[band] * attention, band))
        chosen = order[np.arange(total) - starts[band] < quota[band]]
        indices = torch.from_numpy(np.sort(chosen) if self.compat == "corrected" else chosen).to(image.features.device)
        features, missing = image.features[indices], n - len(indices)
        if not missing:
            return features, indices
        zeros = features.new_zeros((missing, features.shape[1]))  # released: full bands are made up for with zeros
        return torch.cat([features, zeros]), torch.cat([indices, indices.new_full((missing,), -1)])

    def quotas(self, mean: np.ndarray, sizes: np.ndarray, n: int) -> np.ndarray:
        """Tokens to keep of each band, by its mean attention; corrected: what a full band cannot use goes to the largest others."""
        score = np.float32((ALPHA + BETA) * SCALE) * mean
        if self.compat != "corrected":
            score = np.where(sizes > 1, score, mean)  # released: one token is not scaled
        weight = score / (score.sum() + np.float32(EPSILON))
        order = np.argsort(-weight, kind="stable")
        quota = (weight * np.float32(n)).astype(int)  # rounded down: no weight is negative
        quota[order[: n - quota.sum()]] += 1
        while self.compat == "corrected" and (over := int(np.maximum(quota - sizes, 0).sum())):
            quota = np.minimum(quota, sizes)
            room = order[quota[order] < sizes[order]][:over]
            quota[room] += over // len(room)
            quota[room[: over % len(room)]] += 1
        return quota
