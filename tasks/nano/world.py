"""The nano world: six kinds of 224x224 pictures in which half size shows *where* and only full size always shows *what*.

Every picture holds a few panels. A panel has a **key** that a question names (a colour, a letter, a silhouette), large enough
to be found at half size, and a **content** that the question asks for (a number, a code, a word, a symbol, an arrow), written
large (readable at half size) or small (readable at full size only). Six families, in the shape of the paper's benchmarks:

========  ==========================  =====================  =======================================================
family    picture                     key -> content         question
========  ==========================  =====================  =======================================================
chart     floating bars               colour -> number       What is the value of the red bar?
doc       form with lettered fields   letter -> code         What is the code in field B?
ocr       signs                       colour -> word         What is written on the red sign?
pope      frames, some share colours  colour -> symbol       Is there a round symbol in a red frame?
real      road signs                  colour -> direction    Which way does the arrow on the red sign point?
vstar     silhouettes                 silhouette -> symbol   What is on the triangle? (four options)
========  ==========================  =====================  =======================================================

Everything follows from the seed: ``document(family, seed)`` is a pure function. Training, validation and suite draw their
seeds from the disjoint ranges of ``SEEDS``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 224
FAMILIES = ("chart", "doc", "ocr", "pope", "real", "vstar")
COLOURS = {
    "red": (208, 36, 36),
    "green": (24, 140, 56),
    "blue": (42, 72, 214),
    "orange": (232, 124, 8),
    "purple": (140, 44, 168),
    "black": (24, 24, 24),
}
LETTERS = tuple("ABCDEFGH")
SILHOUETTES = ("circle", "square", "triangle", "diamond", "hexagon")
SYMBOLS = ("star", "cross", "ring", "heart", "moon", "bolt")
ROUND = ("ring", "heart", "moon")
OPTIONS = ("star or cross", "ring", "heart or moon", "bolt")
DIRECTIONS = ("left", "right", "up", "down")
WORDS = tuple(
    [
        "CAT",
        "CAR",
        "CAN",
        "CUP",
        "DOG",
        "DOT",
        "SUN",
        "SUM",
        "MAP",
        "MAN",
        "BUS",
        "BOX",
        "PIN",
        "PEN",
        "TEA",
        "TEN",
        "HAT",
        "HAM",
        "JAR",
        "JAM",
        "OWL",
        "ICE",
        "KEY",
        "ZOO",
    ]
)
CHARACTERS = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SMALL_TEXT, LARGE_TEXT = 12, 24  # font pixels; large at half size is as tall as small at full size
SMALL_MARK, LARGE_MARK = (3.8, 4.4), (9.0, 10.0)  # symbol and arrow radius in pixels
FADE = 0.25  # of the red light from left to right and of the blue light from top to bottom
BAND = 14  # pixels
SNAP = 7  # panels are centred on this grid, half a vision patch: a small tower need not learn every sub-pixel shift
REAL_INSTRUCTION = "Please answer directly with a single word or number."  # RealWorldQA's own closing sentence
SEEDS = {"train": range(0, 2**40), "validation": range(2**40, 2**41), "suite": range(2**41, 2**42)}
"""Disjoint seed ranges. ``awares-bench nano-data --seed S`` draws from ``suite`` too, at another offset than the shipped suite."""


@dataclass(frozen=True)
class Panel:
    """One keyed thing in a picture. ``box`` is (left, top, right, bottom) in pixels."""

    family: str
    key: str
    content: str
    large: bool
    box: tuple[int, int, int, int]

    @property
    def slots(self) -> tuple[str, ...]:
        """What a reader must tell apart, in reading order: the characters, or the one mark."""
        return tuple(self.content) if self.family in ("chart", "doc", "ocr") else (self.content,)

    @property
    def centre(self) -> tuple[float, float]:
        """Where the content is centred, in pixels."""
        left, top, right, bottom = self.box
        x, y = (left + right) / 2, (top + bottom) / 2
        return (x + 12 if self.family == "doc" else x), (y + (right - left) * 0.15 if self.key == "triangle" else y)

    @property
    def glyphs(self) -> list[tuple[float, float, str]]:
        """(x, y, what) of every character and mark drawn on the panel, a lettered field's own letter included."""
        x, y = self.centre
        advance = _font(LARGE_TEXT if self.large else SMALL_TEXT).getlength("0")
        out = [(x + (i - (len(self.slots) - 1) / 2) * advance, y, what) for i, what in enumerate(self.slots)]
        return [(x - 33, y, self.key), *out] if self.family == "doc" else out


