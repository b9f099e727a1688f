"""No picture: the question alone; what language and the task's habits already answer.

Paper    none; a control for every method
Code     none
Needs    nothing
Cost     no visual token
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench import Policy, Sample, Turn, TurnGenerator


@dataclass(frozen=True)
class NoPicture(Policy):
    """Ask without showing anything."""

    def turns(self, sample: Sample) -> TurnGenerator:
        return (yield Turn((), sample.question))
