"""What several crop methods share: documents that crops cannot serve, half-size views, crops that the model did not ask for."""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice

from PIL import Image

from .conversation import Event, EventKind, Reply, Sample, Turn
from .crop_grid import PAPER_GRID, Box
from .images import HALF_SHARE, SMALLEST_SIDE, as_rgb, half, share_of
from .policy import TurnGenerator

LOW_RATIO = 0.35
"""Above this share of the full tokens, limits of the processor bend the half-size view away from a quarter."""


def without_crops(sample: Sample) -> TurnGenerator:
    """Documents that crops cannot serve, answered and noted: several images, or none."""
    if sample.images:
        yield Event(EventKind.SEVERAL_IMAGES, f"{len(sample.images)} images: a crop has no image id, so all are shown in full")
    else:
        yield Event(EventKind.NO_IMAGE, "answered from the text alone")
    return (yield sample.ask(sample.images))


def note_crops(image: Image.Image, names: tuple[str, ...]) -> Generator[Event, None, tuple[str, ...]]:
    """The regions that can be shown of those named: the whole image, with an event, where it is too small to cut."""
    if min(image.size) < SMALLEST_SIDE and names != ("all",):
        detail = f"{image.width}x{image.height} is too small to cut, so the whole image is sent for {', '.join(names)}"
        yield Event(EventKind.CROPS_TOO_SMALL, detail)
        names = ("all",)
    return names


def note_half_view(sample: Sample, reply: Reply) -> Generator[Event, None, None]:
    """Say so where half-size views cost far more than a quarter. reply: to the turn that showed every image at half size."""
    share = reply.usage.encoded / sample.full_tokens if sample.full_tokens else 0.0
    if share > LOW_RATIO:
        detail = f"the first view costs {share:.2f} of the full tokens: processor limits bite"
        yield Event(EventKind.LOW_VIEW_NOT_A_QUARTER, detail)


SEARCHED = 50
"""Documents that are opened in search of another picture."""


def other_pictures(sample: Sample) -> list[Image.Image]:
    """For each of the sample's images one of another document, unlike all of them, at its size, so that it costs the same.

    Raises ValueError where the sample is of no task, or its task shows nothing else.
    """
    if sample.other_pictures is None:
        raise ValueError("the control shows a picture of another document, and this sample is of no task; run it on a task")
    own, out = {(image.size, image.tobytes()) for image in sample.images}, list[Image.Image]()
    for pictures in islice(sample.other_pictures(), SEARCHED):
        for picture in pictures:
            image = as_rgb(picture)[0]
            if (image.size, image.tobytes()) in own:
                continue
            size = sample.images[len(out)].size
            out.append(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))
            if len(out) == len(sample.images):
                return out
    raise ValueError("the task has no other document with another picture to show; raise its limit, or leave the control out")


def show_crops_unasked(
    sample: Sample, names: tuple[str, ...], form: str, prompt: str, boxes: tuple[Box, ...] = ()
) -> TurnGenerator:
    """The half-size view and regions that the model did not ask for.

    form:  ``call``: AwaRes' two turns, a call for ``names`` put into the model's mouth, for weights trained for AwaRes;
           ``plain``: half-size view and crops in one message, for any weights
    boxes: shown instead of the regions, in pixels of the image
    """
    if len(sample.images) != 1:
        return (yield from without_crops(sample))
    (image,) = sample.images
    names = yield from note_crops(image, names)
    view, crops = half(image), [image.crop(box) for box in boxes] or PAPER_GRID.cut(image, names)
    shares = tuple(share_of(crop, image) for crop in crops)
    if form == "plain":
        return (yield sample.ask((view, *crops), shares=(HALF_SHARE, *shares), crops=names, boxes=boxes))
    said = PAPER_GRID.format(names)
    reply = yield sample.ask(
        (view,), shares=(HALF_SHARE,), system=PAPER_GRID.prompt_as(prompt), is_final=False, forced_reply=said
    )
    yield from note_half_view(sample, reply)
    return (yield Turn(tuple(crops), shares=shares, crops=names, boxes=boxes))
