"""What a model that other software runs has in common, whether a server or vLLM in this process: the conversation is rendered and its tokens are
counted here, by the checkpoint's processor, as ``LocalModel`` counts them; what the other side reports is compared with that.

Nothing of the inside of the model can be reached, so pruners and probes are refused.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from threading import Lock

from transformers import GenerationConfig

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply, Turn, chat_messages
from awares_bench.methods.usage import Usage
from awares_bench.models.base import check_text, rendered
from awares_bench.models.checkpoint import family_of, open_processor
from awares_bench.models.limits import Limits
from awares_bench.models.packaged import resolve

from .decoding import own_penalty, penalty_of
from .session import Prepared, Request, Session

LARGEST_BLOCK = 128
"""Tokens of the largest usual block of a prefix cache, which holds whole blocks only: vLLM's is 16 on GPUs and up to 128 on CPUs."""

_HOLE = "\ufdd0reply\ufdd0"  # two noncharacters around a word, lengthened where a question does contain it


@dataclass(frozen=True)
class Written:
    """What came back for a request, as whoever answered it reports it. Missing is None."""

    text: str
    """Without special tokens, cut before the first stop string."""

    output: int
    """Tokens of the reply, without the one that ended it."""

    ended: bool
    """By the model's end token."""

    stopped: bool = False
    """By a stop string."""

    tokens: tuple[int, ...] = ()
    """Ids of the reply's tokens; those that its text reads as where the written ones are not reported, which may be another number."""

    prompt_tokens: int | None = None

    cached_tokens: int | None = None
    """Prompt tokens that were in the prefix cache."""

    preprocess_seconds: float = 0.0

    seconds: float = 0.0


@dataclass
class Counted:
    """What a turn adds to its conversation, as the checkpoint's processor counts it."""

    visual: int
    """Visual tokens of the turn's pictures."""

    before: int
    """Visual tokens of the turns before it."""

    added: int
    """Text tokens that are new: what ``LocalModel`` feeds beside the pictures."""

    prompt: int
    """Tokens of the whole conversation, up to where the model writes."""

    events: list[Event] = field(default_factory=list)