@dataclass(frozen=True)
class Document:
    """A picture, a question about it, and what a grader and an oracle need to know.

    ``evidence``: boxes of every panel that the question names. ``low_is_enough``: all of them are written large.
    """

    family: str
    seed: int
    image: Image.Image
    question: str
    answer: str
    options: tuple[str, ...]
    evidence: tuple[tuple[int, int, int, int], ...]
    low_is_enough: bool


def keys_of(family: str) -> tuple[str, ...]:
    return {"doc": LETTERS, "vstar": SILHOUETTES}.get(family, tuple(COLOURS))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono-Bold.ttf"), size)


def draw_text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, fill) -> None:
    """Write ``text`` centred on (x, y)."""
    draw.text((round(x), round(y)), text, font=_font(size), fill=fill, anchor="mm")


def draw_mark(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, name: str, fill, back) -> None:
    """Draw a symbol or an arrow of radius ``r`` pixels centred on (x, y)."""
    around = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
    if name == "star":
        draw.polygon([(x + r * (1.15, 0.5)[i % 2] * a, y + r * (1.15, 0.5)[i % 2] * b) for i, (a, b) in enumerate(around)], fill)
    elif name == "cross":
        draw.rectangle((x - r, y - r * 0.3, x + r, y + r * 0.3), fill)
        draw.rectangle((x - r * 0.3, y - r, x + r * 0.3, y + r), fill)
    elif name == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(r * 0.35)))
    elif name == "heart":
        draw.ellipse((x - r, y - r, x + r * 0.1, y + r * 0.15), fill)
        draw.ellipse((x - r * 0.1, y - r, x + r, y + r * 0.15), fill)
        draw.polygon([(x - r * 0.95, y - r * 0.2), (x + r * 0.95, y - r * 0.2), (x, y + r)], fill)
    elif name == "moon":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
        draw.ellipse((x - r * 0.3, y - r, x + r * 1.4, y + r * 0.7), back)
    elif name == "bolt":
        points = [(0.3, -1.1), (-0.8, 0.2), (-0.05, 0.2), (-0.3, 1.1), (0.8, -0.25), (0.05, -0.25)]
        draw.polygon([(x + r * a, y + r * b) for a, b in points], fill)
    else:
        points = [(1.1, 0), (0, -1), (0, -0.35), (-1.1, -0.35), (-1.1, 0.35), (0, 0.35), (0, 1)]  # points right
        turn = {"right": (1, 0, 0, 1), "left": (-1, 0, 0, 1), "down": (0, 1, 1, 0), "up": (0, 1, -1, 0)}[name]
        draw.polygon([(x + r * (turn[0] * a + turn[1] * b), y + r * (turn[2] * a + turn[3] * b)) for a, b in points], fill)


def _extent(rng: random.Random, family: str) -> tuple[int, int]:
    """Width and height of a panel in pixels."""
    if family == "chart":
        return rng.randint(40, 48), rng.randint(44, 76)
    if family == "doc":
        return rng.randint(62, 70), rng.randint(34, 40)
    if family == "ocr":
        return rng.randint(64, 72), rng.randint(34, 42)
    return (rng.randint(44, 54),) * 2


def _content(rng: random.Random, family: str) -> str:
    if family == "chart":
        return str(rng.randint(10, 99))
    if family == "doc":
        return rng.choice("KLMNPRSTUVWXYZ") + rng.choice("0123456789")
    if family == "ocr":
        return rng.choice(WORDS)
    return rng.choice(DIRECTIONS if family == "real" else SYMBOLS)


