"""DART: after the second decoder layer, the visual tokens that are least like a few pivots of image and text go on.

Paper    Wen et al., EMNLP 2025, https://arxiv.org/abs/2502.11494
Code     https://github.com/ZichenWen1/DART (``Qwen2_5-VL``, read at 983e443e of Chenfei-Liao/VTC-Bench)
Needs    keys and hidden states of one decoder layer, and the decoder's final norm; no attention, no training
Cost     every visual token in the first ``layer`` decoder layers, the share ``retention`` in the rest; a cosine row for each pivot
Differs  exactly the budget, pivots by norm, every image by its own share. ``compat=official``: 4 + 8 * int(share / 8) tokens and the
         order in which Python goes through a set of the pivots' places, as released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from awares_bench import Pruner, VisualTokens
from awares_bench.methods.options import parse_int


@dataclass(frozen=True)
class Dart(Pruner):
    """Every pivot in turn keeps the tokens least like it; pivots are the tokens with the largest keys.

    layer: layers that see every token.
    image_pivots: pivots among the visual tokens, which are kept.
    text_pivots: pivots among the tokens after the last image.
    compat: ``official``: as released, for one image.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    compat: Literal["corrected", "official"] = "corrected"

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("layer", 1), ("image_pivots", 1), ("text_pivots", 0)):
            parse_int(name, getattr(self, name), least)

    def cut_layers(self, layers: int) -> dict[int, float]:
        """One cut."""
        return {self.layer - 1: self.retention}

    def pivots(self, image: VisualTokens) -> tuple[Tensor, Tensor]:
        """Largest keys by L1 norm over all heads, largest first: places among the visual tokens, and in the text after them."""
        keys, columns = image.decoder_attention.keys, image.decoder_attention.columns
        size = keys.float().abs().sum((0, 2))  # (K,)
        text = size[len(size) - len(image.text) :]
        found = [part.argsort(descending=True, stable=True) for part in (size[columns], text)]
        return found[0][: self.image_pivots], found[1][: self.text_pivots]

    def select(self, image: VisualTokens, n: int) -> Tensor:
        """The image's pivots, and what each pivot adds."""
        (own, text), rows = self.pivots(image), image.decoder_attention
        own, total = own[:n], len(image.features)
        states = normalize(rows.final_norm(image.features).float(), dim=1)
        pivots = torch.cat([states[own], normalize(rows.final_norm(image.text[text]).float(), dim=1)])
        each, order = -(-(n - len(own)) // len(pivots)), list(range(len(pivots)))
        if self.compat == "official":
            each, first = int(total * self.retention / (self.image_pivots + self.text_pivots)), rows.columns.start
            after = rows.keys.shape[1] - len(image.text)
            places = [*(own + first).tolist(), *(text + after).tolist()]
            order, n = [places.index(place) for place in set(places)], total
        alike, kept = states @ pivots.T, own  # (V, P)
        alike[own] = torch.inf
        for pivot in order:
            count = min(each, n - len(kept), total - len(kept))
            nearest = alike[:, pivot].argsort(stable=True)[:count]
            kept = torch.cat([kept, nearest])
            alike[nearest] = torch.inf
        return kept.sort().values
