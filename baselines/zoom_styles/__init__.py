"""What a style of the zoom loop provides: one file a paper, found by ``STYLES`` of ``zoom_loop.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from awares_bench import Turn
from awares_bench.methods.images import TOKEN_SIDE
from awares_bench.methods.tool_calls import CallError, last_answer

TOKEN = TOKEN_SIDE**2
"""Pixels of one visual token."""

Region = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """What calls may name: the view, or an earlier crop."""

    source: Image.Image
    """What its crops are cut from."""

    shown: Image.Image
    """What the model sees of it, whose pixels are those of a box where a style has boxes in pixels."""

    place: Region
    """Where it lies, in pixels of the document's image."""

    def scaled(self, box: tuple[float, ...]) -> Region:
        """A box in pixels of what is shown -> in pixels of the source."""
        wide, high = self.source.width / self.shown.width, self.source.height / self.shown.height
        return box[0] * wide, box[1] * high, box[2] * wide, box[3] * high

    def inside(self, region: Region) -> Region:
        """A region of the source -> its place in the document's image."""
        left, top, right, bottom = self.place
        wide, high = (right - left) / self.source.width, (bottom - top) / self.source.height
        return left + region[0] * wide, top + region[1] * high, left + region[2] * wide, top + region[3] * high


class Style:
    """How one paper's loop shows, reads and tells. pictures: the document's images, then the crops, in order; images: how many of the first."""

    system: ClassVar[str]
    user = "{question}"
    calls: ClassVar[int]
    budget: ClassVar[int]

    def view(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        """An image, or a cut -> (what crops of it are cut from, what is shown)."""
        raise NotImplementedError

    def crop(self, cut: Image.Image) -> tuple[Image.Image, Image.Image]:
        return self.view(cut)

    def read(self, text: str, official: bool) -> Any:
        """The call in a reply; None where the reply is the answer. Raises CallError."""
        raise NotImplementedError

    def region(self, call: Any, pictures: list[Picture], images: int, official: bool) -> tuple[int, Region]:
        """Which picture a call names, and the region of its source. Raises CallError."""
        raise NotImplementedError

    def answers_too(self, text: str, official: bool) -> bool:
        """Whether a reply that calls is the answer all the same, its crop cut for nothing."""
        return False

    def after_crop(self, picture: Picture, replies: int) -> Turn:
        raise NotImplementedError

    def after_error(self, error: CallError, first: Picture, replies: int, official: bool) -> Turn | None:
        """What follows a call that cannot be obeyed; None: nothing, the reply stands as the answer."""
        raise NotImplementedError

    def answer(self, text: str) -> str:
        return last_answer(text)

    def unanswered(self, text: str, official: bool) -> str:
        """The answer where the last reply allowed is a call."""
        return ""
