"""HiPrune: objects by a middle vision block, with their neighbours, and registers by the last one.

Paper    Liu et al., 2025, https://arxiv.org/abs/2508.00553
Code     https://github.com/Danielement321/HiPrune (``Qwen2_5_VL/qwen2_5_vl_HiPrune.py``, 6e83a124)
Needs    attention received in the middle and in the last of the vision blocks that see the whole image; no text, no training
Cost     two more QK^T of such blocks; the share ``retention`` of the tokens in every decoder layer
Differs  exactly the budget, neighbours in the picture, an anchor from five tokens on, several images. ``compat=official`` as released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens


@dataclass(frozen=True)
class HiPrune(Pruner):
    """Anchors get most attention in the middle block and keep their four neighbours; the rest of the budget goes by the last block.

    alpha: share of the budget for anchors with their neighbours, five tokens each.
    compat: ``official``: neighbours by number, so across the picture's edges; 1 is taken from the attention of what is chosen, whose mean
        is 1, so that tokens of much attention are chosen twice and fewer stay.
    """

    alpha: float = 0.1
    compat: Literal["corrected", "official"] = "corrected"
    needs = ("attention", "middle_attention")

    def tokens_to_keep(self, visual: int, share: float) -> int:
        """The released code rounds, half to even."""
        return super().tokens_to_keep(visual, share) if self.compat == "corrected" else max(1, round(visual * share))

    def anchors(self, n: int) -> int:
        """How many of ``n`` tokens are anchors."""
        count = round(n * self.alpha / 5)
        return max(count, int(n >= 5)) if self.compat == "corrected" else count

    def around(self, anchors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Anchors and their neighbours: raster places (A,) -> (B,), ascending."""
        (rows, columns), column = grid, anchors % grid[1]
        if self.compat == "official":
            found = [anchors, anchors - 1, anchors + 1, anchors - columns, anchors + columns]
            return torch.cat(found).clamp(0, rows * columns - 1).unique()
        beside = [anchors[column > 0] - 1, anchors[column < columns - 1] + 1]
        across = [anchors[anchors >= columns] - columns, anchors[anchors < (rows - 1) * columns] + columns]
        return torch.cat([anchors, *beside, *across]).unique()

    def select(self, image: VisualTokens, n: int) -> Tensor:
        """Anchors, neighbours, then registers."""
        order = image.middle_attention.argsort(descending=True, stable=True)
        chosen = self.around(order[: self.anchors(n)], image.grid)[:n]
        deep = image.attention * 4 * len(image.features)  # mean 1
        deep = deep.index_put((chosen,), deep[chosen] - 1 if self.compat == "official" else -deep.new_tensor(torch.inf))
        registers = deep.argsort(descending=True, stable=True)[: n - len(chosen)]
        return torch.cat([chosen, registers]).unique()
