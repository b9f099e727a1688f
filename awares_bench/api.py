"""One picture, one question, from Python.

    model = awares_bench.load("nano")
    answer = model.ask("chart.png", "What is the value of the red bar?")
    model.ask("chart.png", "What is the value of the red bar?", method="visionzip", retention=0.25)
    awares_bench.compare(model, "chart.png", "What is the value of the red bar?", ["full", "low", "awares"])

A method is what it is in lmms-eval: the same names, options, engine and counting.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import yaml
from PIL import Image

from awares_bench.evaluation.summary import aligned
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.generation import MAX_NEW_TOKENS, settings
from awares_bench.inference.loading import auxiliary_checkpoints, load_vlm, whole
from awares_bench.inference.local_model import MAX_PIXELS, MIN_PIXELS, VLM
from awares_bench.methods import registry
from awares_bench.methods.conversation import Event, Failure, Reply, Sample, Trajectory, Turn
from awares_bench.methods.images import PictureError, as_rgb
from awares_bench.methods.registry import Method
from awares_bench.models.packaged import NANO

from .card import card, cards
from .errors import AnswerError, OptionError

LOAD_OPTIONS = ("dtype", "device", "attn_implementation", "min_pixels", "max_pixels", "constrained", "repetition_penalty")
"""Options of ``load`` beside the checkpoint."""

GENERATION = ("max_new_tokens", "until")
"""Options of a question that are not the method's."""

SHOWN = 60
"""Characters of an answer in a table."""


