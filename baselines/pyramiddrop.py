"""PyramidDrop: three cuts inside the decoder, by the attention that the last prompt token would pay in the layer after each.

Paper    Xing et al., CVPR 2025, https://arxiv.org/abs/2410.17247
Code     https://github.com/Cooperx521/PyramidDrop (LLaVA; 6444f304), and VScan's port to Qwen2.5-VL in
         https://github.com/Tencent/SelfEvolvingAgent (a82450e1)
Needs    queries and keys of the next decoder layer at three cuts; no training
Cost     the share ``retention`` of the visual tokens as the mean over the decoder layers; three times the projections of a layer
Differs  any retention (released: 1/2, 1/4, 1/8 of the tokens), positions kept, grouped key heads, batches, several images.
         ``compat=official``, ``compat=vscan``: as each was released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from awares_bench import Pruner, VisualTokens
from awares_bench.methods.pruner import ReleasedQuirks

from ._schedule import fraction

STEEPEST = 0.25
"""Share of what is there that a cut keeps at least, where cutting earlier can avoid less."""


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Cuts after each quarter of the decoder keep the same fraction of what the one before left, so that the mean over the layers is ``retention``.

    Below about a third the quarters become shorter; the first layer sees every token, so that a mean below one layer's share cannot be.

    compat: ``official`` numbers the tokens anew after each cut; ``vscan`` compares queries and keys without their rotary embedding.
    """

    compat: Literal["corrected", "official", "vscan"] = "corrected"
    looks_ahead = True

    @property
    def quirks(self) -> ReleasedQuirks:
        return ReleasedQuirks(renumber_positions=self.compat == "official", unrotated=self.compat == "vscan")

    def cut_layers(self, layers: int) -> dict[int, float]:
        """Three cuts, fewer in a decoder too shallow for them."""
        x, after = 0.0, [0]
        for quarter in range(max(1, layers // 4), 0, -1):
            after = [i * quarter - 1 for i in (1, 2, 3) if i * quarter < layers]
            if (x := fraction(after, layers, self.retention)) >= STEEPEST:
                break
        return {layer: x ** (i + 1) for i, layer in enumerate(after)}

    def tokens_to_keep(self, visual: int, share: float) -> int:
        """Rounded down, as released as floats have it."""
        return super().tokens_to_keep(visual, share) if self.compat == "corrected" else max(1, int(visual * share))

    def score(self, image: VisualTokens) -> Tensor:
        """Attention of the last prompt token, mean over heads."""
        return image.decoder_attention.per_head().mean(0)
