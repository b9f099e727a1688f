"""Low resolution: every image at half its sides, about a quarter of the tokens; the control that many methods lose to.

Paper    AwaRes' "LR" row, https://arxiv.org/abs/2603.16932, Sec. 4.3
Code     none
Needs    nothing
Cost     a quarter of the visual tokens, where the processor's limits do not bite
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench import Policy, Sample, TurnGenerator
from awares_bench.methods.crop_turns import note_half_view
from awares_bench.methods.images import HALF_SHARE, half


@dataclass(frozen=True)
class Low(Policy):
    """Look at the half-size view only."""

    def turns(self, sample: Sample) -> TurnGenerator:
        views = tuple(half(image) for image in sample.images)
        reply = yield sample.ask(views, shares=(HALF_SHARE,) * len(views))
        yield from note_half_view(sample, reply)
        return reply