@dataclass(frozen=True, repr=False)
class Answer:
    """An answer, what it cost and how it came about. It holds its pictures; documents by the thousand are lmms-eval's.

    method:      name and options, such as ``awares+visionzip retention=0.5``
    image:       the picture as the model could see it: RGB, upright, in full size; None when it could not be read
    text:        the answer; None when there is none
    error:       why there is none, in a sentence; None when there is
    crops:       names of the regions that were shown after a call
    rtr:         retained token ratio: visual tokens fed to the decoder over all turns, over ``full_tokens``
    tokens:      visual tokens fed to the decoder over all turns, averaged over its layers
    full_tokens: visual tokens of the picture at full resolution, under the same limits
    seconds:     of all turns; in a batch of several, this answer's share
    turns:       what was shown and said to the model; replies: what it said, verbatim, with the cost of each turn
    events:      what a reader should know
    A number that is not known is None.
    """

    method: str
    question: str
    image: Image.Image | None = None
    text: str | None = None
    error: str | None = None
    crops: tuple[str, ...] = ()
    rtr: float | None = None
    tokens: float | None = None
    full_tokens: int | None = None
    seconds: float | None = None
    turns: tuple[Turn, ...] = ()
    replies: tuple[Reply, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def malformed(self) -> bool:
        """Whether the model made a call that the grammar does not allow."""
        return any(event.kind == "malformed_call" for event in self.events)

    def __str__(self) -> str:
        return f"error: {self.error}" if self.text is None else self.text

    def __repr__(self) -> str:
        """One line: the answer and the numbers."""
        told = [f"method={self.method!r}", f"text={self.text!r}" if self.error is None else f"error={self.error!r}"]
        told += [f"crops={self.crops}"] if self.crops else []
        told += [f"rtr={self.rtr:.3f}"] if self.rtr is not None else []
        return f"Answer({', '.join(told)})"

    def _repr_html_(self) -> str:
        return card(self)


class Comparison(list):
    """Answers of several methods to one question, in the order asked; it prints as a table, and in a notebook it is one of cards."""

    def rows(self) -> list[list[str]]:
        """Words of the table, its head first; a number that is not known is a dash."""
        head = ["method", "answer", "crops", "visual tokens", "RTR", "ms"]
        return [head, *([_line(a.method), _line(str(a)), _line(", ".join(a.crops)), *_numbers(a)] for a in self)]

    def __str__(self) -> str:
        return aligned(self.rows(), left=(0, 1, 2))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return cards(self, self.rows())


@dataclass(eq=False)
class Model:
    """A checkpoint that is loaded, to be asked with any method. ``load`` makes it.

    vlm: the model under test. options: those it was loaded with, for the auxiliary models that some methods bring.
    """

    vlm: VLM
    options: dict
    loaded: dict[tuple, VLM] = field(default_factory=dict)

    def ask(
        self,
        image: object,
        question: str,
        method: str = "awares",
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        until: str | tuple[str, ...] = (),
        **options,
    ) -> Answer:
        """The answer of a method to a question about one picture.

        image: a path, the bytes of a file, an open binary file, a PIL image, or an array of shape (height, width, 3); see
        ``images.opened``. method: a name of ``methods()`` or ``FILE.py:Class``; options: the method's own, ``pruner`` and
        ``policy`` among them. max_new_tokens: of the answer. until: strings that end it.
        Raises OptionError for a method or option that is not known, AnswerError when this question cannot be answered, and
        RuntimeError when no question could be, such as for a pruner that does not fit the model.
        """
        (answer,) = self.ask_many([(image, question)], method, 1, max_new_tokens=max_new_tokens, until=until, **options)
        if answer.error is not None:
            raise AnswerError(answer.error)
        return answer

    def ask_many(
        self,
        questions: Iterable[tuple[object, str]],
        method: str = "awares",
        batch_size: int = 8,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        until: str | tuple[str, ...] = (),
        **options,
    ) -> list[Answer]:
        """Answers to pairs of (image, question), in their order; one that cannot be given has its ``error``, and the others go on.

        batch_size: conversations in flight; answers do not depend on it. The rest as in ``ask``, and what it raises but AnswerError.
        """
        with _refusing():
            made = registry.build(str(method), options)
            asked = settings({"max_new_tokens": max_new_tokens, "until": list((until,) if isinstance(until, str) else until)})
            engine = self._engine(made, whole("batch_size", batch_size))
        pairs = list(questions)
        shown: dict[int, Image.Image] = {}
        events: dict[int, list[Event]] = {}

        def jobs() -> Iterator[Job | Failure]:
            for i, (image, question) in enumerate(pairs):
                try:
                    if not isinstance(question, str):
                        raise ValueError(f"the question is of type {type(question).__name__}; pass a text")
                    shown[i], events[i] = as_rgb(_contents(image))
                except (ValueError, OSError) as error:
                    yield Failure(str(error))
                else:
                    yield Job(Sample((shown[i],), question, question), asked.max_new_tokens, tuple(asked.decisive["until"]))

        answers: dict[int, Answer] = {}
        for i, outcome in engine.run(jobs()):
            about = {"method": made.label, "question": str(pairs[i][1]), "image": shown.get(i)}
            answers[i] = _answer(outcome, tuple(events.get(i, ())), about)
        return [answers[i] for i in range(len(pairs))]

    def _engine(self, made: Method, batch_size: int) -> Engine:
        """The engine of a method, its auxiliary models loaded once."""
        checkpoints = auxiliary_checkpoints(made.policy)
        others = {role: load_vlm(checkpoint, self.options, self.loaded)[0] for role, checkpoint in checkpoints.items()}
        return Engine(self.vlm, made.policy, batch_size, made.pruner, others)


def load(
    pretrained: str = NANO,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    constrained: bool = True,
    repetition_penalty: float | None = None,
) -> Model:
    """A checkpoint, ready to be asked.

    pretrained: a folder, a folder of LoRA adapters, a hub name, or a name of this package (``nano``, ``nano-sft``, ``nano-base``).
    dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. device: None for a GPU where there is one. min_pixels, max_pixels:
    limits of the processor. constrained: hold calls for crops to their grammar. repetition_penalty: None for the checkpoint's.
    Raises ValueError (a CheckpointError where the checkpoint is at fault) or OSError, with what to do.
    """
    options = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    options |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "constrained": constrained}
    loaded: dict[tuple, VLM] = {}
    vlm, _ = load_vlm(pretrained, options, loaded, repetition_penalty)
    vlm.warm_up()
    return Model(vlm, options, loaded)


def methods() -> list[str]:
    """Names of the known methods; ``awares-bench methods`` says what each is."""
    return registry.names()


def compare(
    model: Model, image: object, question: str, methods: Iterable[str] = ("full", "low", "awares"), **options
) -> Comparison:
    """Several methods on one question, one after the other.

    methods: names with their options, such as ``visionzip retention=0.25`` or ``awares pruner=visionzip``. options: of all
    of them, such as ``max_new_tokens``. A question that one of them cannot answer has its ``error`` there.
    Raises OptionError before anything is asked, when a method or option is not known.
    """
    if isinstance(methods, str):
        raise OptionError(f"methods is the text {methods!r}; pass a list of methods, such as [{methods!r}]")
    asked = [(name, given | options) for name, given in map(read_method, methods)]
    if not asked:
        raise OptionError("methods is empty; name at least one, such as full")
    for name, given in asked:
        check(name, given)
    return each(model, image, question, asked)