def _background(rng: random.Random, family: str, w: int, h: int) -> Image.Image:
    base = rng.choice([(255, 255, 255), (246, 241, 228), (232, 240, 249), (240, 240, 240)])
    image = Image.new("RGB", (w, h), base)
    draw = ImageDraw.Draw(image)
    if family == "chart":
        for y in range(rng.randint(4, 20), h, 28):
            draw.line((0, y, w, y), fill=(205, 205, 205))
    elif family == "doc":
        for y in range(rng.randint(3, 9), h, 9):
            x = 4
            while x < w - 8:
                length = rng.randint(6, 26)
                draw.line((x, y, min(x + length, w - 4), y), fill=(188, 188, 188), width=2)
                x += length + 5
    elif family == "real":
        horizon = rng.randint(h // 4, 3 * h // 4)
        draw.rectangle((0, 0, w, horizon), fill=(196, 222, 244))
        draw.rectangle((0, horizon, w, h), fill=rng.choice([(206, 214, 188), (214, 208, 200)]))
    elif family == "vstar":
        for _ in range(rng.randint(4, 10)):
            x, y = rng.randint(0, w), rng.randint(0, h)
            draw.line((x, y, x + rng.randint(-40, 40), y + rng.randint(-40, 40)), fill=(205, 205, 205), width=2)
    return image


def _draw(draw: ImageDraw.ImageDraw, rng: random.Random, panel: Panel) -> None:
    left, top, right, bottom = panel.box
    (x, y), r = panel.centre, (right - left) / 2
    white, ink = (255, 255, 255), (20, 20, 20)
    size = LARGE_TEXT if panel.large else SMALL_TEXT
    radius = rng.uniform(*(LARGE_MARK if panel.large else SMALL_MARK))
    colour = COLOURS.get(panel.key)
    if panel.family in ("chart", "ocr"):
        draw.rectangle(panel.box, fill=colour)
        draw_text(draw, x, y, panel.content, size, white)
    elif panel.family == "doc":
        draw.rectangle(panel.box, fill=white, outline=(70, 70, 70), width=2)
        draw_text(draw, x - 33, y, panel.key, 22, (30, 60, 170))
        draw_text(draw, x, y, panel.content, size, ink)
    elif panel.family == "pope":
        draw.rectangle(panel.box, fill=white, outline=colour, width=6)
        draw_mark(draw, x, y, radius, panel.content, ink, white)
    elif panel.family == "real":
        draw.ellipse(panel.box, fill=colour)
        draw_mark(draw, x, y, radius, panel.content, white, colour)
    else:
        grey = (88, 92, 100)
        if panel.key == "circle":
            draw.ellipse(panel.box, fill=grey)
        elif panel.key == "square":
            draw.rectangle((x - r * 0.86, y - r * 0.86, x + r * 0.86, y + r * 0.86), fill=grey)
        elif panel.key == "triangle":
            draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=grey)
        elif panel.key == "diamond":
            draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=grey)
        else:
            draw.polygon([(x + r * math.cos(i * math.pi / 3), y + r * math.sin(i * math.pi / 3)) for i in range(6)], fill=grey)
        draw_mark(draw, x, y, radius, panel.content, white, grey)


