"""What a document shows and asks, as a short digest, so that an answer is never taken for another document's.

A table's row is digested as it is stored, its pictures encoded: for pages of DocVQA's size (240 to 710 kB) 25 to 45 times as fast
as decoding them and hashing their pixels, so that a resume decodes only what is answered. What is not stored in the row (pictures
that a task opens itself) is digested as the task's messages show it. How a task turns a row into messages is part of ``task_facts``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from awares_bench.methods.images import whole_images

PROMPT = ("doc_to_messages", "doc_to_visual", "doc_to_text", "process_docs", "description", "num_fewshot")
"""Settings of a task that decide its messages."""


def digest(documents, doc_id: int, to_messages: Callable) -> str:
    """Row ``doc_id`` of a split -> 16 hex digits that any change of a column, a picture's bytes or a text changes.

    documents: a ``datasets.Dataset``, or anything that gives a document by its number. to_messages: document -> chat messages;
    called only where the row holds no picture. A picture that cannot be decoded has a digest too; never raises for one.
    """
    state = hashlib.sha256()
    try:
        row = documents.with_format("arrow")[doc_id].to_pylist()[0] if isinstance(documents, Dataset) else documents[doc_id]
        if not _feed(state, row):
            with whole_images():
                _feed(state, to_messages(documents[doc_id]))
    except Exception as error:  # foreign code and data: what cannot be read cannot be answered either
        state.update(type(error).__name__.encode())
    return state.hexdigest()[:16]


def _feed(state, value: object) -> bool:
    """Digest a value of a row or a message; whether a picture, a sound or a film was in it."""
    if isinstance(value, Image.Image):
        shape = value.mode, value.size, value.getexif().get(0x0112), value.getpalette(), value.info.get("transparency")
        return _bytes(state, repr(shape).encode() + value.tobytes())
    if isinstance(value, (bytes, bytearray)):
        return _bytes(state, bytes(value))
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"]:
        return _bytes(state, value["bytes"])
    place = value.get("path", value.get("url")) if isinstance(value, dict) and len(value) == 2 else None
    if isinstance(place, str) and Path(place).is_file():  # a picture by its file, in a row or in a message
        return _bytes(state, Path(place).read_bytes())
    if isinstance(value, dict):
        state.update(f"dict {len(value)}".encode())
        return any([_feed(state, part) for item in value.items() for part in item])
    if isinstance(value, (list, tuple)):
        state.update(f"list {len(value)}".encode())
        return any([_feed(state, part) for part in value])
    if isinstance(value, np.ndarray):
        _bytes(state, repr((value.dtype, value.shape)).encode() + value.tobytes())
        return False
    _bytes(state, f"{type(value).__name__} {value!r}".encode())
    return False


def _bytes(state, data: bytes) -> bool:
    state.update(f"{len(data)} ".encode())
    state.update(data)
    return True


def task_facts(to_messages: Callable, split: str) -> dict:
    """What must be equal for answers to one task to belong together, from the method of lmms-eval's task that makes its messages.

    version, dataset_path, dataset_name, dataset_kwargs (data files), split, lmms_eval (its version) and prompt: a digest of the
    settings that decide the messages and of the files that hold the task's functions. What is not known is None.
    """
    task = getattr(to_messages, "__self__", None)
    config = getattr(task, "config", None)
    facts = {"version": getattr(task, "VERSION", None)}
    facts |= {k: getattr(config, k, None) for k in ("dataset_path", "dataset_name", "dataset_kwargs")}
    facts |= {"split": split, "lmms_eval": version("lmms-eval"), "prompt": _prompt(to_messages, config)}
    return json.loads(json.dumps(facts, default=str))


def _prompt(to_messages: Callable, config: object) -> str | None:
    if config is None:
        return None
    state = hashlib.sha256()
    specific = getattr(getattr(to_messages, "__self__", None), "lmms_eval_specific_kwargs", None)
    for value in (specific, *(getattr(config, name, None) for name in PROMPT)):
        function = value.func if isinstance(value, partial) else value
        if callable(function):
            _feed(
                state, [function.__qualname__ if hasattr(function, "__qualname__") else type(function).__name__, source(function)]
            )
        else:
            _feed(state, json.dumps(value, default=str, sort_keys=True))
    return state.hexdigest()[:16]


def source(thing: Callable | type) -> str | None:
    """A function or class -> a digest of the file it was written in; None when there is none."""
    try:
        return file(inspect.getfile(inspect.unwrap(thing)))
    except (OSError, TypeError):
        return None


def file(path: str | Path) -> str:
    """A file -> a digest of its bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def unshown(to_messages: Callable, prompt: str, doc_id: int) -> str | None:
    """What lmms-eval put into a task's prompt and does not show to chat models, in a sentence; None when nothing is lost.

    ``--system_instruction``, ``--num_fewshot`` and a task's description are in the prompt; the messages of a task with pictures
    are made of the document alone, unless it makes its own.
    """
    task = getattr(to_messages, "__self__", None)
    config = getattr(task, "config", None)
    if task is None or config is None or config.doc_to_messages is not None or config.doc_to_visual is None:
        return None
    if prompt == str(task.doc_to_text(task.eval_docs_no_media[doc_id])):
        return None
    return "lmms-eval shows a chat model the document alone: the task's description, few-shot examples and --system_instruction are not shown"