def check(method: str, options: dict[str, object]) -> None:
    """Raise OptionError when a method or one of its options is not known."""
    with _refusing():
        registry.build(method, {k: v for k, v in options.items() if k not in GENERATION})
        settings({k: v for k, v in options.items() if k in GENERATION})


def each(model: Model, image: object, question: str, methods: Iterable[tuple[str, dict[str, object]]]) -> Comparison:
    """The answer of each method, given by its name and options; one that cannot be given has its ``error``."""
    try:
        picture = _contents(image)  # an open file is read once
    except (ValueError, OSError) as error:
        raise AnswerError(str(error)) from error
    return Comparison(model.ask_many([(picture, question)], name, 1, **options)[0] for name, options in methods)


def told(answer: Answer) -> str:
    """An answer and its numbers, a line each, for a terminal."""
    tokens, rtr, _ = _numbers(answer)
    seconds = "-" if answer.seconds is None else f"{answer.seconds:.3f}"
    lines = [("answer", printable(str(answer))), ("crops", printable(", ".join(answer.crops)) or "none")]
    lines += [("visual tokens", f"{tokens} of {'-' if answer.full_tokens is None else answer.full_tokens}"), ("RTR", rtr)]
    lines += [("seconds", seconds), ("method", printable(answer.method))]
    lines += [("event", printable(f"{e.kind}: {e.detail}")) for e in answer.events]
    return aligned([[name, value] for name, value in lines], left=(0, 1))


def read_method(text: str) -> tuple[str, dict[str, object]]:
    """``visionzip retention=0.25`` -> the name and its options. Raises OptionError."""
    try:
        name, *given = shlex.split(text)  # an empty text has no name
    except (ValueError, TypeError, AttributeError):
        raise OptionError(
            f"the method {text!r} cannot be read; write NAME KEY=VALUE …, such as 'visionzip retention=0.25'"
        ) from None
    return name, dict(read_option(one) for one in given)


def read_option(text: str) -> tuple[str, object]:
    """``retention=0.25`` -> the key and its value, a number, truth value or text as YAML reads it. Raises OptionError."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise OptionError(f"the option {text!r} is not KEY=VALUE; write it so, such as retention=0.25")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


@contextmanager
def _refusing() -> Iterator[None]:
    """What methods and options are refused with, as an OptionError."""
    try:
        yield
    except RuntimeError:  # the method does not fit the model, or the device is broken
        raise
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error


def _contents(image: object) -> object:
    """What an open file holds; any other picture as it is. Raises PictureError."""
    if isinstance(image, Image.Image) or not hasattr(image, "read"):
        return image
    data = image.read()
    if not isinstance(data, bytes):
        raise PictureError(f"the image is a file that is open for {type(data).__name__}; open it for bytes, mode 'rb'")
    if not data:
        raise PictureError("the image is an open file with nothing left to read; seek to its beginning, or open it again")
    return data


def _answer(outcome: Trajectory | Failure, events: tuple[Event, ...], about: dict) -> Answer:
    if isinstance(outcome, Failure):
        return Answer(**about, error=outcome.error, events=events)
    return Answer(
        **about,
        text=outcome.answer,
        crops=outcome.crops,
        rtr=outcome.rtr,
        tokens=outcome.usage.prefill,
        full_tokens=outcome.full_tokens,
        seconds=outcome.usage.seconds,
        turns=outcome.turns,
        replies=outcome.replies,
        events=events + outcome.events,
    )


def _numbers(answer: Answer) -> list[str]:
    milliseconds = None if answer.seconds is None else 1000 * answer.seconds
    told = (answer.tokens, "{:g}"), (answer.rtr, "{:.3f}"), (milliseconds, "{:.0f}")
    return ["-" if value is None else form.format(value) for value, form in told]


def _line(text: str) -> str:
    """A text for a table: on one line, long ones cut."""
    text = printable(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def printable(text: str) -> str:
    """A text on one line of a terminal: white space folded, what cannot be printed by its number."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
