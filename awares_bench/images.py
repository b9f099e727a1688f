"""Pictures as a vision-language model should get them: RGB, upright, of a shape the processor accepts; changes are stated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .trajectory import Event

MAX_ASPECT = 200
"""Qwen2.5-VL's processor refuses images longer than 200 times their width (transformers ``smart_resize``)."""

SMALLEST_SIDE = 56
"""Below two merged tokens a side a region is no finer than the half-size view, so the whole image is sent instead."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Within the block a truncated file raises OSError. lmms-eval tells Pillow to fill the missing part with grey, silently."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def as_rgb(image: Image.Image) -> tuple[Image.Image, list[Event]]:
    """Any PIL image -> (RGB, upright, what was done to it).

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits (a plain ``convert`` would
    clip it to white). Grey, palette and CMYK images are converted as Pillow does, without an event: nothing is lost.
    Raises OSError when the bytes cannot be decoded.
    """
    events = []
    try:
        with whole_images():
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"the image cannot be decoded ({error}); replace or exclude it") from error
    if upright.size != image.size or (image.getexif().get(0x0112) or 1) != 1:
        events.append(Event("image_rotated", "EXIF orientation applied"))
    if upright.mode.startswith("I;16") or upright.mode == "I":
        values = np.asarray(upright).astype(np.int64)
        if values.max(initial=0) > 255:
            events.append(Event("image_depth", "16-bit grey scaled to 8 bits"))
            values = values // 257
        upright = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        if layer.getextrema()[3][0] < 255:
            events.append(Event("image_transparent", "transparency laid on white"))
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return (upright if upright.mode == "RGB" else upright.convert("RGB")), events


def half(image: Image.Image) -> Image.Image:
    """The low-resolution view: both sides halved and truncated, Lanczos (paper Sec. 4.3; the released adapter's filter)."""
    return image.resize(half_size(*image.size), Image.Resampling.LANCZOS)


def half_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of the half-size view."""
    return max(1, width // 2), max(1, height // 2)


def within(image: Image.Image, longest: int) -> Image.Image:
    """``image`` with its longer side at most ``longest`` pixels, Lanczos, aspect kept; never enlarged."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)


def within_aspect(image: Image.Image) -> tuple[Image.Image, list[Event]]:
    """Pad the short side with white until the processor accepts the shape; the pixels of the image stay as they are."""
    w, h = image.size
    need = -(-max(w, h) // (MAX_ASPECT - 1))
    if min(w, h) >= need:
        return image, []
    canvas = Image.new("RGB", (max(w, need), max(h, need)), (255, 255, 255))
    canvas.paste(image, (0, 0))
    return canvas, [Event("image_padded", f"{w}x{h} padded to {canvas.width}x{canvas.height}: longer than 1:{MAX_ASPECT}")]
