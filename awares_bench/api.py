"""One picture, one question, from Python.

    model = awares_bench.load("nano")
    answer = model.ask("chart.png", "What is the value of the red bar?")
    model.ask("chart.png", "What is the value of the red bar?", method="visionzip", retention=0.25)
    awares_bench.compare(model, "chart.png", "What is the value of the red bar?", ["full", "low", "awares"])

A method is what it is in lmms-eval: the same names, options, engine and counting.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from awares_bench.evaluation.run_options import OF_CHECKPOINT, RunOptions
from awares_bench.evaluation.summary import aligned
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.generation import MAX_NEW_TOKENS, settings
from awares_bench.inference.loading import auxiliary_checkpoints, load_vlm
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods import registry
from awares_bench.methods.conversation import Event, Failure, Sample, Trajectory
from awares_bench.methods.images import PictureError, as_rgb
from awares_bench.methods.options import parse_int
from awares_bench.methods.registry import Method

from .card import Answer, cards, page
from .errors import AnswerError, OptionError

GENERATION = ("max_new_tokens", "until")
"""Options of a question that are not the method's."""

SHOWN = 60
"""Characters of an answer in a table."""


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
    """A checkpoint that is loaded, to be asked with any method. ``load`` makes it."""

    vlm: LocalModel
    """The model under test."""
    options: dict
    """Those it was loaded with, for the auxiliary models that some methods bring."""
    loaded: dict[tuple, LocalModel] = field(default_factory=dict)
    """Models by what they were loaded with, so that none is loaded twice."""

    def ask(
        self,
        image: object,
        question: str,
        method: str = "awares",
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        until: str | tuple[str, ...] = (),
        **options: Any,
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
        **options: Any,
    ) -> list[Answer]:
        """Answers to pairs of (image, question), in their order; one that cannot be given has its ``error``, and the others go on.

        batch_size: conversations in flight; answers do not depend on it. The rest as in ``ask``, and what it raises but AnswerError.
        """
        with _refusing():
            chosen = registry.build(str(method), options)
            limits = settings({"max_new_tokens": max_new_tokens, "until": list((until,) if isinstance(until, str) else until)})
            engine = self._engine(chosen, parse_int("batch_size", batch_size))
        pairs = list(questions)
        pictures: dict[int, Image.Image] = {}
        events: dict[int, list[Event]] = {}

        def jobs() -> Iterator[Job | Failure]:
            for i, (image, question) in enumerate(pairs):
                try:
                    if not isinstance(question, str):
                        raise ValueError(f"the question is of type {type(question).__name__}; pass a text")
                    pictures[i], events[i] = as_rgb(_contents(image))
                except (ValueError, OSError) as error:
                    yield Failure(str(error))
                else:
                    sample = Sample((pictures[i],), question, question)
                    yield Job(sample, limits.max_new_tokens, tuple(limits.decisive["until"]))

        answers: dict[int, Answer] = {}
        for i, outcome in engine.run(jobs()):
            about = {"method": chosen.label, "question": str(pairs[i][1]), "image": pictures.get(i)}
            answers[i] = _answer(outcome, tuple(events.get(i, ())), about)
        return [answers[i] for i in range(len(pairs))]

    def _engine(self, method: Method, batch_size: int) -> Engine:
        """The engine of a method, its auxiliary models loaded once."""
        checkpoints = auxiliary_checkpoints(method.policy)
        auxiliary = {role: load_vlm(checkpoint, self.options, self.loaded)[0] for role, checkpoint in checkpoints.items()}
        return Engine(self.vlm, method.policy, batch_size, method.pruner, auxiliary, keep_masks=method.pruner is not None)


