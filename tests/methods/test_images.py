"""Every kind of picture reaches the model as RGB, upright, in a shape the processor takes; what was changed is said."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from awares_bench.methods.images import PictureError, as_rgb, half
from awares_bench.models.qwen2_5_vl import within_aspect

from ..helpers.tiny import pixels, tiny_vlm


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
    assert pixels(vlm, half(image))[0].shape[0] >= 16


def test_half_truncates_and_never_vanishes():
    assert half(Image.new("RGB", (225, 3))).size == (112, 1)
    assert half(Image.new("RGB", (1, 1))).size == (1, 1)


def stored(image, kind, **more):
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


def read(data):
    return as_rgb(Image.open(io.BytesIO(data)))


def flat(value, dtype=np.uint16):
    return np.full((40, 60), value, dtype)


@pytest.mark.parametrize("mode", ["La", "RGBa", "LAB", "HSV", "F", "I", "I;16", "I;16B", "I;16L", "YCbCr", "PA", "RGBX"])
def test_rare_modes_become_rgb(mode):
    image, _ = as_rgb(Image.new(mode, (60, 40)))
    assert (image.mode, image.size) == ("RGB", (60, 40))


def test_premultiplied_colours_are_laid_on_white_as_they_were():
    plain = Image.new("RGBA", (6, 4), (200, 100, 50, 128))
    laid, events = as_rgb(plain.convert("RGBa"))
    assert np.abs(np.asarray(laid).astype(int) - np.asarray(as_rgb(plain)[0])).max() <= 2 and kinds(events) == [
        "image_transparent"
    ]
    assert as_rgb(Image.new("LA", (6, 4), (0, 0)).convert("La"))[0].getpixel((0, 0)) == (255, 255, 255)


def test_lab_keeps_its_lightness():
    assert as_rgb(Image.new("LAB", (4, 4), (255, 128, 128)))[0].getpixel((0, 0))[1] > 250
    assert max(as_rgb(Image.new("LAB", (4, 4), (0, 128, 128)))[0].getpixel((0, 0))) < 5


@pytest.mark.parametrize(
    ("values", "shown", "said"),
    [
        (flat(200), 200, None),
        (flat(256), 15, "12-bit"),
        (flat(2048), 127, "12-bit"),
        (flat(4095), 255, "12-bit"),
        (flat(4096), 15, "16-bit"),
        (flat(65535), 255, "16-bit"),
        (flat(1000, np.int32), 62, "12-bit"),
        (flat(40000, np.int32), 155, "16-bit"),
        (flat(0, np.float32), 0, "floats from 0 to 1"),
        (flat(0.5, np.float32), 128, "floats from 0 to 1"),
        (flat(1, np.float32), 255, "floats from 0 to 1"),
        (flat(77.4, np.float32), 77, "floats from 0 to 255"),
    ],
)
def test_depth_is_told_from_the_values_and_said(values, shown, said):
    for image, events in (as_rgb(Image.fromarray(values)), as_rgb(values)):
        assert image.getpixel((5, 5)) == (shown,) * 3
        assert (said in events[0].detail and kinds(events) == ["image_depth"]) if said else not events


def test_values_of_no_known_range_are_stretched_and_said():
    ramp = np.linspace(-3, 7, 60, dtype=np.float32)[None].repeat(40, 0)
    for values in (ramp, (ramp * 1000).astype(np.int32), (ramp + 3) * 1e6):
        image, events = as_rgb(Image.fromarray(values))
        assert image.getextrema() == ((0, 255),) * 3 and "stretched to 8 bits" in events[0].detail
    with pytest.raises(OSError, match="not numbers"):
        as_rgb(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_big_endian_sixteen_bits_are_as_little_endian():
    values = np.arange(0, 60000, 1000, dtype=np.uint16)[None].repeat(4, 0)
    big = Image.frombytes("I;16B", (60, 4), values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(as_rgb(big)[0]), np.asarray(as_rgb(Image.fromarray(values))[0]))


def test_palettes_with_transparency_bytes_are_laid_on_white():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    shown, events = read(stored(image, "PNG", transparency=bytes([255, 0])))
    assert shown.getpixel((0, 0)) == (255, 255, 255) and kinds(events) == ["image_transparent"]
    image = Image.new("L", (6, 4), 9)
    image.info["transparency"] = b"ab"
    shown, events = as_rgb(image)
    assert shown.getpixel((0, 0)) == (9, 9, 9) and "taken as opaque" in events[0].detail and image.info["transparency"] == b"ab"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_shown_and_said(kind):
    frames = [Image.new("RGB", (60, 40), (c, 0, 0)) for c in (250, 20, 90)]
    shown, events = read(
        stored(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    )
    assert shown.getpixel((5, 5)) == (250, 0, 0)
    assert [e.detail for e in events if e.kind == "image_frames"] == ["frame or page 1 of 3 is shown, the others are not"]


def test_a_broken_later_frame_costs_nothing():
    frames = [Image.effect_noise((60, 40), 90) for _ in range(3)]
    data = stored(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    shown, events = read(data[: len(data) * 2 // 3])
    assert shown.size == (60, 40) and "image_frames" in kinds(events)


def entry_bomb(kind):
    """A small container whose picture inside says that it has four hundred million pixels."""
    head = b"\x89PNG\r\n\x1a\n"
    body = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    png = head + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 0) + b"IDAT" + bytes(60)
    if kind == "ICNS":
        return b"icns" + struct.pack(">I", 16 + len(png)) + b"ic07" + struct.pack(">I", 8 + len(png)) + png
    if kind == "ICO":
        return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(png), 22) + png
    if kind == "GIF":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", 20000, 20000, 0, 0, 0)
            + b","
            + struct.pack("<HHHHB", 0, 0, 20000, 20000, 0)
            + b"\x02\x00;"
        )
    return png


@pytest.mark.parametrize("kind", ["ICNS", "ICO", "GIF", "PNG"])
def test_a_decompression_bomb_is_refused_wherever_it_hides(kind):
    with pytest.raises(PictureError, match="exceeds limit"):
        as_rgb(entry_bomb(kind))


@pytest.mark.parametrize(
    "error", [KeyError("x"), struct.error("short"), RecursionError(), AssertionError(), MemoryError(), StopIteration()]
)
def test_whatever_a_reader_raises_is_a_sentence_about_the_image(error, monkeypatch):
    image = Image.new("RGB", (4, 4))

    def load():
        raise error

    monkeypatch.setattr(image, "load", load)
    with pytest.raises(PictureError, match=f"the image cannot be decoded .{type(error).__name__}.*replace or exclude it"):
        as_rgb(image)


def test_a_broken_exif_block_turns_nothing_and_is_said(monkeypatch):
    image = Image.new("RGB", (60, 40), (1, 2, 3))

    def getexif():
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(image, "getexif", getexif)
    shown, events = as_rgb(image)
    assert shown.size == (60, 40) and kinds(events) == ["image_exif"] and "not rotated" in events[0].detail
    exif = Image.Exif()
    exif[0x0112] = 77
    assert read(stored(Image.new("RGB", (60, 40)), "JPEG", exif=exif))[1] == []


def test_a_picture_may_be_given_as_a_path_bytes_a_dictionary_or_an_array(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    data, place = stored(image, "PNG"), tmp_path / "a picture.png"
    place.write_bytes(data)
    given = [str(place), place, place.as_uri(), data, bytearray(data), memoryview(data)]
    given += [
        {"bytes": data, "path": None},
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": str(place)},
        {"path": place},
    ]
    given += [f"data:image/png;base64,{base64.b64encode(data).decode()}", np.asarray(image), torch.from_numpy(np.array(image))]
    given += [np.asarray(image).tolist(), np.asarray(image) / 255.0, np.asarray(image).astype(np.uint16) * 257]
    for picture in given:
        shown, _ = as_rgb(picture)
        assert np.array_equal(np.asarray(shown), np.asarray(image)), type(picture)
    assert as_rgb(np.eye(40, dtype=bool))[0].getextrema() == ((0, 255),) * 3
    assert as_rgb(np.zeros((40, 60, 1), np.uint8))[0].size == (60, 40)
    assert kinds(as_rgb(np.zeros((40, 60, 4), np.uint8))[1]) == ["image_transparent"]


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("https://example.com/a.png", "nothing is downloaded"),
        ("s3://bucket/a.png", "nothing is downloaded"),
        ("nowhere/a.png", "no image file at 'nowhere/a.png'"),
        (".", "no image file"),
        ("", "no image file"),
        ("a\0b.png", "no image"),
        ("x" * 5000, "no image"),
        ("~nobody-of-that-name/a.png", "no image"),
        ("data:image/png;base64,!!", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"this is no picture", "cannot be decoded"),
        ({}, "without bytes or path"),
        ({"bytes": None, "path": None}, "without bytes or path"),
        (None, "of type NoneType; allowed"),
        (7, "of type int; allowed"),
        (np.zeros((3, 40, 60), np.uint8), r"an array of shape \(3, 40, 60\)"),
        (np.zeros((2, 40, 60, 3), np.uint8), "an array of shape"),
        (np.zeros((0, 60, 3), np.uint8), "no pixels"),
        (np.array([["a"]]), "allowed: truth values"),
        (np.full((4, 4), np.inf), "not numbers"),
        ([], "an array of shape"),
        ([[1, 2], [3]], "cannot be decoded"),
        (Image.new("RGB", (0, 10)), "no pixels"),
        (Image.new("L", (10, 0)), "no pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(picture, said):
    with pytest.raises(PictureError, match=said):
        as_rgb(picture)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match="no image file"):
        as_rgb(str(tmp_path / "pipe.png"))
