"""A conversation in progress and a request to continue it: what the engine and whatever answers for it share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from awares_bench.methods.conversation import Event, Turn

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Session:
    """One conversation and its key-value cache: what turn two continues from.

    keys, values: per layer (H, L, D) without padding, empty before the first turn and after the last.
    held: what keys and values are views of, where rows have caches of their own (``ragged.py``).
    shifts: per layer, what to add to positions; empty unless a pruner renumbers them.
    pending: tokens sampled but not yet in the cache; they open the next chunk.
    seen: token ids shown and written so far, where there is a repetition penalty.
    """

    turns: list[Turn] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    next_position: int = 0
    shifts: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    seen: frozenset[int] = frozenset()
    events: list[Event] = field(default_factory=list)

    def state(self) -> dict:
        """All fields, to set them back with ``vars(session).update`` when a turn fails halfway."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.keys[0].shape[1] if self.keys else 0


@dataclass(frozen=True)
class Prepared:
    """What a turn adds to its session, on the CPU: token ids, the patches and grid of each image, and the seconds it took.

    keys: of the images in a ``FeatureStore``, when there is one.
    """

    ids: list[int]
    patches: list[Tensor]
    grids: list[tuple[int, int, int]]
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    keys: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """A turn to be answered in a session.

    budget: tokens the reply may have. until: stop strings, cut from the reply.
    prepared: the turn as the model takes it, when that was made ahead.
    forced: token ids that the reply is made of instead of the model's own, for measuring speed with random weights.
    penalty: repetition penalty of this reply; None: the model's.
    """

    session: Session
    turn: Turn
    budget: int
    until: tuple[str, ...] = ()
    prepared: Prepared | None = None
    forced: tuple[int, ...] | None = None
    penalty: float | None = None
