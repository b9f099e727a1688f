"""All crops: the half-size view, then the whole image at full resolution, for every document; AwaRes if it always called.

Paper    none; a control for AwaRes, https://arxiv.org/abs/2603.16932
Code     none
Needs    a checkpoint trained for AwaRes; any with form=plain
Cost     a quarter more than every visual token
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from awares_bench import Policy, Sample, TurnGenerator
from awares_bench.methods.crop_turns import show_crops_unasked

QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")


@dataclass(frozen=True)
class AllCrops(Policy):
    """Show everything, whatever the question.

    crops:  ``all``: the whole image as one crop; ``quadrants``: the same pixels in four
    form:   the crops come after a ``call`` put into the model's mouth, or ``plain`` beside the half-size view
    prompt: wording of AwaRes' system message, for ``call``
    """

    crops: Literal["all", "quadrants"] = "all"
    form: Literal["call", "plain"] = "call"
    prompt: Literal["paper", "adapter"] = "paper"

    def turns(self, sample: Sample) -> TurnGenerator:
        return (yield from show_crops_unasked(sample, ("all",) if self.crops == "all" else QUADRANTS, self.form, self.prompt))
