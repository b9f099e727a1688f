"""DivPrune: the visual tokens that are most unlike one another.

Paper    Alvar et al., CVPR 2025, https://arxiv.org/abs/2503.02175
Code     https://github.com/vbdi/divprune (LLaVA)
Needs    the visual features only: no attention, no text, no training
Cost     one (V, V) cosine matrix, one pass over V for each kept token; the share ``retention`` of the tokens in every decoder layer
Differs  written from the paper for Qwen2.5-VL; float32, per image
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens

from ._greedy import cosines


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Greedy max-min selection on cosine distance; it starts from the token whose nearest neighbour is farthest."""

    def select(self, image: VisualTokens, n: int) -> Tensor:
        """Add, n times, the token whose distance to the nearest chosen one is largest."""
        likeness = cosines(image.features)  # (V, V)
        loneliest = likeness.fill_diagonal_(-torch.inf).amax(1).argmin()
        chosen, nearest = [loneliest], likeness[loneliest].clone()  # (V,) likeness to the most alike chosen token
        nearest[loneliest] = torch.inf
        while len(chosen) < n:
            farthest = nearest.argmin()
            chosen.append(farthest)
            nearest = torch.maximum(nearest, likeness[farthest])
            nearest[farthest] = torch.inf
        return torch.stack(chosen).sort().values
