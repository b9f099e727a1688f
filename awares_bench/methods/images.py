"""Pictures as a vision-language model should get them: RGB, upright, of a shape the processor accepts; changes are stated."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .conversation import Event, EventKind

SMALLEST_SIDE = 56
"""Below two merged tokens a side a region is no finer than the half-size view, so the whole image is sent instead."""

TOKEN_SIDE = 28
"""Sides of one merged visual token in pixels, as the checkpoints of tool-calling methods were trained."""

LONGEST_RATIO = 200
"""Pictures longer than so many times their width are left to the model, which pads them."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Within the block a truncated file raises OSError. lmms-eval tells Pillow to fill the missing part with grey, silently."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class PictureError(OSError):
    """A picture that cannot be shown: what it is, and what to do."""


def as_rgb(picture: object) -> tuple[Image.Image, list[Event]]:
    """Whatever a task gives as a picture (see ``opened``) -> (RGB, upright, what was done to it).

    EXIF rotation is applied, transparency is laid on white, grey of more than 8 bits and arrays of other numbers are scaled
    to 8 bits (a plain ``convert`` would clip them), of several frames or pages the first is shown. Grey, palette, CMYK and
    L*a*b* pictures are converted as Pillow does, without an event: nothing is lost.
    Raises PictureError, an OSError, when it cannot be read, whatever Pillow raised.
    """
    try:
        with whole_images():
            image, events = opened(picture)
            if 0 in image.size:
                raise PictureError(f"the image has no pixels ({image.width}x{image.height}); replace or exclude it")
            events += _frames(image)
            image.load()
            upright, turned = _upright(image)
            events += turned
            upright, scaled = _eight_bits(upright)
            events += scaled
            upright, laid = _opaque(upright)
            return (upright if upright.mode == "RGB" else upright.convert("RGB")), events + laid
    except PictureError:
        raise
    except Exception as error:  # the readers of a hundred formats raise whatever a broken file makes of them
        told = str(error) if isinstance(error, (OSError, SyntaxError, ValueError)) and str(error) else _named(error)
        raise PictureError(f"the image cannot be decoded ({told}); replace or exclude it") from error


def opened(picture: object) -> tuple[Image.Image, list[Event]]:
    """A picture as tasks give them -> (PIL image, perhaps not decoded yet; what was done to it).

    Taken: a PIL image; the path of a file, also as ``file://`` address; the bytes of a file, also as ``data:`` address;
    ``{"bytes": …, "path": …}`` as ``datasets`` stores them; an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
    truth values, whole numbers or floats. Raises PictureError for anything else, and whatever Pillow raises.
    """
    if isinstance(picture, Image.Image):
        return picture, []
    if isinstance(picture, dict):
        held = picture.get("bytes") if picture.get("bytes") is not None else picture.get("path")
        if held is None:
            raise PictureError(
                f"the image is a dictionary of {sorted(map(str, picture))} without bytes or path; fill one of them"
            )
        picture = held
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(picture)), []
    if isinstance(picture, (str, Path)):
        return Image.open(io.BytesIO(_contents(str(picture)))), []
    if hasattr(picture, "__array__") or isinstance(picture, (list, tuple)):
        return _from_array(picture)
    raise PictureError(
        f"the image is of type {type(picture).__name__}; allowed: a PIL image, a path, the bytes of a file, "
        'a dictionary with "bytes" or "path", an array of shape (height, width, 3)'
    )


def _contents(place: str) -> bytes:
    """The bytes of the file at a path or ``file:`` address, or those within a ``data:`` address. Raises PictureError."""
    shown = place if len(place) <= 120 else f"{place[:120]}…"
    if place[:5].lower() == "data:":
        head, _, data = place.partition(",")
        return base64.b64decode(data) if head.endswith(";base64") else unquote_to_bytes(data)
    if place[:5].lower() == "file:":
        place = url2pathname(urlsplit(place).path)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place):
        raise PictureError(f"the image is the address {shown}; nothing is downloaded here: save it and give the path of the file")
    try:
        path = Path(place).expanduser()
        if not path.is_file():  # a folder, a pipe, or nothing
            raise PictureError(f"no image file at {shown!r} (seen from the working folder); give the path of a file")
        return path.read_bytes()
    except (ValueError, OSError, RuntimeError) as error:  # such as a zero byte or a name too long; not to be read; no such home
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"no image can be read from {shown!r} ({error}); give the path of a file") from error


def _from_array(array: object) -> tuple[Image.Image, list[Event]]:
    """An array, or lists of numbers that make one -> (grey, RGB or RGBA image, how it was scaled)."""
    values = np.asarray(array)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype.kind not in "buif" or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))):
        raise PictureError(
            f"the image is an array of shape {values.shape} and type {values.dtype}; allowed: truth values, whole numbers or "
            "floats in the shape (height, width), (height, width, 1), (height, width, 3) or (height, width, 4)"
        )
    if 0 in values.shape:
        raise PictureError(f"the image has no pixels (an array of shape {values.shape}); replace or exclude it")
    values, said = _scaled(values * np.uint8(255) if values.dtype.kind == "b" else values)
    return Image.fromarray(np.ascontiguousarray(values)), [Event(EventKind.IMAGE_DEPTH, said)] if said else []


def _frames(image: Image.Image) -> list[Event]:
    try:
        if not getattr(image, "is_animated", False):
            return []
        detail = f"frame or page {image.tell() + 1} of {image.n_frames} is shown, the others are not"  # type: ignore[attr-defined]  # animated ones have n_frames
    except Exception as error:  # a broken frame behind the one that is shown
        detail = f"one frame or page is shown; how many there are cannot be read ({_named(error)})"
    return [Event(EventKind.IMAGE_FRAMES, detail)]


