"""CDPruner: a subset of the visual tokens that is diverse and relevant to the question, by a determinantal point process.

Paper    Zhang et al., NeurIPS 2025, https://arxiv.org/abs/2506.10967
Code     https://github.com/Theia-4869/CDPruner (LLaVA; 9541616c; its issue 7 on Qwen2.5-VL)
Needs    the visual features and the embedded question; no attention, no training
Cost     one (V, V) cosine matrix and a greedy choice over it; the share ``retention`` of the tokens in every decoder layer
Differs  relevance is cosine to the question's embedded tokens, as in OpenVINO GenAI; the authors' is CLIP's, whose sign they negate:
         ``compat=official``. Range of the relevance per picture (released: over the batch)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from awares_bench import Pruner, VisualTokens

from ._greedy import cosines


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Greedy maximum of the determinant of ``relevance_i * cosine_ij * relevance_j``.

    compat: ``official``: the less alike, the more relevant, which suits CLIP's inverted cosines and nothing else.
    """

    compat: Literal["corrected", "official"] = "corrected"
    needs = ("question",)

    def relevance(self, features: Tensor, words: Tensor) -> Tensor:
        """Mean cosine of features (V, C) to words (M, C), brought into (0, 1]: (V,)."""
        asked = normalize(words.float(), dim=1).mean(0)
        value = torch.cat([normalize(some.float(), dim=1) @ asked for some in features.split(512)])
        value = -value if self.compat == "official" else value
        return (value - value.min() + 1e-6) / (value.max() - value.min()).clamp(min=1e-12)

    def order(self, features: Tensor, relevance: Tensor, n: int) -> Tensor:
        """-> (n,) the tokens as they are chosen, each adding most to the determinant."""
        kernel = cosines(features).mul_(relevance[:, None]).mul_(relevance)
        left, place = kernel.diagonal().clone(), torch.arange(len(features), device=features.device)
        for i in range(n):
            best = left.argmax(keepdim=True)
            # the chosen token's row changes places with row i, and there becomes a row of the kernel's factor: no second matrix
            at = (place == best).int().argmax(keepdim=True)
            row = kernel[at][0]
            kernel[at], place[at] = kernel[i].clone(), place[i].clone()
            place[i : i + 1] = best
            kernel[i] = (row - kernel[:i, best].T[0] @ kernel[:i]) / left[best].clamp(min=1e-12).sqrt()
            left -= kernel[i].square()
            left[best] = -torch.inf
        return place[:n]

    def select(self, image: VisualTokens, n: int) -> Tensor:
        return self.order(image.features, self.relevance(image.features, image.words), n).sort().values
