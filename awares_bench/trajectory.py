"""What was shown and asked, what came back and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from .crops import CropGrid
from .usage import Usage


@dataclass(frozen=True)
class Sample:
    """A question about images. ``key`` names it uniquely and seeds whatever a policy draws at random."""

    images: tuple[Image.Image, ...]
    question: str
    key: str = ""


@dataclass(frozen=True)
class Turn:
    """One user message, images before text, and how it is to be answered.

    system: the system message, first turn only; None keeps the chat template's default
    last:   no turn follows, so nothing need be kept of this one
    budget: tokens that the reply may have at the least, even where the task allows fewer (None: the task's)
    calls:  regions the reply may call for; a model that can hold a call to the grammar does so (see ``CallGrammar``)
    """

    images: tuple[Image.Image, ...] = ()
    text: str = ""
    system: str | None = None
    last: bool = True
    budget: int | None = None
    calls: CropGrid | None = None


@dataclass(frozen=True)
class Reply:
    """What the model said to a turn: text verbatim without special tokens, its token ids, and the cost of the turn.

    complete: the model ended the reply itself, or a stop string did; False when the token budget cut it.
    """

    text: str
    tokens: tuple[int, ...] = ()
    usage: Usage = field(default_factory=Usage)
    complete: bool = True


@dataclass(frozen=True)
class Event:
    """Something a reader of the record should know: ``kind`` is a stable word, ``detail`` a sentence."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Trajectory:
    """A whole exchange. ``answer`` is what a grader sees."""

    turns: tuple[Turn, ...]
    replies: tuple[Reply, ...]
    answer: str
    events: tuple[Event, ...]
    full_tokens: int
    crops: tuple[str, ...] = ()

    @property
    def usage(self) -> Usage:
        return sum((r.usage for r in self.replies), Usage())

    @property
    def rtr(self) -> float | None:
        """Retained token ratio over all turns; None for a question without an image."""
        return self.usage.rtr(self.full_tokens)


def messages(turns: list[Turn], replies: list[str]) -> list[dict]:
    """Turns and the replies between them -> chat messages in transformers' format, images as PIL objects."""
    out: list[dict] = []
    if turns and turns[0].system is not None:
        out.append({"role": "system", "content": turns[0].system})
    for i, turn in enumerate(turns):
        content: list[dict] = [{"type": "image", "image": image} for image in turn.images]
        if turn.text:
            content.append({"type": "text", "text": turn.text})
        out.append({"role": "user", "content": content})
        if i < len(replies):
            out.append({"role": "assistant", "content": replies[i]})
    return out