def _upright(image: Image.Image) -> tuple[Image.Image, list[Event]]:
    """Turned as the EXIF block says; a block that cannot be read turns nothing."""
    try:
        orientation = image.getexif().get(0x0112)
        turned = ImageOps.exif_transpose(image)
    except Exception as error:
        return image.copy(), [Event(EventKind.IMAGE_EXIF, f"the EXIF block cannot be read ({_named(error)}): not rotated")]
    rotated = orientation in range(2, 9)
    return turned, [Event(EventKind.IMAGE_ROTATED, "EXIF orientation applied")] if rotated else []


def _eight_bits(image: Image.Image) -> tuple[Image.Image, list[Event]]:
    """Grey of more than 8 bits, or of floats -> 8 bits; other pictures as they are."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image, []
    values, said = _scaled(np.asarray(image))
    return Image.fromarray(values), [Event(EventKind.IMAGE_DEPTH, said)] if said else []


def _scaled(values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Numbers of any range -> (uint8, how they were scaled; None when they were 8 bits already).

    What the numbers mean is not in the file, so it is taken from their range: whole numbers up to 255 are 8 bits, up to 4095
    12 bits, up to 65535 16 bits; floats from 0 to 1 are shares of white, from 0 to 255 8 bits. Others are stretched.
    """
    if values.dtype == np.uint8:
        return values, None
    floats = values.dtype.kind == "f"
    if floats and not np.isfinite(values).all():
        raise PictureError("the image holds values that are not numbers (NaN or infinity); replace or exclude it")
    values = values.astype(np.float64 if floats else np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > (255 if floats else 65535):
        spread = (values - float(low)) / max(float(high) - float(low), 1e-300)
        return np.rint(spread * 255).astype(np.uint8), f"values from {low:g} to {high:g} stretched to 8 bits"
    if floats and high <= 1:
        return np.rint(values * 255).astype(np.uint8), "floats from 0 to 1 scaled to 8 bits"
    if floats:
        return np.rint(values).astype(np.uint8), "floats from 0 to 255 rounded to 8 bits"
    if high <= 255:
        return values.astype(np.uint8), None
    if high <= 4095:
        return (values * 255 // 4095).astype(np.uint8), f"12-bit grey (values up to {high}) scaled to 8 bits"
    return (values // 257).astype(np.uint8), "16-bit grey scaled to 8 bits"


def _opaque(image: Image.Image) -> tuple[Image.Image, list[Event]]:
    """Transparency of any kind laid on white."""
    if image.mode in ("La", "RGBa"):  # colours multiplied by their transparency, as resizing leaves them
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image, []
    try:
        layer = image.convert("RGBA")
    except (TypeError, ValueError) as error:
        if image.mode in ("RGBA", "LA", "PA"):
            raise
        del image.info["transparency"]
        return image, [Event(EventKind.IMAGE_TRANSPARENT, f"the transparency cannot be read ({_named(error)}): taken as opaque")]
    opaque = layer.getchannel("A").getextrema() == (255, 255)
    events = [] if opaque else [Event(EventKind.IMAGE_TRANSPARENT, "transparency laid on white")]
    return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer), events


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def half(image: Image.Image) -> Image.Image:
    """The low-resolution view: both sides halved and truncated, Lanczos (paper Sec. 4.3; the released adapter's filter)."""
    return image.resize(half_size(*image.size), Image.Resampling.LANCZOS)


def half_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of the half-size view."""
    return max(1, width // 2), max(1, height // 2)


HALF_SHARE = 0.25
"""What a half-size view stands for (``Turn.shares``)."""


def share_of(view: Image.Image, image: Image.Image) -> float:
    """The share of ``image`` that a crop or a smaller copy of it stands for (``Turn.shares``): its part of the pixels, at most 1."""
    return min(1.0, view.width * view.height / (image.width * image.height))


def within(image: Image.Image, longest: int) -> Image.Image:
    """``image`` with its longer side at most ``longest`` pixels, Lanczos, aspect kept; never enlarged."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)


def enlarged(image: Image.Image, least: int = TOKEN_SIDE) -> Image.Image:
    """``image`` with at least ``least`` pixels a side, Lanczos, aspect kept."""
    if min(image.size) >= least:
        return image
    scale = max(least / image.width, least / image.height)
    return image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)


def rounded_size(
    width: int, height: int, least: int, most: int, shrink: Callable[[float], float] = math.floor
) -> tuple[int, int]:
    """(width, height) as multiples of ``TOKEN_SIDE`` with ``least`` to ``most`` pixels, the aspect about kept.

    The rule of Qwen2.5-VL's processor (``smart_resize`` of transformers). shrink: how sides above ``most`` are rounded; with ``round``
    they may exceed it.
    """
    wide, high = (max(TOKEN_SIDE, round(side / TOKEN_SIDE) * TOKEN_SIDE) for side in (width, height))
    if wide * high > most:
        scale = math.sqrt(width * height / most)
        wide, high = (max(TOKEN_SIDE, int(shrink(side / scale / TOKEN_SIDE)) * TOKEN_SIDE) for side in (width, height))
    elif wide * high < least:
        scale = math.sqrt(least / (width * height))
        wide, high = (math.ceil(side * scale / TOKEN_SIDE) * TOKEN_SIDE for side in (width, height))
    return wide, high


def rounded(
    image: Image.Image,
    least: int,
    most: int,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    shrink: Callable[[float], float] = math.floor,
) -> Image.Image:
    """``image`` at its ``rounded_size``; as it is where it is longer than ``LONGEST_RATIO`` times its width."""
    if max(image.size) > LONGEST_RATIO * min(image.size):
        return image
    size = rounded_size(*image.size, least, most, shrink)
    return image if size == image.size else image.resize(size, resample)