def load(
    pretrained: str = RunOptions.pretrained,
    *,
    dtype: str = RunOptions.dtype,
    device: str | None = RunOptions.device,
    attn_implementation: str = RunOptions.attn_implementation,
    min_pixels: int | None = RunOptions.min_pixels,
    max_pixels: int | None = RunOptions.max_pixels,
    constrained: bool = RunOptions.constrained,
    repetition_penalty: float | None = RunOptions.repetition_penalty,
    limits: str | None = RunOptions.limits,
    engine: str = RunOptions.engine,
) -> Model:
    """A checkpoint, ready to be asked.

    pretrained: a folder, a folder of LoRA adapters, a hub name, or a name of this package (``nano``, ``nano-sft``, ``nano-base``).
    dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. device: None for a GPU where there is one. limits: of the
    processor by name (None: those of the family's released checkpoints); min_pixels, max_pixels: in their place. constrained: hold
    calls for crops to their grammar. repetition_penalty: None for the checkpoint's. engine: ``generic`` answers a checkpoint of any
    family by ``model.generate``, as it does in any case where the family is not known here.
    Raises ValueError (a CheckpointError where the checkpoint is at fault) or OSError, with what to do.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    options |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "constrained": constrained, "limits": limits}
    if engine not in ("transformers", "generic"):
        raise OptionError(
            f"engine is {engine!r}; allowed here: transformers, generic. A server is asked through lmms-eval (docs/servers.md)"
        )
    options["engine"] = engine
    RunOptions.parse({k: v for k, v in options.items() if v is not None})
    loaded: dict[tuple, LocalModel] = {}
    vlm, _ = load_vlm(pretrained, options, loaded, repetition_penalty)
    vlm.warm_up()
    return Model(vlm, options, loaded)


def methods() -> list[str]:
    """Names of the known methods; ``awares-bench methods`` says what each is."""
    return registry.names()


def compare(
    model: Model, image: object, question: str, methods: Iterable[str] = ("full", "low", "awares"), **options: Any
) -> Comparison:
    """Several methods on one question, one after the other.

    methods: names with their options, such as ``visionzip retention=0.25`` or ``awares pruner=visionzip``. options: of all
    of them, such as ``max_new_tokens``. A question that one of them cannot answer has its ``error`` there.
    Raises OptionError before anything is asked, when a method or option is not known.
    """
    if isinstance(methods, str):
        raise OptionError(f"methods is the text {methods!r}; pass a list of methods, such as [{methods!r}]")
    choices = [(name, own | options) for name, own in map(read_method, methods)]
    if not choices:
        raise OptionError("methods is empty; name at least one, such as full")
    for name, own in choices:
        check(name, own)
    return each(model, image, question, choices)


def check(method: str, options: dict[str, object]) -> None:
    """Raise OptionError when a method or one of its options is not known."""
    with _refusing():
        registry.build(method, {k: v for k, v in options.items() if k not in GENERATION})
        settings({k: v for k, v in options.items() if k in GENERATION})


def each(model: Model, image: object, question: str, methods: Iterable[tuple[str, dict[str, Any]]]) -> Comparison:
    """The answer of each method, given by its name and options; one that cannot be given has its ``error``."""
    try:
        picture = _contents(image)  # an open file is read once
    except (ValueError, OSError) as error:
        raise AnswerError(str(error)) from error
    return Comparison(model.ask_many([(picture, question)], name, 1, **options)[0] for name, options in methods)


def summary(answer: Answer) -> str:
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
        name, *options = shlex.split(text)  # an empty text has no name
    except (ValueError, TypeError, AttributeError):
        raise OptionError(
            f"the method {text!r} cannot be read; write NAME KEY=VALUE …, such as 'visionzip retention=0.25'"
        ) from None
    return name, dict(map(read_option, options))


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
    """An outcome of the engine -> an answer. events: of reading the picture. about: method, question and image."""
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
        boxes=outcome.boxes,
        malformed_call=outcome.malformed_call,
    )


def _numbers(answer: Answer) -> list[str]:
    """Visual tokens, RTR and milliseconds as words; a dash for what is not known."""
    milliseconds = None if answer.seconds is None else 1000 * answer.seconds
    numbers = (answer.tokens, "{:g}"), (answer.rtr, "{:.3f}"), (milliseconds, "{:.0f}")
    return ["-" if value is None else form.format(value) for value, form in numbers]


def _line(text: str) -> str:
    """A text for a table: on one line, long ones cut."""
    text = printable(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def printable(text: str) -> str:
    """A text on one line of a terminal: white space folded, what cannot be printed by its number."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``awares-bench ask``."""
    parser.add_argument("image", metavar="IMAGE", help="path of the picture")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--method", default="awares", help="name of a method, or FILE.py:Class (default: awares)")
    parser.add_argument(
        "--pretrained", default="nano", help="checkpoint folder, LoRA adapters, hub name, or a name of the package"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the method (retention=0.25, pruner=visionzip, max_new_tokens=64) or of the checkpoint "
        f"({', '.join(OF_CHECKPOINT)}); may be repeated",
    )
    parser.add_argument(
        "--compare", metavar="METHODS", help='further methods beside it, with commas between: full,low,"visionzip retention=0.25"'
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the views, the crops and the turns")


def main(args: argparse.Namespace) -> int:
    """``awares-bench ask``."""
    # everything that can be refused is, before a checkpoint is loaded
    options = dict(read_option(text) for text in args.option)
    of_checkpoint: dict[str, Any] = {k: options.pop(k) for k in OF_CHECKPOINT if k in options}
    others = [] if args.compare is None else [read_method(text) for text in args.compare.split(",")]
    methods = [(args.method, options), *others]
    for name, own in methods:
        check(name, own)
    as_rgb(args.image)

    answers = each(load(args.pretrained, **of_checkpoint), args.image, args.question, methods)
    failed = [a for a in answers if a.error is not None]
    if others or not failed:
        print(answers if others else summary(answers[0]))
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        body = (answers if others else answers[0])._repr_html_()
        args.html.write_text(page(body, args.question), encoding="utf-8", errors="backslashreplace")
        print(args.html)
    if failed:
        raise AnswerError(f"{failed[0].method}: {failed[0].error}")
    return 0
