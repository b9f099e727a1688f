"""Random deep: a cut inside the decoder, drawn blindly; the control that FastV, DART and PyramidDrop must beat.

Paper    none; how little the choice inside the decoder matters is shown in https://arxiv.org/abs/2502.11501
Code     none
Needs    nothing
Cost     every visual token in the first ``layer`` decoder layers, the share ``retention`` in the rest
Differs  the picture seeds the draw, so that it does not depend on the batch or the order of documents
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens
from awares_bench.methods.options import parse_int


@dataclass(frozen=True)
class RandomDeep(Pruner):
    """Keep tokens drawn uniformly without replacement, from decoder layer ``layer`` on.

    layer: layers that see every token; FastV's headline setting
    draw: number of the draw; which tokens stay depends on it and on the picture
    """

    layer: int = 2
    draw: int = 0
    needs = ("seed",)

    def __post_init__(self):
        super().__post_init__()
        parse_int("layer", self.layer)

    def cut_layers(self, layers: int) -> dict[int, float]:
        """One cut."""
        return {self.layer - 1: self.retention}

    def score(self, image: VisualTokens) -> Tensor:
        """Uniform numbers that the picture and ``draw`` decide."""
        seed = (image.seed + 2654435761 * int(self.draw)) % 2**32  # the generator reads 32 bits
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(image.features), generator=generator).to(image.features.device)
