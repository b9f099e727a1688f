"""Random tokens: a share of the visual tokens, drawn blindly; the control that a pruner must beat.

Paper    none; a strong control in UniPruneBench, https://arxiv.org/abs/2511.02650
Code     none
Needs    nothing
Cost     the share ``retention`` of the tokens in every decoder layer
Differs  the picture seeds the draw, so that it does not depend on the batch or the order of documents
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awares_bench import Pruner, VisualTokens


@dataclass(frozen=True)
class RandomTokens(Pruner):
    """Keep tokens drawn uniformly without replacement.

    draw: number of the draw; which tokens stay depends on it and on the picture
    """

    draw: int = 0
    needs = ("seed",)

    def score(self, image: VisualTokens) -> Tensor:
        """Uniform numbers that the picture and ``draw`` decide."""
        seed = (image.seed + 2654435761 * int(self.draw)) % 2**32  # the generator reads 32 bits
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(image.features), generator=generator).to(image.features.device)
