"""The regions a model may ask for, the sentence that offers them, and the grammar of the request, both ways.

Regions, indices and prompt wording: AwaRes, arXiv 2603.16932, Sec. 3.2 and supplement 7.3; the released code's README for
the boxes (integer halves; the centre is the middle half of each axis). The ``adapter`` wording is the one of the released
lmms-eval adapter, typo included, because the published weights were evaluated with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom exclusive."""

ALL = "all"


class CropRequestError(ValueError):
    """The reply is a crop request that the grammar does not allow."""


@dataclass(frozen=True)
class CropRequest:
    """Crops that a reply asks for. ``names``: in the order asked, duplicates folded; ``("all",)`` stands alone."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class CropGrid:
    """Named regions of an image and the text protocol around them. ``parse(format(names)).names == names``.

    regions: (name, (left, top, right, bottom) in quarters of the side), in the order of their ids "0", "1", …
    """

    regions: tuple[tuple[str, tuple[int, int, int, int]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.regions)

    @cached_property
    def ids(self) -> dict[str, str]:
        """id -> name, ``all`` included."""
        return {str(i): name for i, name in enumerate(self.names)} | {ALL: ALL}

    @cached_property
    def quarters(self) -> dict[str, tuple[int, int, int, int]]:
        """name -> (left, top, right, bottom) in quarters of the side, ``all`` included."""
        return dict(self.regions) | {ALL: (0, 0, 4, 4)}

    @property
    def prompt(self) -> str:
        """The system message of the paper (supplement 7.3)."""
        return self.prompt_as("paper")

    def prompt_as(self, profile: str) -> str:
        """The system message under a profile: ``paper``, or ``adapter`` for the released adapter's wording."""
        if profile == "paper":
            return (
                "You are a vision-language model that analyzes images and answers questions about them. "
                "If the image resolution is too low for accurate analysis, respond with GET_CROPS: "
                "followed by a list of crop numbers in square brackets (e.g., GET_CROPS: ['3'] or GET_CROPS: ['0', '5']), "
                f"where the available crop numbers and their corresponding areas are {self.ids}, otherwise provide your answer."
            )
        if profile == "adapter":
            return (
                "You are a vision-language model that analyzes images and answers questions about them. "
                "If the image resolution is too low for accurate analysis, respond with GET_CROPS [<crop_number>] "
                "to get a higher resolution version, the avalible <crop_numbers> and their corresponding area of the "
                f"high resolution image are {self.ids} ,otherwise provide your answer."
            )
        raise ValueError(f"prompt is {profile!r}; known profiles: paper, adapter")

    def format(self, names: tuple[str, ...] | list[str] | str) -> str:
        """``("bottom-right",)`` -> ``GET_CROPS: ['3']``."""
        names = (names,) if isinstance(names, str) else tuple(names)
        if not names:
            raise CropRequestError("a crop request names at least one crop; got none")
        return f"GET_CROPS: {[self._id(name) for name in self._fold(names)]}"

    def parse(self, reply: str) -> CropRequest | None:
        """A reply -> the request in it, or None when it is an answer.

        Accepted: a call anywhere in the reply; colon or none, any white space, either quote or none, ids or names in any
        case and with ``-``, ``_`` or a space, several crops. A reply that only mentions GET_CROPS in prose is an answer.

        Raises CropRequestError: an unknown crop, an empty or unclosed list, a second call in one reply, or a reply that
        begins as a call and does not become one.
        """
        calls = list(_CALL.finditer(reply))
        if not calls:
            if _BEGINS.match(reply):
                raise CropRequestError(f"expected GET_CROPS: ['0', ...] with {self._allowed()}, got {_quote(reply)}")
            return None
        if len(calls) > 1:
            raise CropRequestError(f"expected one GET_CROPS call in a reply, got {len(calls)} in {_quote(reply)}")
        inside, closed = calls[0]["inside"], calls[0]["closed"]
        if not closed:
            raise CropRequestError(f"the list of crops is not closed by ']' in {_quote(reply)}")
        if not inside.strip():
            raise CropRequestError(f"the list of crops is empty in {_quote(reply)}; allowed: {self._allowed()}")
        names = []
        for entry in inside.split(","):
            name = self.entry(entry)
            if name is None:
                raise CropRequestError(f"unknown crop {entry.strip()!r} in {_quote(reply)}; allowed: {self._allowed()}")
            names.append(name)
        return CropRequest(self._fold(tuple(names)))

    def entry(self, text: str) -> str | None:
        """What stands between two commas of a call's list, such as `` 'Top Left' `` -> the name it means, or None."""
        match = _ENTRY.fullmatch(text)
        return self._name(match["word"]) if match else None

    def boxes(self, width: int, height: int, names: tuple[str, ...] | list[str] | str) -> list[Box]:
        """Pixel boxes of the named regions of a (width, height) image; ``all`` is the whole image.

        Halves are at ``width // 2``, the centre spans ``width // 4`` to ``3 * width // 4``. No box is empty: on an image
        of one pixel a side every region is that pixel.
        """
        names = (names,) if isinstance(names, str) else names
        unknown = [n for n in names if n not in self.quarters]
        if unknown:
            raise CropRequestError(f"unknown crop {unknown[0]!r}; allowed: {', '.join(self.quarters)}")
        return [_box(self.quarters[name], width, height) for name in names]

    def cut(self, image: Image.Image, names: tuple[str, ...] | list[str] | str) -> list[Image.Image]:
        """The named regions of a PIL image, at its own pixel density."""
        return [image.crop(box) for box in self.boxes(image.width, image.height, names)]

    def area(self, names: Iterable[str]) -> float:
        """Sum of the regions' areas as a fraction of the image; overlaps count twice, as their tokens do."""
        return sum((right - left) * (bottom - top) for left, top, right, bottom in (self.quarters[n] for n in names)) / 16

    def union_area(self, names: Iterable[str]) -> float:
        """Share of the image that the regions cover together, 0 to 1; overlaps count once."""
        boxes = (self.quarters[n] for n in names)
        cells = {(x, y) for left, top, right, bottom in boxes for x in range(left, right) for y in range(top, bottom)}
        return len(cells) / 16

    def holds(self, names: tuple[str, ...], evidence: list[Box], width: int, height: int, slack: int = 2) -> bool:
        """Whether each evidence box lies in one of the named regions, give or take ``slack`` pixels on each side."""
        regions = self.boxes(width, height, names)
        return all(
            any(e[0] >= r[0] - slack and e[1] >= r[1] - slack and e[2] <= r[2] + slack and e[3] <= r[3] + slack for r in regions)
            for e in evidence
        )

    def cheapest_cover(self, evidence: list[Box], width: int, height: int, slack: int = 2, most: int = 2) -> tuple[str, ...]:
        """The regions, at most ``most``, of least total area such that each evidence box lies in one of them; else ``("all",)``.

        slack: pixels by which a box may stick out of its region on each side.
        """
        best: tuple[str, ...] = (ALL,)
        best_area = 1.0
        for n in range(1, most + 1):
            for names in combinations(self.names, n):
                if self.area(names) < best_area and self.holds(names, evidence, width, height, slack):
                    best, best_area = names, self.area(names)
        return best

    def _fold(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (ALL,) if ALL in names else tuple(dict.fromkeys(names))

    def _id(self, name: str) -> str:
        for i, known in self.ids.items():
            if known == name:
                return i
        raise CropRequestError(f"unknown crop {name!r}; allowed: {', '.join(self.ids.values())}")

    def _name(self, word: str) -> str | None:
        word = re.sub(r"[\s_]+", "-", word.strip().lower()).replace("centre", "center")
        return self.ids.get(word) or (word if word in self.ids.values() else None)

    def _allowed(self) -> str:
        return f"ids 0-{len(self.regions) - 1}, the names {', '.join(self.names)}, or all"


_BEGINS = re.compile(r"\s*GET_CROPS\b", re.IGNORECASE)
_CALL = re.compile(r"GET_CROPS\s*:?\s*\[(?P<inside>[^\[\]]*)(?P<closed>\])?", re.IGNORECASE)
_ENTRY = re.compile(r"\s*(?P<quote>['\"]?)\s*(?P<word>[A-Za-z0-9 _-]+?)\s*(?P=quote)\s*")


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, across) * max(0, down)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def hull(boxes: list[Box]) -> Box:
    """The smallest box around one or more boxes."""
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def _quote(reply: str) -> str:
    return repr(reply if len(reply) <= 120 else reply[:117] + "...")


def _box(quarters: tuple[int, int, int, int], width: int, height: int) -> Box:
    left, right = quarters[0] * width // 4, quarters[2] * width // 4
    top, bottom = quarters[1] * height // 4, quarters[3] * height // 4
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


PAPER_GRID = CropGrid(
    (
        ("top-left", (0, 0, 2, 2)),
        ("top-right", (2, 0, 4, 2)),
        ("bottom-left", (0, 2, 2, 4)),
        ("bottom-right", (2, 2, 4, 4)),
        ("center", (1, 1, 3, 3)),
        ("top", (0, 0, 4, 2)),
        ("bottom", (0, 2, 4, 4)),
        ("left", (0, 0, 2, 4)),
        ("right", (2, 0, 4, 4)),
    )
)
"""Four quadrants, centre, four halves, and ``all`` (paper Sec. 3.2)."""
