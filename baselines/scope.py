"""SCOPE: the tokens that cover most of what is not covered yet, weighted by their attention.

Paper    Deng et al., NeurIPS 2025, https://arxiv.org/abs/2510.24214
Code     https://github.com/kinredon/SCOPE (LLaVA; 6bf73069), and its port in https://github.com/Tencent/AngelSlim (67394ce5)
Needs    attention received in the last vision block; no text, no training
Cost     one more QK^T of that block, one (V, V) cosine matrix, a greedy choice; the share ``retention`` of the tokens in every decoder layer
Differs  several images, each with its own share (AngelSlim: one choice over all); gains are computed again only where they may lead
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from awares_bench import Pruner, VisualTokens

from ._greedy import cosines, cover


@dataclass(frozen=True)
class Scope(Pruner):
    """Greedy coverage: a token's gain is the cosine to every token, itself and chosen ones included, beyond the best of those chosen.

    alpha: exponent of the attention in the weight of a token.
    combined: ``multi``: gain times weight, as released by default; ``add``: gain plus weight.
    """

    alpha: float = 1.0
    combined: Literal["multi", "add"] = "multi"
    needs = ("attention",)

    def order(self, image: VisualTokens, n: int) -> list[int]:
        """The chosen tokens in the order of their choice."""
        # summed over queries and a token's 4 patches, as AngelSlim does: the scale matters where the attention is added
        weight = (image.attention * 16 * len(image.features)) ** self.alpha
        given = {"bonus" if self.combined == "add" else "weight": weight}
        return cover(cosines(image.features), n, **given)

    def select(self, image: VisualTokens, n: int) -> Tensor:
        return image.features.new_tensor(self.order(image, n), dtype=int).sort().values
