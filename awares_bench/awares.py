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

from awares_bench.methods.conversation import Event, Sample, Turn
from awares_bench.methods.crop_grid import PAPER_GRID, CropRequestError
from awares_bench.methods.images import SMALLEST_SIDE, half
from awares_bench.methods.policy import Look, Policy

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

    def look(self, sample: Sample) -> Look:
        if len(sample.images) != 1:
            return (yield from without_crops(sample))

        (image,) = sample.images
        system = PAPER_GRID.prompt_as(self.prompt)
        reply = yield sample.ask((half(image),), system=system, last=False, budget=self.call_budget, calls=PAPER_GRID)
        try:
            request = PAPER_GRID.parse(reply.text)
        except CropRequestError as error:
            yield Event("malformed_call", str(error))
            if self.on_malformed == "error":
                raise
            if self.on_malformed == "answer":
                return reply
            names: tuple[str, ...] = ("all",)
        else:
            if request is None:
                return reply
            names = request.names

        names = yield from fit(image, self.choose(sample, names))
        reply = yield Turn(tuple(self.cut(image, names)))
        if _is_call(reply.text):
            yield Event("call_in_answer", f"a second call counts as the answer text: {reply.text!r}")
        return reply


def without_crops(sample: Sample) -> Look:
    """Documents that crops cannot serve, answered and noted: several images, or none."""
    if sample.images:
        yield Event("several_images", f"{len(sample.images)} images: a crop has no image id, so all are shown in full")
    else:
        yield Event("no_image", "answered from the text alone")
    return (yield sample.ask(sample.images))


def fit(image: Image.Image, names: tuple[str, ...]):
    """Note the regions about to be shown -> the regions: the whole image where it is too small to cut."""
    if min(image.size) < SMALLEST_SIDE and names != ("all",):
        detail = f"{image.width}x{image.height} is too small to cut, so the whole image is sent for {', '.join(names)}"
        yield Event("crops_too_small", detail)
        names = ("all",)
    yield Event("crops", ",".join(names))
    return names


def give(sample: Sample, names: tuple[str, ...], form: str, prompt: str, crops: list[Image.Image] | None = None) -> Look:
    """The half-size view and regions that the model did not ask for.

    form:  ``call``: AwaRes' two turns, a call for ``names`` put into the model's mouth, for weights trained for AwaRes;
           ``plain``: half-size view and crops in one message, for any weights
    crops: shown instead of the regions' own pixels
    """
    if len(sample.images) != 1:
        return (yield from without_crops(sample))
    (image,) = sample.images
    names = yield from fit(image, names)
    view, crops = half(image), crops or PAPER_GRID.cut(image, names)
    if form == "plain":
        return (yield sample.ask((view, *crops)))
    yield sample.ask((view,), system=PAPER_GRID.prompt_as(prompt), last=False, said=PAPER_GRID.format(names))
    return (yield Turn(tuple(crops)))


def _is_call(text: str) -> bool:
    try:
        return PAPER_GRID.parse(text) is not None
    except CropRequestError:
        return True