class ExternalModel(ABC):
    """A model that other software runs. It answers what a ``LocalModel`` answers, except for pruners and probes.

    pretrained: whose processor counts tokens. min_pixels, max_pixels, limits: of pictures, see ``Limits``. repetition_penalty: of every
    reply, unless it is 1; None: the one of ``pretrained``'s ``generation_config.json``.
    """

    engine: str
    """Its name among the options of a run."""

    dtype: str | None = None
    """Of the weights, where it is known."""

    who: str
    """Who answers, in sentences."""

    how_to_keep: tuple[str, str]
    """What to switch on when the other side does not say what it kept of a first turn, and when it kept nothing."""

    def __init__(
        self,
        pretrained: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        repetition_penalty: float | None = None,
        limits: str | None = None,
    ):
        self.folder = resolve(pretrained)
        self.processor = open_processor(self.folder)
        self.family = family_of(self.folder)
        self.own_penalty = _own_penalty(self.folder)
        self.repetition_penalty = self.own_penalty if repetition_penalty is None else penalty_of(repetition_penalty)
        self.tokenizer = self.processor.tokenizer
        asked, family = Limits(limits, min_pixels, max_pixels), self.family
        (least, most), self.limits_name = asked.resolve(family.model_types[0], family.own_limits(self.processor))
        self.limits = {"shortest_edge": least, "longest_edge": most}
        self._told: set[str] = set()
        self._telling = Lock()

    def visual_tokens(self, image, share: float = 1.0) -> int:
        """Merged visual tokens of ``image`` under this processor's limits; those of whoever answers should be the same.

        share: not read. Whoever answers cannot be told what a picture stands for: it shows every picture of a tiling family in all its tiles.
        """
        return self.family.count_tokens(self.processor, self.limits, image)

    def check(self, question: str) -> None:
        """Raise ValueError when a question holds the text of an image mark, or no text."""
        check_text(question, (self.processor.image_token, *self.family.image_marks))

    def text(self, tokens, until: tuple[str, ...] = ()) -> str:
        """Token ids -> text, cut before the first stop string."""
        return cut(self.tokenizer.decode(list(tokens), skip_special_tokens=True), until)

    def prepare(self, request: Request) -> Prepared:
        """Nothing: requests are made where they are sent."""
        return Prepared([])

    def warm_up(self) -> None:
        """Before the first document of a run: what is said once a run may be said again."""
        self._told.clear()

    def hidden_states(self, requests: list[Request]):
        raise RunError(f"this policy reads the inside of a model; give it one of its own, or leave engine={self.engine} out")

    def reply(self, requests: list[Request], pruner=None) -> list[Reply | Failure]:
        """Answer one turn of each conversation. Raises RunError when nothing can be answered any more."""
        if pruner is not None:
            raise RunError(f"{type(pruner).__name__} cuts tokens inside the model; leave engine={self.engine} out, or the pruner")
        return self._answer(requests)

    @abstractmethod
    def _answer(self, requests: list[Request]) -> list[Reply | Failure]:
        """``reply`` without a pruner."""

    # ------------------------------------------------------------------ counting

    def _count(self, request: Request) -> Counted:
        """What a request's turn adds, with the events of its pictures."""
        session, turn = request.session, request.turn
        events = [e for image in turn.images for e in self.family.accepted(image)[1]]
        if self.family.tiles and any(share < 1 for _, share in turn.shown):
            told = f"{self.who} cannot be told a picture's share of the original: views and crops take all the tiles of a whole picture"
            events.append(Event(EventKind.SHARE_NOT_TOLD, told))
        if turn.omit_newline:
            events.append(
                Event(EventKind.TEMPLATE, f"the line break before this message is that of {self.who}; the checkpoint had none")
            )
        history = [*session.turns, turn]
        visual, before = self._visual([turn]), self._visual(session.turns)
        added = len(session.unfed_tokens) + self._added(history, len(session.replies))
        return Counted(visual, before, added, visual + before + self._text(history, session.replies), events)

    def _conclude(self, request: Request, counted: Counted, written: Written | None) -> Reply:
        """The reply that was written, or where ``written`` is None the one that the turn puts into the model's mouth; the session goes on."""
        session, turn = request.session, request.turn
        tokens: tuple[int, ...]
        if written is None:
            text = turn.forced_reply or ""
            unfed = self._ids(text)  # the next turn feeds them
            tokens, complete, output, seconds, events = (), True, 0, (0.0, 0.0), []
        else:
            text, tokens, output = written.text, written.tokens, written.output
            complete, seconds = written.ended or written.stopped, (written.preprocess_seconds, written.seconds)
            # the last token is fed for the one after it; a reply that was cut has none
            unfed = [] if written.ended else self._ids(text)[-1:]
            events = self._compared(session, counted, written)
            session.prompted = (written.prompt_tokens or counted.prompt) + written.output
        session.turns.append(turn)
        session.replies.append(text)
        session.unfed_tokens = unfed
        session.events += [*counted.events, *events]
        usage = Usage(counted.visual, float(counted.visual), max(0, counted.added), output, seconds[0], 0.0, 0.0, seconds[1])
        return Reply(text, tokens, usage, complete)

    def _compared(self, session: Session, counted: Counted, written: Written) -> list[Event]:
        """Events where the other side counts otherwise, whose text tokens are then taken, or did not keep the turns before."""
        events = []
        told = written.prompt_tokens
        if told is None:
            said = "no prompt tokens are reported; they are counted here alone"
            events.append(Event(EventKind.TOKEN_COUNT, said))
        elif told != counted.prompt:
            said = f"{self.who} counts {told} prompt tokens, the processor here {counted.prompt}: the templates differ"
            events.append(Event(EventKind.TOKEN_COUNT, said))
        if told is not None:
            beyond = told - counted.prompt
            counted.added += beyond - session.uncounted  # those of the turns before are in their own counts
            session.uncounted = beyond
        if any(turn.forced_reply is None for turn in session.turns):
            events += self._prefix_events(session, written.cached_tokens)
        return events

    def _prefix_events(self, session: Session, cached: int | None) -> list[Event]:
        """An event where less of the turns before was kept than whole blocks of them; the first of a run is said on the screen."""
        length = session.prompted
        if cached is None:
            remedy = self.how_to_keep[0]
            said = f"{self.who} does not say whether it kept the first turn; tokens are counted as if it had"
        elif cached == 0 or length - cached > min(LARGEST_BLOCK, length // 2):
            remedy = self.how_to_keep[1]
            kept = "nothing" if cached == 0 else f"{cached}"
            said = f"{self.who} kept {kept} of the first turn's {length} tokens and prefilled the others again, uncounted"
        else:
            return []
        self._say(remedy, f"{said}; {remedy}")
        return [Event(EventKind.PREFIX_CACHE, said)]

    def _say(self, key: str, sentence: str) -> None:
        """A sentence on standard error, once a run."""
        with self._telling:
            if key not in self._told:
                self._told.add(key)
                print(f"engine={self.engine}: {sentence}", file=sys.stderr, flush=True)

    def _visual(self, turns: list[Turn]) -> int:
        return sum(self.visual_tokens(image) for turn in turns for image in turn.images)

    def _text(self, turns: list[Turn], replies: list[str]) -> int:
        """Tokens of the rendered conversation that are not visual."""
        text = self._rendered(turns, replies)
        return len(self._ids(text)) - sum(len(turn.images) for turn in turns)

    def _added(self, turns: list[Turn], replies: int) -> int:
        """Tokens that the last turn adds after the reply before it and that are not visual."""
        return len(self._ids(self._new_text(turns, replies))) - len(turns[-1].images)

    def _new_text(self, turns: list[Turn], replies: int) -> str:
        """What the last turn adds after the reply before it, a placeholder for each picture."""
        hole = _HOLE
        while any(hole in text for t in turns for text in (t.text, t.system or "", *t.image_prefixes)):
            hole += "\ufdd0"
        return self._rendered(turns, [hole] * replies).split(hole)[-1]

    def _rendered(self, turns: list[Turn], replies: list[str]) -> str:
        """The conversation by the checkpoint's chat template, a placeholder for each picture."""
        return rendered(self.processor, chat_messages(turns, replies))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def cut(text: str, until: tuple[str, ...]) -> str:
    """A text before the first of the stop strings."""
    return text[: min((text.find(s) for s in until if s in text), default=len(text))]


def context_ended(tokens: int, budget: int, what_to_raise: str) -> Failure:
    """The failure of a reply that the other side cut before its budget."""
    return Failure(
        f"the reply was cut after {tokens} of {budget} tokens: the context was full; raise {what_to_raise}, or exclude the document"
    )


def _own_penalty(pretrained: str) -> float:
    """The repetition penalty of a checkpoint's ``generation_config.json``; 1 where it has no such file."""
    try:
        return own_penalty(GenerationConfig.from_pretrained(pretrained))
    except OSError:
        return 1.0
