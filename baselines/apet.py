"""ApET: the tokens that a small basis of other tokens explains worst; what goes is merged into them.

Paper    Ma et al., 2026, https://arxiv.org/abs/2602.19870
Code     https://github.com/MaQianKun0/ApET (``qwen/model``, 70cc01b2)
Needs    the visual features only: no attention, no text, no training
Cost     ``basis`` passes over the features, a (V, n) cosine matrix; the share ``retention`` of the tokens in every decoder layer
Differs  starts at the token farthest from the mean (released: a random one, another result each run), float32 (bfloat16), per image
         (all pooled), fewer basis tokens where the budget is small (fails). As released on Qwen2.5-VL, no cut inside the decoder
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from awares_bench import Pruner, VisualTokens

RIDGE = 1e-5
"""Added to the diagonal of the basis' Gram matrix: as released."""
BLOCK = 512
"""Tokens that are copied at a time."""


@dataclass(frozen=True)
class ApET(Pruner):
    """Rank by the error of the least-squares approximation from the basis; the basis itself, whose error is none, is blended back in.

    basis: number of basis tokens, chosen farthest from one another.
    """

    basis: int = 10

    def start(self, x: Tensor) -> Tensor:
        """The first basis token of features (V, D)."""
        return (vector_norm(x, dim=1).square() - 2 * (x @ x.mean(0))).argmax()

    def basis_of(self, x: Tensor, k: int) -> Tensor:
        """-> (k,) the farthest points of x (V, D), in the order found."""
        square, found = vector_norm(x, dim=1).square(), [self.start(x)]
        nearest = torch.full_like(square, torch.inf)
        while len(found) < k:
            nearest = torch.minimum(nearest, square + square[found[-1]] - 2 * (x @ x[found[-1]]))
            found.append(nearest.argmax())
        return torch.stack(found)[:k]

    def errors(self, x: Tensor, basis: Tensor) -> Tensor:
        """-> (V,) how far each of x (V, D) is from its approximation by basis (k, D)."""
        gram = basis @ basis.T + RIDGE * torch.eye(len(basis), device=x.device)
        weights = torch.linalg.solve(gram, basis @ x.T).T
        return torch.cat([vector_norm(a - w @ basis, dim=1) for a, w in zip(x.split(BLOCK), weights.split(BLOCK), strict=True)])

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        """The least wrong of those kept take in the basis, in the order found; the others take in what is dropped and most like them."""
        x, k = image.features.float(), min(self.basis, n - 1)
        if n >= len(x):
            return image.features, torch.arange(len(x), device=x.device)
        basis = x[self.basis_of(x, k)]
        order = self.errors(x, basis).argsort(descending=True, stable=True)
        top, low, dropped = order[: n - k].sort().values, order[n - k : n].sort().values, x[order[n:]]
        nearest = _nearest(dropped, x, top)
        chosen = torch.cat([top, low]).sort().values
        features = image.features[chosen]
        features[torch.searchsorted(chosen, low)] = ((basis + x[low]) / 2).to(features.dtype)
        for i, some in zip(range(0, len(top), BLOCK), top.split(BLOCK), strict=True):
            # a product with the members' marks, not index_add, so that a GPU gives the same bits each time
            member = (nearest == torch.arange(i, i + len(some), device=x.device)[:, None]).float()  # (block, V - n)
            merged = (x[some] + member @ dropped) / (1 + member.sum(1, keepdim=True))
            features[torch.searchsorted(chosen, some)] = merged.to(features.dtype)
        return features, chosen


def _nearest(dropped: Tensor, x: Tensor, top: Tensor) -> Tensor:
    """Which of ``top`` (K,) in x (V, D) each of dropped (M, D) is most like, by cosine: (M,)."""
    units = [normalize(x[some], dim=1).T for some in top.split(BLOCK)]
    alike = ([normalize(some, dim=1) @ unit for unit in units] for some in dropped.split(BLOCK))
    return torch.cat([torch.cat(parts, 1).argmax(1) for parts in alike])
