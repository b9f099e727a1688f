"""MMTok: the visual tokens that cover both the words of the question and the picture itself.

Paper    Dong et al., 2025, https://arxiv.org/abs/2508.18264
Code     https://github.com/Ironieser/MMTok (``mmtok/qwen``, d1522cda)
Needs    the embedded question, and what leaves the last vision block; no attention, no training
Cost     one (V + M, V) matrix for M words, a greedy choice over it; the share ``retention`` of the tokens in every decoder layer
Differs  words as the prompt tokenizes them (released: one by one, without spaces), several images by their own share, small images are cut
         too: ``compat=official`` leaves those of at most 64 tokens whole, as released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from awares_bench import Pruner, VisualTokens

from ._greedy import cover

WHOLE = 64
"""Tokens of an image that the released code never cuts: a default compared with the wrong number."""


@dataclass(frozen=True)
class MMTok(Pruner):
    """Greedy coverage of words, by the projected features, and of the picture's tokens, by the unprojected ones.

    alpha: weight of the picture beside the words, whose is 1.
    text_temperature: of the softmax over visual tokens for each word.
    vision_temperature: of that for each visual token.
    compat: ``official``: small images stay whole.
    """

    alpha: float = 0.5
    text_temperature: float = 0.01
    vision_temperature: float = 0.2
    compat: Literal["corrected", "official"] = "corrected"
    needs = ("question", "unmerged")

    def tokens_to_keep(self, visual: int, share: float) -> int:
        """All of a small image, as released."""
        return visual if self.compat == "official" and visual <= WHOLE else super().tokens_to_keep(visual, share)

    def covers(self, image: VisualTokens) -> Tensor:
        """-> (V, M + V) how well each token covers each word and each token."""
        words, own = normalize(image.words.float(), dim=1), normalize(image.unmerged.float(), dim=1)
        alike = torch.cat([normalize(some.float(), dim=1) @ words.T for some in image.features.split(512)])  # (V, M)
        out = alike.new_empty(len(own), len(words) + len(own))
        out[:, : len(words)] = (alike / self.text_temperature).softmax(0) / len(words)
        for i in range(0, len(own), 512):
            some = (own[i : i + 512] @ own.T / self.vision_temperature).softmax(1)
            out[:, len(words) + i : len(words) + i + len(some)] = some.T * (self.alpha / len(own))
        return out

    def order(self, image: VisualTokens, n: int) -> list[int]:
        """The chosen tokens in the order of their choice."""
        return cover(self.covers(image), n)

    def select(self, image: VisualTokens, n: int) -> Tensor:
        return image.features.new_tensor(self.order(image, n), dtype=int).sort().values
