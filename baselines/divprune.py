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
from torch.nn.functional import normalize

from awares_bench import Pruner, VisualTokens


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Greedy max-min selection on cosine distance; it starts from the token whose nearest neighbour is farthest."""

    def select(self, image: VisualTokens, n: int) -> Tensor:
        """Add, n times, the token whose distance to the nearest chosen one is largest."""
        likeness = _cosines(image.features)  # (V, V)
        loneliest = likeness.fill_diagonal_(-torch.inf).amax(1).argmin()
        chosen, nearest = [loneliest], likeness[loneliest].clone()  # (V,) likeness to the most alike chosen token
        nearest[loneliest] = torch.inf
        while len(chosen) < n:
            farthest = nearest.argmin()
            chosen.append(farthest)
            nearest = torch.maximum(nearest, likeness[farthest])
            nearest[farthest] = torch.inf
        return torch.stack(chosen).sort().values


def _cosines(x: Tensor, block: int = 512) -> Tensor:
    """(V, D) -> (V, V) in float32, a block at a time, and symmetric to the bit.

    The two tokens of a closest pair are equally lonely: rounding that differs between (i, j) and (j, i) would choose between them.
    """
    out = torch.empty(len(x), len(x), device=x.device)
    for i in range(0, len(x), block):
        rows = normalize(x[i : i + block].float(), dim=1)
        for j in range(0, i + 1, block):
            part = rows @ normalize(x[j : j + block].float(), dim=1).T
            if j == i:
                part = part.tril() + part.tril(-1).T
            out[i : i + block, j : j + block] = part
            out[j : j + block, i : i + block] = part.T
    return out