def scene(
    rng: random.Random, family: str, count: int, size: tuple[int, int] = (SIZE, SIZE), shared_keys: bool = False
) -> tuple[Image.Image, list[Panel]]:
    """A picture of ``size`` (width, height) with up to ``count`` panels that do not touch; fewer when they do not fit.

    shared_keys: several panels may carry the same key (dense targets, and the pope family).
    """
    w, h = size
    image = _background(rng, family, w, h)
    draw = ImageDraw.Draw(image)
    keys = keys_of(family)
    names = [rng.choice(keys) for _ in range(count)] if shared_keys else rng.sample(keys, min(count, len(keys)))
    panels: list[Panel] = []
    for key in names:
        for _ in range(40):
            pw, ph = _extent(rng, family)
            if pw > w - 4 or ph > h - 4:
                continue
            x, y = (
                rng.randint(pw // 2 + 2, w - pw // 2 - 2) // SNAP * SNAP,
                rng.randint(ph // 2 + 2, h - ph // 2 - 2) // SNAP * SNAP,
            )
            box = (x - pw // 2, y - ph // 2, x + pw // 2, y + ph // 2)
            if box[0] < 1 or box[1] < 1:
                continue
            if all(
                box[2] + 6 < p.box[0] or p.box[2] + 6 < box[0] or box[3] + 6 < p.box[1] or p.box[3] + 6 < box[1] for p in panels
            ):
                panel = Panel(family, key, _content(rng, family), rng.random() < 0.5, box)
                _draw(draw, rng, panel)
                panels.append(panel)
                break
    noise = (
        14 * np.random.default_rng(rng.getrandbits(32)).integers(0, 2, (h, w, 1), dtype=np.int16) - 7
    )  # two levels compress well
    return Image.fromarray((np.asarray(image) * _light(w, h) + noise).clip(0, 255).astype(np.uint8)), panels


def _light(w: int, h: int) -> np.ndarray:
    """(h, w, 3) factors of a slanted light: red fades to the right, blue towards the bottom, in bands (they compress).

    It shows a token where it is in the picture: M-RoPE's slow frequencies hardly turn over 4 to 8 tokens.
    """
    x, y = np.arange(w)[None] // BAND * BAND / w, np.arange(h)[:, None] // BAND * BAND / h
    return np.stack([1 - FADE * x + 0 * y, np.ones((h, w)), 1 - FADE * y + 0 * x], -1)


SUFFIX = {
    "chart": "\nAnswer the question with a single word.",
    "doc": "\nAnswer the question using a single word or phrase.",
    "ocr": "",
    "pope": "\nAnswer the question using a single word or phrase.",
    "real": "",
    "vstar": "\nAnswer with the option's letter from the given choices directly.",
}
"""What the official task of each family appends to a question (lmms-eval 0.7.3, ``lmms_eval_specific_kwargs.default``)."""


def prompt(family: str, question: str, options: tuple[str, ...]) -> str:
    """A question as its task words it for the model: options on lines of their own, then the task's instruction."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    return "\n".join([question, *lines]) + SUFFIX[family]


def ask(
    rng: random.Random, panels: list[Panel], panel: Panel, varied: bool = False
) -> tuple[str, str, tuple[str, ...], list[Panel]]:
    """A question about ``panel`` -> (question, answer, options, the panels that are its evidence).

    varied: pope asks for any symbol and vstar shuffles its options, so that a content must be compared with words of the
    question. A nano of three million parameters does not learn that in 1,800 steps (measured), so the suite does not ask it.
    """
    key, content = panel.key, panel.content
    if panel.family == "chart":
        return f"What is the value of the {key} bar?", content, (), [panel]
    if panel.family == "doc":
        return f"What is the code in field {key}?", content, (), [panel]
    if panel.family == "ocr":
        return f"What is written on the {key} sign?", content, (), [panel]
    if panel.family == "real":
        return f"Which way does the arrow on the {key} sign point? {REAL_INSTRUCTION}", content, (), [panel]
    if panel.family == "pope":
        same = [p for p in panels if p.key == key]
        if not varied:
            is_round = any(p.content in ROUND for p in same)
            return f"Is there a round symbol in a {key} frame?", "yes" if is_round else "no", (), same
        there = {p.content for p in same}
        yes = rng.random() < 0.5
        symbol = rng.choice(sorted(there)) if yes else rng.choice([s for s in SYMBOLS if s not in there])
        return f"Is there a {symbol} in a {key} frame?", "yes" if yes else "no", (), same
    if not varied:
        return f"What is on the {key}?", next(x for x, o in zip("ABCD", OPTIONS, strict=True) if content in o), OPTIONS, [panel]
    options = rng.sample([s for s in SYMBOLS if s != content], 3)
    options.insert(rng.randrange(4), content)
    return f"What is on the {key}?", "ABCD"[options.index(content)], tuple(options), [panel]


def family_scene(
    rng: random.Random, family: str, count: tuple[int, int] = (3, 5), size=(SIZE, SIZE)
) -> tuple[Image.Image, list[Panel]]:
    """A picture as the suite has them: 3 to 5 panels, keys distinct but for the pope family."""
    return scene(rng, family, rng.randint(*count), size, shared_keys=family == "pope")


def stream(family: str, seed: int) -> random.Random:
    """The random numbers that belong to a document."""
    return random.Random(f"{family}/{seed}")


def document(family: str, seed: int) -> Document:
    """The document that belongs to a seed, always the same."""
    rng = stream(family, seed)
    image, panels = family_scene(rng, family)
    question, answer, options, evidence = ask(rng, panels, rng.choice(panels))
    return Document(
        family, seed, image, question, answer, options, tuple(p.box for p in evidence), all(p.large for p in evidence)
    )
