"""Every kind of picture reaches the model as RGB, upright, in a shape the processor takes; what was changed is said."""

import numpy as np
import pytest
from PIL import Image

from awares_bench.images import as_rgb, half, within_aspect

from .tiny import tiny_vlm


def kinds(events):
    return [e.kind for e in events]


def grey16():
    return Image.fromarray(np.full((40, 60), 40000, dtype=np.uint16))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "RGB"])
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    image, events = as_rgb(Image.new("RGB", (60, 40), (200, 30, 90)).convert(mode))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert kinds(events) == []


def test_transparency_is_laid_on_white_and_said():
    image, events = as_rgb(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert image.getpixel((0, 0)) == (255, 255, 255) and kinds(events) == ["image_transparent"]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    image, events = as_rgb(grey16())
    assert image.getpixel((0, 0)) == (155, 155, 155) and kinds(events) == ["image_depth"]


def test_exif_rotation_is_applied_and_said():
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    import io

    data = io.BytesIO()
    image.save(data, "JPEG", exif=exif)
    turned, events = as_rgb(Image.open(io.BytesIO(data.getvalue())))
    assert turned.size == (40, 60) and kinds(events) == ["image_rotated"]


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (1, 5000)])
def test_extreme_shapes_are_padded_not_resized(size):
    image, events = within_aspect(Image.new("RGB", size, (9, 9, 9)))
    assert max(image.size) < 200 * min(image.size)
    assert image.crop((0, 0, *size)).getextrema() == ((9, 9),) * 3
    assert kinds(events) == ([] if size == (1, 1) else ["image_padded"])
    vlm = tiny_vlm()
    assert vlm.pixels(half(image))[0].shape[0] >= 16


def test_half_truncates_and_never_vanishes():
    assert half(Image.new("RGB", (225, 3))).size == (112, 1)
    assert half(Image.new("RGB", (1, 1))).size == (1, 1)
