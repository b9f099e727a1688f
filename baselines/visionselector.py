"""VisionSelector: the tokens that a small trained scorer ranks highest; with ``mmr``, IDPruner, which also keeps them unlike one another.

Paper    Zhu et al., 2025, https://arxiv.org/abs/2510.16598; IDPruner, 2026, https://arxiv.org/abs/2602.13315
Code     https://github.com/JulietChoo/VisionSelector (800a70f6); IDPruner: https://github.com/Tencent/AngelSlim (67394ce5)
Needs    a scorer trained for the checkpoint (12.9 million weights for 7B), whose backbone stays as it is; no attention, no text
Cost     two products for each token; with ``mmr`` one (V, V) cosine matrix; the share ``retention`` of the tokens in every decoder layer
Differs  scores and budget per image (released: one for all images of a prompt), by one product with the mean key, in float32
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens
from awares_bench.methods.options import parse_int
from awares_bench.models.scorer import load_scorer

from ._greedy import cosines


@dataclass(frozen=True)
class VisionSelector(Pruner):
    """Rank by a trained score; or greedily by score against likeness to what is chosen (maximal marginal relevance).

    scorer: safetensors file of the scorer, or a folder or hub name of a checkpoint with one; ``nano`` for the package's, of its weights ``nano``; ``awares-bench train scorer`` writes others.
    mmr: weight of the score beside the likeness, whose is one less it (IDPruner's default 0.5); none: the score alone.
    parallel: with mmr, tokens that are chosen at a time.
    """

    scorer: str = ""
    mmr: float | None = None
    parallel: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.mmr is not None and (isinstance(self.mmr, (bool, str)) or not 0 <= self.mmr <= 1):
            raise ValueError(f"mmr is {self.mmr!r}; it must be a number from 0 to 1, such as 0.5, or left out")
        parse_int("parallel", self.parallel)

    def check(self, width: int) -> None:
        if not self.scorer:
            raise ValueError(
                "visionselector needs scorer=FILE, trained for this checkpoint (the authors release theirs; awares-bench train scorer makes one; scorer=nano goes with pretrained=nano)"
            )
        if (reads := load_scorer(self.scorer).width) != width:
            raise ValueError(
                f"scorer={self.scorer} reads {reads} numbers a token, and this model's tokens have {width}; pass its own"
            )

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"scorer": load_scorer(self.scorer).fingerprint} if self.scorer else {}

    def score(self, image: VisualTokens) -> Tensor:
        """The trained score."""
        return load_scorer(self.scorer).scores(image.features)

    def select(self, image: VisualTokens, n: int) -> Tensor:
        return super().select(image, n) if self.mmr is None else self.order(image, n, self.mmr).sort().values

    def order(self, image: VisualTokens, n: int, mmr: float) -> Tensor:
        """-> (n,) the tokens as ``mmr`` chooses them."""
        score, alike = self.score(image), cosines(image.features)
        value = mmr * (score - score.min()) / (score.max() - score.min() + 1e-6)
        chosen, order = _best(score, min(self.parallel, n)), []
        nearest, left = torch.full_like(value, -torch.inf), n
        while len(chosen):
            order.append(chosen)
            nearest = torch.maximum(nearest, alike[chosen].amax(0))
            value[chosen] = -torch.inf
            left -= len(chosen)
            chosen = _best(value - (1 - mmr) * nearest, min(self.parallel, left))
        return torch.cat(order)


def _best(value: Tensor, n: int) -> Tensor:
    """Places of the ``n`` largest, the first of equals."""
    return value.argmax(keepdim=True) if n == 1 else value.argsort(descending=True, stable=True)[:n]
