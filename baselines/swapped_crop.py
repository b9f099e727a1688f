"""Swapped crop: AwaRes' own decisions, its crops cut from the picture of another document; does it notice what it fetches?

Paper    none; a control for AwaRes, https://arxiv.org/abs/2603.16932
Code     none
Needs    a checkpoint trained for AwaRes, and a task with several pictures
Cost     exactly AwaRes': the other picture is resized to the size of the document's own
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from awares_bench import AwaRes, Event, EventKind, Sample, Turn, TurnGenerator
from awares_bench.methods.crop_turns import other_pictures


@dataclass(frozen=True)
class SwappedCrop(AwaRes):
    """Fetch the regions that AwaRes asks for, of another document. Options are AwaRes'."""

    def turns(self, sample: Sample) -> TurnGenerator:
        turns, sent = super().turns(sample), None
        while True:
            try:
                step = turns.send(sent)
            except StopIteration as stop:
                return stop.value
            if isinstance(step, Turn) and step.crops:
                (other,) = other_pictures(sample)
                yield Event(EventKind.SWAPPED_PICTURE, "the crops are of another document of the task")
                step = replace(step, images=tuple(self.cut(other, step.crops)))
            sent = yield step
