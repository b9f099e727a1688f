"""What was shown and asked, what came back and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import zip_longest
from typing import Any

from PIL import Image

from .crop_grid import Box, CropGrid
from .kept_tokens import KeptTokens
from .usage import Usage


@dataclass(frozen=True)
class Sample:
    """A question about images."""

    images: tuple[Image.Image, ...]
    """In the order in which the question shows them."""

    question: str
    """All of its text; where an image stands between two words there is at least a space."""

    key: str = ""
    """Names the sample uniquely and seeds whatever a policy draws at random."""

    evidence: tuple[Box, ...] | None = None
    """Boxes that hold the answer, in pixels of the only image; None where the data does not say."""

    low_is_enough: bool | None = None
    """Whether the half-size view shows the answer; None where the data does not say."""

    parts: tuple[str, ...] = ()
    """Text before each image and after the last, one more than images; empty where all text follows the images."""

    full_tokens: int | None = None
    """Visual tokens of the images at full size, as the model under test counts them; None where no engine has said."""

    other_pictures: Callable[[], Iterable[tuple[Image.Image, ...]]] | None = field(default=None, compare=False)
    """The images of other documents of its task, one document after the other, in an order that depends on the document alone; None
    where the sample is of no task. For controls; opened only when called."""

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
        return Turn(tuple(images), self.parts[-1], image_prefixes=self.parts[:-1], **options)


@dataclass(frozen=True)
class Turn:
    """One user message, images before text, and how it is to be answered."""

    images: tuple[Image.Image, ...] = ()
    """What is shown, in order."""

    text: str = ""
    """The text after the images."""

    system: str | None = None
    """The system message, first turn only; None keeps the chat template's default."""

    is_final: bool = True
    """No turn follows, so nothing need be kept of this one."""

    min_reply_tokens: int | None = None
    """Tokens that the reply may have at the least, even where the task allows fewer; None: the task's limit."""

    image_prefixes: tuple[str, ...] = ()
    """Text before each image, in their order, as far as given."""

    until: tuple[str, ...] | None = None
    """Stop strings of this reply; None: the task's."""

    forced_reply: str | None = None
    """The reply, put into the model's mouth: nothing is decoded, and the next turn reads it as the model's own."""

    omit_newline: bool = False
    """No line break between the model's last reply and this message, as some checkpoints were trained."""

    model: str = ""
    """Who answers: the model under test (""), or one that ``Policy.models`` names, in a conversation of its own."""

    hidden_state_depth: float | None = None
    """Asks for the hidden state of the last token after this share of the decoder's layers, in (0, 1], and for no text."""

    crops: tuple[str, ...] = ()
    """Names of the regions of the image that the turn shows beside or after a smaller view."""

    boxes: tuple[Box, ...] = ()
    """Boxes of the image that the turn shows so, in its pixels, where a method has boxes."""

    shares: tuple[float, ...] = ()
    """The share of the original that each picture stands for, in (0, 1]: 0.25 for a half-size view, a crop's part of the area for a crop;
    empty: every picture is an original. Tiling families turn it into a number of tiles; at native resolution the pixels say it already."""

    crop_grammar: CropGrid | None = None
    """The grid whose regions the reply may call for; a model that can hold a call to the grammar does so (see ``CallGrammar``)."""

    def __post_init__(self) -> None:
        if self.shares and len(self.shares) != len(self.images):
            raise ValueError(f"a turn of {len(self.images)} images has {len(self.shares)} shares; give one each, or none")
        if wrong := [share for share in self.shares if not 0 < share <= 1]:
            raise ValueError(f"the share of an image is {wrong[0]!r}; it is a part of the original, above 0 and at most 1")

    @property
    def shown(self) -> tuple[tuple[Image.Image, float], ...]:
        """Every picture with its share."""
        return tuple(zip(self.images, self.shares or (1.0,) * len(self.images), strict=True))


@dataclass(frozen=True)
class Reply:
    """What the model said to a turn, and what the turn cost."""

    text: str
    """Verbatim, without special tokens."""

    tokens: tuple[int, ...] = ()
    """The ids of the text's tokens; empty where no model wrote them."""

    usage: Usage = field(default_factory=Usage)
    """The cost of the turn."""

    complete: bool = True
    """The model ended the reply itself, or a stop string did; False when the limit on tokens cut it."""

    hidden: tuple[float, ...] = ()
    """The hidden state (D,) that the turn asked for with ``hidden_state_depth``, else empty."""

    peak_memory_bytes: int | None = None
    """Most in use while the batch of this reply was answered (see ``memory``); None where nobody can say."""

    logprob: float | None = None
    """Natural logarithm of the probability of the reply as it was chosen, its end included; None where nobody can say."""

    kept: tuple[KeptTokens, ...] = ()
    """Which visual tokens of the turn's pictures went on, cut by cut, where a pruner cut them and the request asks for it."""


