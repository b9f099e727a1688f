"""Random crop: AwaRes' own decisions of when and how much, the place drawn at random; does it know where to look?

Paper    none; a control for AwaRes, https://arxiv.org/abs/2603.16932
Code     none
Needs    a checkpoint trained for AwaRes; any with when=always,form=plain
Cost     AwaRes': each region that is asked for becomes one of the same area; with when=always about 0.6 of full
Differs  nothing
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from awares_bench import AwaRes, Sample, TurnGenerator
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.crop_turns import show_crops_unasked


@dataclass(frozen=True)
class RandomCrop(AwaRes):
    """Fetch as many regions as AwaRes asks for, each of the same area, anywhere. Other options are AwaRes'.

    when: ``asked``: when the model calls; ``always``: one of the nine regions for every document, without asking
    form: with ``always``, the crop comes after a ``call`` put into the model's mouth, or ``plain`` beside the view
    draw: number of the draw; places depend on it and on the document's key, and on nothing else
    """

    when: Literal["asked", "always"] = "asked"
    form: Literal["call", "plain"] = "call"
    draw: int = 0

    def choose(self, sample: Sample, names: tuple[str, ...]) -> tuple[str, ...]:
        rng, chosen = random.Random(f"{self.draw}/{sample.key}"), []
        for name in names:
            area = PAPER_GRID.area([name])
            alike = [n for n in PAPER_GRID.names if PAPER_GRID.area([n]) == area and n not in chosen]
            chosen.append(rng.choice(alike) if alike else name)  # ``all`` has no other place
        return tuple(chosen)

    def turns(self, sample: Sample) -> TurnGenerator:
        if self.when == "asked":
            return (yield from super().turns(sample))
        name = random.Random(f"{self.draw}/{sample.key}").choice(PAPER_GRID.names)
        return (yield from show_crops_unasked(sample, (name,), self.form, self.prompt))
