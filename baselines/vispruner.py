"""VisPruner: half of the budget to the most attended tokens, half to what is left after removing near-duplicates.

Paper    Zhang et al., ICCV 2025, https://arxiv.org/abs/2412.01818
Code     https://github.com/Theia-4869/VisPruner (LLaVA; aefa01ad; its issue 1 has the recipe for Qwen2.5-VL)
Needs    attention received in the last vision block; no text, no training
Cost     one more QK^T of that block, one (V, V) cosine matrix, (V - n) / 8 rounds; the share ``retention`` of the tokens in every decoder layer
Differs  any budget (released: an even rest, and at least 8 diverse tokens), several images. ``compat=angelslim``: that port's algorithm
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens

from ._greedy import cosines

ROUND = 8
"""Tokens that a round drops: as released."""


@dataclass(frozen=True)
class VisPruner(Pruner):
    """The most attended tokens stay; the rest is dealt into two hands, and of one the tokens most like any of the other go, until few enough.

    important: share of the budget that goes by attention.
    compat: ``corrected`` deals in the order of attention, as the authors and LightCompress do; ``angelslim`` in raster order before
        every round, another algorithm under the same name.
    """

    important: float = 0.5
    compat: Literal["corrected", "angelslim"] = "corrected"
    needs = ("attention",)

    def counts(self, visual: int, n: int) -> int:
        """How many of ``n`` tokens go by attention."""
        if self.compat == "angelslim":
            return max(0, min(round(n * self.important), n - 1))
        most = int(n * self.important)
        return most + (most < n and (visual - most) % 2)  # an even number is left to be dealt

    def select(self, image: VisualTokens, n: int) -> Tensor:
        """Rounds of duplicate removal among what attention did not choose."""
        order, most = image.attention.argsort(descending=True, stable=True), self.counts(len(image.features), n)
        rest, alike = order[most:], cosines(image.features)
        while (over := len(rest) - (n - most)) > 0:
            if self.compat == "angelslim":
                rest = rest.sort().values
            a, b = rest[0::2], rest[1::2]
            drop = min(ROUND, len(b), over) if len(b) else over
            near = alike[a[:, None], b].amax(1) if len(b) else image.attention[a]
            rest = torch.cat([a[near.argsort(descending=True, stable=True)[drop:]], b])
        return torch.cat([order[:most], rest]).sort().values
