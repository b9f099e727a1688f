"""Turns that several crop methods share: documents that crops cannot serve, and crops that the model did not ask for."""

from __future__ import annotations

from PIL import Image

from .conversation import Event, Sample, Turn
from .crop_grid import PAPER_GRID
from .images import SMALLEST_SIDE, half
from .policy import TurnGenerator


def without_crops(sample: Sample) -> TurnGenerator:
    """Documents that crops cannot serve, answered and noted: several images, or none."""
    if sample.images:
        yield Event("several_images", f"{len(sample.images)} images: a crop has no image id, so all are shown in full")
    else:
        yield Event("no_image", "answered from the text alone")
    return (yield sample.ask(sample.images))


def note_crops(image: Image.Image, names: tuple[str, ...]):
    """Note the regions about to be shown -> the regions: the whole image where it is too small to cut."""
    if min(image.size) < SMALLEST_SIDE and names != ("all",):
        detail = f"{image.width}x{image.height} is too small to cut, so the whole image is sent for {', '.join(names)}"
        yield Event("crops_too_small", detail)
        names = ("all",)
    yield Event("crops", ",".join(names))
    return names


def show_crops_unasked(
    sample: Sample, names: tuple[str, ...], form: str, prompt: str, crops: list[Image.Image] | None = None
) -> TurnGenerator:
    """The half-size view and regions that the model did not ask for.

    form:  ``call``: AwaRes' two turns, a call for ``names`` put into the model's mouth, for weights trained for AwaRes;
           ``plain``: half-size view and crops in one message, for any weights
    crops: shown instead of the regions' own pixels
    """
    if len(sample.images) != 1:
        return (yield from without_crops(sample))
    (image,) = sample.images
    names = yield from note_crops(image, names)
    view, crops = half(image), crops or PAPER_GRID.cut(image, names)
    if form == "plain":
        return (yield sample.ask((view, *crops)))
    yield sample.ask((view,), system=PAPER_GRID.prompt_as(prompt), is_final=False, forced_reply=PAPER_GRID.format(names))
    return (yield Turn(tuple(crops)))
