"""A policy decides what the model looks at. It is a generator, so that one driver can run many at once."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from .conversation import Event, Failure, Reply, Sample, Turn
from .options import check_choices

TurnGenerator = Generator[Turn | Event, Any, Reply | Failure]
"""Yields a Turn and is sent its Reply, or yields an Event and is sent None (no type says which goes with which, hence Any); returns the
reply that is the answer, or a Failure."""

UNDER_TEST = "pretrained"
"""As the checkpoint of an auxiliary model: the model under test itself, whose tokens then count as its own."""


@dataclass(frozen=True)
class Policy:
    """Decides what the model looks at. A subclass is a frozen dataclass; its fields are its command-line options."""

    def turns(self, sample: Sample) -> TurnGenerator:
        """Show and ask until there is an answer."""
        raise NotImplementedError

    @property
    def models(self) -> dict[str, str]:
        """Auxiliary models that a turn may be sent to: the name in ``Turn.model`` -> checkpoint folder or hub name."""
        return {}

    def __post_init__(self) -> None:
        check_choices(self)
