"""AwaRes: answer from a half-size view, or fetch the named high-resolution crops and answer in a second turn.

Paper    Shabtay et al., 2026, https://arxiv.org/abs/2603.16932, Sec. 3
Code     https://github.com/NimrodShabtay/AwaRes at 2121cde
Needs    a checkpoint trained for it; no access to the inside of the model
Cost     the half-size view (about a quarter of the tokens), plus the crops when they are asked for
Differs  crops the released parser cannot read are read (two crops, names, spaces); the second turn continues the cache
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from awares_bench.methods.conversation import Event, EventKind, Failure, Sample, Turn
from awares_bench.methods.crop_grid import PAPER_GRID, CropRequestError
from awares_bench.methods.crop_turns import note_crops, note_half_view, without_crops
from awares_bench.methods.images import HALF_SHARE, half, share_of
from awares_bench.methods.policy import Policy, TurnGenerator

CALL_BUDGET = 32
"""Tokens the first turn may always have: official tasks allow 16, which cuts a call for three crops."""


@dataclass(frozen=True)
class AwaRes(Policy):
    """Look at half size first; at most one request for crops.

    prompt:       wording of the system message: ``paper`` (supplement 7.3) or ``adapter`` (the released adapter's)
    on_malformed: a call the grammar does not allow leads to the ``full`` image, counts as the ``answer``, or is an ``error``
    call_budget:  tokens the first turn may have at the least, whatever the task allows for its answer
    """

    prompt: Literal["paper", "adapter"] = "paper"
    on_malformed: Literal["full", "answer", "error"] = "full"
    call_budget: int = CALL_BUDGET

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.call_budget, int) or self.call_budget < CALL_BUDGET:
            raise ValueError(f"call_budget is {self.call_budget!r}; a call for several crops needs at least {CALL_BUDGET} tokens")

    def choose(self, sample: Sample, names: tuple[str, ...]) -> tuple[str, ...]:
        """Regions that are fetched when ``names`` are asked for; a control may choose others."""
        return names

    def cut(self, image: Image.Image, names: tuple[str, ...]) -> list[Image.Image]:
        """What is shown of the chosen regions; a control may show something else."""
        return PAPER_GRID.cut(image, names)

    def turns(self, sample: Sample) -> TurnGenerator:
        if len(sample.images) != 1:
            return (yield from without_crops(sample))

        (image,) = sample.images
        system = PAPER_GRID.prompt_as(self.prompt)
        reply = yield sample.ask(
            (half(image),),
            shares=(HALF_SHARE,),
            system=system,
            is_final=False,
            min_reply_tokens=self.call_budget,
            crop_grammar=PAPER_GRID,
        )
        yield from note_half_view(sample, reply)
        try:
            request = PAPER_GRID.parse(reply.text)
        except CropRequestError as error:
            yield Event(EventKind.MALFORMED_CALL, str(error))
            if self.on_malformed == "error":
                return Failure(f"malformed crop request and on_malformed='error': {error}")
            if self.on_malformed == "answer":
                return reply
            names: tuple[str, ...] = ("all",)
        else:
            if request is None:
                return reply
            names = request.names

        names = yield from note_crops(image, self.choose(sample, names))
        crops = tuple(self.cut(image, names))
        reply = yield Turn(crops, shares=tuple(share_of(crop, image) for crop in crops), crops=names)
        if _is_call(reply.text):
            yield Event(EventKind.CALL_IN_ANSWER, f"a second call counts as the answer text: {reply.text!r}")
        return reply


def _is_call(text: str) -> bool:
    try:
        return PAPER_GRID.parse(text) is not None
    except CropRequestError:
        return True
