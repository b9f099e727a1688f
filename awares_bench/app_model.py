"""What answers the page of ``awares-bench app``: the model and what a visitor may ask of it. Runs in a process of its own, see ``serve``.

PyTorch is imported within the functions: the page reads names here and needs none of it.
"""

from __future__ import annotations

import argparse
import pickle
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import card
from .errors import AwaresError, OptionError
from .evaluation.run_options import OF_CHECKPOINT

if TYPE_CHECKING:
    from . import api


NOTHING = "(none)"
"""A column that asks no method."""

QUESTION_CHARACTERS = 4000


def serve(connection: Connection, args: argparse.Namespace) -> None:
    """Load the model, say so, then answer what comes through ``connection`` until it is closed.

    Sent: once a sentence that says where the model is; then for each question an answer a method, and None at the end. What is refused
    is sent as the exception, and ends the question.
    """
    with suppress(ValueError):  # in a thread there is no signal to ignore
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the page's, which ends this process
    try:
        model, place = load_model(args)
    except Exception as error:  # whatever it is, the command says it
        connection.send(_sendable(error))
        return
    connection.send(place)
    while True:
        try:
            asked = connection.recv()
        except (EOFError, OSError):
            return
        try:
            for answer in answers(model, *asked):
                drawn = card.card(answer)
                connection.send((drawn, card.Answer(answer.method, answer.question, None, answer.text, answer.error)))
            connection.send(None)
        except Exception as error:  # the next question may be well
            connection.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The error, or its words where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception's own code may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def load_model(args: argparse.Namespace) -> tuple[api.Model, str]:
    """The model that answers, and a sentence that says where it is."""
    from . import api

    if args.engine == "transformers":
        options: dict[str, Any] = dict(api.read_option(text) for text in args.option)
        unknown = sorted(set(options) - set(OF_CHECKPOINT))
        if unknown:
            raise OptionError(f"--option {unknown[0]} is not of the checkpoint; allowed: {', '.join(OF_CHECKPOINT)}")
        model = api.load(args.pretrained, **options)
        return model, f"{args.pretrained} answers on {model.vlm.device}"
    if not (args.base_url and args.model):
        raise OptionError(
            "--engine openai needs --base-url and --model, such as --base-url http://localhost:8000/v1 --model NAME"
        )
    from .inference.openai_server import Endpoint

    served: Any = Endpoint(args.base_url, args.model, args.pretrained)
    return api.Model(served, {}), f"{args.model} answers at {args.base_url}"


def chosen(names: tuple[str, ...], options: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """What the columns ask for -> methods with their options, checked. Raises OptionError.

    Files and checkpoints are named on the command line, by whoever starts the page: not by whoever visits it.
    """
    from . import api

    methods = []
    for name, words in zip(names, options, strict=True):
        if not name or name == NOTHING:
            continue
        if any(mark in name + words for mark in ("/", "\\", ".py")):
            raise OptionError(
                f"{name} {words}: a file, or a checkpoint of a hub, cannot be named here; name a method and its options"
            )
        method = api.read_method(f"{name} {words}")
        api.check(*method)
        methods.append(method)
    if not methods:
        raise OptionError("no method is chosen; choose one in at least one of the columns")
    return methods


def answers(
    model: api.Model, image: Image.Image | None, question: str, names: tuple[str, ...], options: tuple[str, ...]
) -> Iterator[card.Answer]:
    """The answer of each chosen method in turn, each as soon as it is there. Raises OptionError for what cannot be asked."""
    if image is None:
        raise OptionError("there is no picture yet; drop one, or take one of the examples")
    if not (question or "").strip():
        raise OptionError("there is no question yet; write one")
    if len(question) > QUESTION_CHARACTERS:
        raise OptionError(f"the question has {len(question):,} characters; at most {QUESTION_CHARACTERS:,} are taken")
    for name, own in chosen(names, options):
        try:
            yield model.ask_many([(image, question)], name, 1, **own)[0]
        except AwaresError as error:  # the method does not fit this model, or the server is gone
            yield card.Answer(" ".join([name, *(f"{k}={v}" for k, v in own.items())]), question, image, error=str(error))
        except (ValueError, OSError, RuntimeError) as error:
            yield card.Answer(name, question, image, error=f"{type(error).__name__}: {error}")
