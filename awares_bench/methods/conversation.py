"""What was shown and asked, what came back and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from PIL import Image

from .crop_grid import Box, CropGrid
from .usage import Usage


@dataclass(frozen=True)
class Sample:
    """A question about images. ``key`` names it uniquely and seeds whatever a policy draws at random.

    question:      all of its text; where an image stands between two words there is at least a space
    evidence:      boxes that hold the answer, in pixels of the only image; None where the data does not say
    low_is_enough: whether the half-size view shows the answer; None where the data does not say
    parts:         the text before each image and the text after the last, one more than images; empty where all text follows the images
    """

    images: tuple[Image.Image, ...]
    question: str
    key: str = ""
    evidence: tuple[Box, ...] | None = None
    low_is_enough: bool | None = None
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.parts and len(self.parts) != len(self.images) + 1:
            raise ValueError(
                f"{len(self.images)} images have {len(self.images) + 1} parts of text around them; got {len(self.parts)}"
            )

    def ask(self, images: tuple[Image.Image, ...], **options: Any) -> Turn:
        """The turn that asks the question with ``images`` in the places of its own, further ones after the last.

        options: of the Turn.
        """
        if not self.parts or len(images) < len(self.images):
            return Turn(tuple(images), self.question, **options)
        return Turn(tuple(images), self.parts[-1], before=self.parts[:-1], **options)


@dataclass(frozen=True)
class Turn:
    """One user message, images before text, and how it is to be answered.

    system: the system message, first turn only; None keeps the chat template's default
    last:   no turn follows, so nothing need be kept of this one
    budget: tokens that the reply may have at the least, even where the task allows fewer (None: the task's)
    before: text before each image, in their order, as far as given
    until:  stop strings of this reply (None: the task's)
    said:   the reply, put into the model's mouth: nothing is decoded, and the next turn reads it as its own
    tight:  no line break between the model's last reply and this message, as some checkpoints were trained
    model:  who answers: the model under test (""), or one that ``Policy.models`` names, in a conversation of its own
    probe:  asks for the hidden state of the last token after this share of the decoder's layers, and for no text
    calls:  regions the reply may call for; a model that can hold a call to the grammar does so (see ``CallGrammar``)
    """

    images: tuple[Image.Image, ...] = ()
    text: str = ""
    system: str | None = None
    last: bool = True
    budget: int | None = None
    before: tuple[str, ...] = ()
    until: tuple[str, ...] | None = None
    said: str | None = None
    tight: bool = False
    model: str = ""
    probe: float | None = None
    calls: CropGrid | None = None


@dataclass(frozen=True)
class Reply:
    """What the model said to a turn: text verbatim without special tokens, its token ids, and the cost of the turn.

    complete: the model ended the reply itself, or a stop string did; False when the token budget cut it.
    hidden:   the hidden state (D,) that a probe asked for, else empty.
    peak_memory_bytes: most in use while the batch of this reply was answered (see ``memory``); None where nobody can say.
    """

    text: str
    tokens: tuple[int, ...] = ()
    usage: Usage = field(default_factory=Usage)
    complete: bool = True
    hidden: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None


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
        content: list[dict] = []
        for image, before in zip_longest(turn.images, turn.before[: len(turn.images)], fillvalue=""):
            content += [{"type": "text", "text": before}] if before else []
            content.append({"type": "image", "image": image})
        if turn.text:
            content.append({"type": "text", "text": turn.text})
        out.append({"role": "user", "content": content})
        if i < len(replies):
            out.append({"role": "assistant", "content": replies[i]})
    return out


@dataclass(frozen=True)
class Failure:
    """A sample that could not be answered: never scored, always reported."""

    error: str
