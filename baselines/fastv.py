"""FastV: after the second decoder layer, only the visual tokens that the last prompt token attends to go on.

Paper    Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764
Code     https://github.com/pkunlp-icler/FastV (LLaVA; d1659729)
Needs    the attention row of the last prompt token in one decoder layer; no training
Cost     every visual token in the first ``layer`` decoder layers, the share ``retention`` in the rest
Differs  several images (each keeps its share), batches and a cache; any attention kernel, one row of attention instead of all
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from awares_bench import Pruner, VisualTokens


@dataclass(frozen=True)
class FastV(Pruner):
    """Cut before decoder layer ``layer`` by the attention of the layer before it.

    layer: the paper's K, its headline setting 2.
    """

    layer: int = 2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"layer is {self.layer!r}; it must be a whole number of at least 1, since a layer's attention is needed"
            )

    def cut_layers(self, layers: int) -> dict[int, float]:
        """One cut."""
        return {self.layer - 1: self.retention}

    def tokens_to_keep(self, visual: int, share: float) -> int:
        """Rounded to the nearest, as released."""
        return max(1, round(visual * share))

    def score(self, image: VisualTokens) -> Tensor:
        """Attention of the last prompt token, mean over heads."""
        return image.decoder_attention.per_head().mean(0)
