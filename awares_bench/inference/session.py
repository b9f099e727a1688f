"""A conversation in progress and a request to continue it: what the engine and whatever answers for it share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from awares_bench.methods.conversation import Event, Turn

if TYPE_CHECKING:
    from torch import Tensor

    from awares_bench.models.base import ImageInput


@dataclass(eq=False)
class Session:
    """One conversation and its key-value cache: what turn two continues from."""

    turns: list[Turn] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)

    keys: list[Tensor] = field(default_factory=list)
    """Per layer (H, L, D) without padding; empty before the first turn and after the last."""

    values: list[Tensor] = field(default_factory=list)

    storage: list[Tensor] = field(default_factory=list)
    """The over-allocated buffers that keys and values are views of (``ragged_batch`` only)."""

    next_position: int = 0

    shifts: list[int] = field(default_factory=list)
    """Per layer, what to add to positions; empty unless a pruner repacks them."""

    unfed_tokens: list[int] = field(default_factory=list)
    """Tokens of the last reply that are not in the cache yet; they open the next chunk."""

    seen: frozenset[int] = frozenset()
    """Token ids shown and written so far, where there is a repetition penalty."""

    history: tuple = ()
    """All that was fed and written, where prefixes are shared: sessions with equal histories have equal caches. With vLLM in this process:
    the token ids."""

    sent: list[dict] = field(default_factory=list)
    """Chat messages as a server was sent them, pictures encoded: the next turn sends them again."""

    prompted: int = 0
    """Tokens of the conversation up to its last reply, as a server or vLLM counted them: what its prefix cache may hold."""

    uncounted: int = 0
    """Tokens that the server's prompts held beyond those counted here."""

    events: list[Event] = field(default_factory=list)

    recomputed: int = 0
    """Tokens shown and written so far that the next turn feeds again, where no cache is kept."""

    def snapshot(self) -> dict:
        """All fields, for ``restore`` when a turn fails halfway."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def restore(self, snapshot: dict) -> None:
        vars(self).update(snapshot)

    @property
    def length(self) -> int:
        """Tokens in the cache, or those that are fed again in its place."""
        return self.keys[0].shape[1] if self.keys else self.recomputed


@dataclass(frozen=True)
class Prepared:
    """What a turn adds to its session, on the CPU."""

    ids: list[int]

    images: list[ImageInput] = field(default_factory=list)

    room: int = 0
    """Tokens that fit into the context after it."""

    events: list[Event] = field(default_factory=list)

    seconds: float = 0.0
    """What making it took."""

    inputs: dict[str, Any] = field(default_factory=dict)
    """What ``model.generate`` takes for the whole conversation, where that is how it is answered."""


@dataclass(frozen=True)
class Request:
    """A turn to be answered in a session."""

    session: Session
    turn: Turn

    max_reply_tokens: int

    until: tuple[str, ...] = ()
    """Stop strings, cut from the reply."""

    prepared: Prepared | None = None
    """The turn as the model takes it, when that was made ahead."""

    forced_tokens: tuple[int, ...] | None = None
    """Token ids that the reply is made of instead of the model's own, for measuring speed with random weights."""

    penalty: float | None = None
    """Repetition penalty of this reply; None: the model's."""

    keep_masks: bool = False
    """Say in the reply which visual tokens a pruner let through."""

    conversation: int = 0
    """Number of the conversation among those of an engine's run, which names it where replies are sampled."""