class EventKind(str, Enum):
    """The kinds of ``Event`` of this package. A kind is its value, a plain string; a method may use others of its own."""

    ANSWER_CUT = "answer_cut"
    BATCH_FAILED = "batch_failed"
    CALL_IN_ANSWER = "call_in_answer"
    CALL_LIMIT = "call_limit"
    CALL_OVERRULED = "call_overruled"
    CONTEXT_FULL = "context_full"
    CROPS_TOO_SMALL = "crops_too_small"
    FEATURES_REUSED = "features_reused"
    IMAGE_DEPTH = "image_depth"
    IMAGE_EXIF = "image_exif"
    IMAGE_FRAMES = "image_frames"
    IMAGE_PADDED = "image_padded"
    IMAGE_ROTATED = "image_rotated"
    IMAGE_TRANSPARENT = "image_transparent"
    LOW_VIEW_NOT_A_QUARTER = "low_view_not_a_quarter"
    MALFORMED_BOX = "malformed_box"
    MALFORMED_CALL = "malformed_call"
    NO_EVIDENCE = "no_evidence"
    NO_IMAGE = "no_image"
    NO_QUESTION = "no_question"
    ORIGINAL_SHRUNK = "original_shrunk"
    OUT_OF_MEMORY = "out_of_memory"
    PREFIX_CACHE = "prefix_cache"
    PREFIX_RECOMPUTED = "prefix_recomputed"
    REASONING_APART = "reasoning_apart"
    REPETITION_PENALTY = "repetition_penalty"
    RESOLUTION = "resolution"
    SEVERAL_IMAGES = "several_images"
    SHARE_NOT_TOLD = "share_not_told"
    SWAPPED_PICTURE = "swapped_picture"
    TEMPLATE = "template"
    TOKEN_COUNT = "token_count"

    __str__ = str.__str__


@dataclass(frozen=True)
class Event:
    """Something a reader of the record should know. What a program reads is a field of a turn or of the trajectory instead."""

    kind: str
    """A stable word: an ``EventKind``, or a method's own."""

    detail: str = ""
    """A sentence for people."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be answered: never scored, always reported."""

    error: str
    """Why, in a sentence."""


@dataclass(frozen=True)
class Trajectory:
    """A whole exchange."""

    turns: tuple[Turn, ...]
    """What was shown and asked, turns to auxiliary models included."""

    replies: tuple[Reply, ...]
    """What came back, one for each turn."""

    answer: str
    """What a grader sees."""

    events: tuple[Event, ...]
    """What a reader should know, in the order in which it happened."""

    full_tokens: int
    """Visual tokens of the sample's images at full size."""

    answer_logprob: float | None = None
    """Natural logarithm of the probability of the reply that holds the answer; None where nobody can say."""

    @property
    def crops(self) -> tuple[str, ...]:
        """Names of the regions that the first turn with any shows."""
        return next((turn.crops for turn in self.turns if turn.crops), ())

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Boxes in pixels of the image that the first turn with any shows."""
        return next((turn.boxes for turn in self.turns if turn.boxes), ())

    @property
    def malformed_call(self) -> str | None:
        """Why the model's call could not be read; None when it made none, or one that could."""
        return next((event.detail for event in self.events if event.kind == EventKind.MALFORMED_CALL), None)

    @property
    def usage(self) -> Usage:
        return sum((r.usage for r in self.replies), Usage())

    @property
    def rtr(self) -> float | None:
        """Retained token ratio over all turns; None for a question without an image."""
        return self.usage.rtr(self.full_tokens)


def chat_messages(turns: list[Turn], replies: list[str]) -> list[dict]:
    """Turns and the replies between them -> chat messages in transformers' format, images as PIL objects."""
    out: list[dict] = []
    if turns and turns[0].system is not None:
        out.append({"role": "system", "content": turns[0].system})
    for i, turn in enumerate(turns):
        content: list[dict] = []
        for image, before in zip_longest(turn.images, turn.image_prefixes[: len(turn.images)], fillvalue=""):
            content += [{"type": "text", "text": before}] if before else []
            content.append({"type": "image", "image": image})
        if turn.text:
            content.append({"type": "text", "text": turn.text})
        out.append({"role": "user", "content": content})
        if i < len(replies):
            out.append({"role": "assistant", "content": replies[i]})
    return out
