"""SparseVLM: three cuts inside the decoder, by the attention of the prompt's words that concern the image.

Paper    Zhang et al., ICML 2025, https://arxiv.org/abs/2410.04417
Code     https://github.com/Gumpest/SparseVLMs (LLaVA; 26a5f488: v1.5, and SPARSEVLM+ as its USE_VERSION=2_0)
Needs    attention rows of the raters in three decoder layers; no training
Cost     the share ``retention`` of the visual tokens, recycled ones included, as the mean over the decoder layers
Differs  any retention; positions kept; recycled tokens at their centre's place; no noise in ties; batches. ``compat=official`` as released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens
from awares_bench.methods.pruner import ReleasedQuirks

from ._schedule import fraction

LAYERS = (2, 6, 15)
"""Decoder layers after which the released code cuts; of the depth of Qwen2.5-VL-7B where the decoder is shallower."""
DEPTH = 28
RECYCLED, CLUSTERED, HEADS = 0.3, 10, 14
"""Share of the pruned tokens that is recycled, tokens in a cluster, heads that SPARSEVLM+ listens to: those of the released code."""


@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Each cut keeps the same fraction of what the one before left, chosen so that the mean over the layers is ``retention``.

    No cut keeps less than half of ``retention`` of what it gets: where the layers before the first cut leave too little for
    the others, the mean lies above ``retention``, and the usage says by how much.

    version: ``1.5`` recycles some of what it cuts as cluster means; ``plus`` recycles nothing, divides attention by the
        rotary embedding's own preference for near tokens, and listens to the half of the heads that look at the image most.
    compat: ``official`` re-packs positions (1.5), appends clusters behind the image, and takes 14 heads whatever the model has (plus).
    """

    version: Literal["1.5", "plus"] = "1.5"
    compat: Literal["corrected", "official"] = "corrected"

    @property
    def quirks(self) -> ReleasedQuirks:
        """Released v1.5 numbers the tokens anew after each cut."""
        return ReleasedQuirks(renumber_positions=self.compat == "official" and self.version == "1.5")

    def cut_layers(self, layers: int) -> dict[int, float]:
        """Three cuts, fewer in a decoder too shallow for them."""
        after = sorted({min(layer, layer * layers // DEPTH) for layer in LAYERS} - {layers - 1})
        kept = max(fraction(after, layers, self.retention), self.retention / 2)
        return {layer: kept ** (i + 1) for i, layer in enumerate(after)}

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """Words to which the visual tokens are, on average, more than averagely similar; the last one where there are none."""
        text = text.float().T
        total = sum((some.float() @ text).softmax(1).sum(0) for some in visual.split(512))
        found = (total > total.mean()).nonzero().squeeze(1)
        return found if len(found) else super().raters(visual, text)

    def score(self, image: VisualTokens) -> Tensor:
        """Attention of the raters, mean over raters and heads."""
        if self.version == "1.5":
            return image.decoder_attention.per_head().mean(0)
        heads = image.decoder_attention.per_head(image.decoder_attention.rotary_kernel())  # (H, V)
        return heads[self.heads(heads)].mean(0)

    def heads(self, attention: Tensor) -> Tensor:
        """The heads that look at the image most: (H, V) -> (k,)."""
        n = HEADS if self.compat == "official" else max(1, len(attention) // 2)
        return attention.sum(1).argsort(descending=True, stable=True)[:n]

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        """The best tokens and, in v1.5, means of clusters among the best of the others."""
        total, recycle = len(image.features), self.version == "1.5"
        kept = n
        if recycle and self.compat == "official":
            kept = min(n, total - 1)
        while recycle and self.compat == "corrected" and kept > 1 and kept + recycled(total - kept)[1] > n:
            kept -= 1
        order = self.score(image).argsort(descending=True, stable=True)
        count, clusters = recycled(total - kept)
        if not recycle or not count or (self.compat == "corrected" and kept + clusters > n):
            chosen = order[:kept].sort().values
            return image.features[chosen], chosen
        again = order[kept : kept + count]
        centres, means = cluster(image.features.index_select(0, again), clusters)
        centres = again.index_select(0, centres)
        if self.compat == "corrected":
            indices = torch.cat([order[:kept], centres]).sort().values
            merged = torch.searchsorted(indices, centres)
        else:
            indices = torch.cat([order[:kept].sort().values, centres])
            merged = torch.arange(kept, len(indices), device=indices.device)
        features = image.features.index_select(0, indices)  # one copy; the centres' rows then take their clusters' means
        features[merged] = means.to(features.dtype)
        return features, indices


def recycled(pruned: int) -> tuple[int, int]:
    """Of ``pruned`` tokens: how many are recycled, into how many clusters."""
    again = min(pruned, int(RECYCLED * pruned) + 1)
    return again, int(again / CLUSTERED) + 1 if again else 0


def cluster(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering: x (M, D) -> indices (n,) of the centres, and the means of their clusters (n, D).

    A centre has many near neighbours and none denser nearby (Rodriguez and Laio, 2014). The released code adds random noise
    to the densities; here the first of equals is the denser.
    """
    x = x.float()
    if n == 1:  # all densities are equal, and the first is the centre
        return torch.zeros(1, dtype=torch.long, device=x.device), x.mean(0, keepdim=True)
    distance = torch.cdist(x, x)  # (M, M)
    density = (distance.topk(min(n, len(x)), largest=False).values.square().mean(1) / -x.shape[1]).exp()
    rank = density.argsort(descending=True, stable=True).argsort()
    apart = distance.masked_fill(rank >= rank[:, None], distance.max()).amin(1)  # from the nearest that is denser
    centres = (density * apart).argsort(descending=True, stable=True)[:n]
    nearest, number = distance[:, centres].argmin(1), torch.arange(n, device=x.device)
    nearest[centres] = number
    member = (nearest == number[:, None]).float()  # (n, M)
    return centres, member @ x / member.sum(1, keepdim=True)
