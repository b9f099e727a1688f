"""A policy decides what the model looks at, over one or more turns. It is a generator, so that one driver can run many."""

from __future__ import annotations

import difflib
from collections.abc import Generator
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from .trajectory import Event, Reply, Sample, Turn

Look = Generator[Turn | Event, Reply | None, Reply]
"""Yields a Turn and is sent its Reply, or yields an Event and is sent None; returns the reply that is the answer."""


@dataclass(frozen=True)
class Policy:
    """Decides what the model looks at. A subclass is a frozen dataclass; its fields are its command-line options."""

    def look(self, sample: Sample) -> Look:
        """Show and ask until there is an answer."""
        raise NotImplementedError

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            hint, value = hints[f.name], getattr(self, f.name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{f.name} is {value!r}; allowed: {', '.join(map(repr, get_args(hint)))}")


@dataclass(frozen=True)
class Pruner:
    """Decides which visual tokens survive, between encoder and decoder or inside it. A subclass is a frozen dataclass.

    retention: share of an image's visual tokens to keep, in (0, 1].
    """

    retention: float = 0.5

    def __post_init__(self):
        if isinstance(self.retention, bool) or not isinstance(self.retention, (int, float)) or not 0 < self.retention <= 1:
            raise ValueError(f"retention is {self.retention!r}; it must be a number above 0 and at most 1, such as 0.5")


def options(cls: type) -> dict[str, object]:
    """Field name -> default of a method class."""
    return {f.name: f.default for f in fields(cls)}


def unknown_option(name: str, known: list[str]) -> str:
    """The sentence for an option nobody knows: what was given, the nearest known one, all known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown option {name!r}.{hint} Known: {', '.join(sorted(known))}"
