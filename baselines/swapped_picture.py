"""Swapped picture: full resolution, but the picture of another document of the task; does the picture matter?

Paper    none; a control for every method
Code     none
Needs    a task with several pictures
Cost     every visual token: the other picture is resized to the size of the document's own
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench import Event, EventKind, Policy, Sample, TurnGenerator
from awares_bench.methods.crop_turns import other_pictures, without_crops


@dataclass(frozen=True)
class SwappedPicture(Policy):
    """Ask with a picture that the question is not about: of the document half the split away, or the next whose picture differs."""

    def turns(self, sample: Sample) -> TurnGenerator:
        if not sample.images:
            return (yield from without_crops(sample))
        pictures = other_pictures(sample)
        yield Event(EventKind.SWAPPED_PICTURE, "shown is the picture of another document of the task")
        return (yield sample.ask(tuple(pictures)))
