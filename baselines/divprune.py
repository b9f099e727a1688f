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

from awares_bench.method import Pruner, Visual


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Greedy max-min selection on cosine distance; it starts from the token whose nearest neighbour is farthest."""

    def select(self, image: Visual, n: int) -> Tensor:
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
    """(V, D) -> (V, V) in float32; the features are converted a block at a time."""
    out = torch.empty(len(x), len(x), device=x.device)
    norms = torch.cat([b.float().norm(dim=1) for b in x.split(block)]).clamp(min=1e-12)
    for i in range(0, len(x), block):
        rows = x[i : i + block].float()
        for j in range(0, len(x), block):
            out[i : i + block, j : j + block] = rows @ x[j : j + block].float().T
    return out.div_(norms[:, None]).div_(norms)
