"""Which of the waiting turns are answered together: equal kinds, similar lengths, within a number of rows and of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class BatchLimits:
    """What a batch may hold. rows: at most; tokens: rows times the longest, padding counted (None: no limit)."""

    rows: int
    tokens: int | None = None

    def __post_init__(self):
        for name in ("rows", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"a batch of {value} {name} can hold nothing; it must be at least 1")

    def holds(self, costs: Sequence[int]) -> bool:
        """Whether requests of these costs fit; one always does."""
        fits = self.tokens is None or len(costs) * max(costs) <= self.tokens
        return len(costs) == 1 or (len(costs) <= self.rows and fits)

    def halve(self, costs: Sequence[int]) -> None:
        """A batch of these costs ran out of memory: allow half of its tokens from now on."""
        self.tokens = min(self.tokens or len(costs) * max(costs), max(1, len(costs) * max(costs) // 2))


def next_batch(kinds: Sequence[tuple], costs: Sequence[int], cached: Sequence[bool], limits: BatchLimits) -> list[int]:
    """Places of the turns to answer next, longest first; never empty unless nothing waits.

    Only turns of equal kind go together. Turns that continue a cache wait until they fill a batch, or nothing else is left;
    then they go first, so that no more than two batches of caches are ever held. Within a kind the oldest turn is sure to
    go, with those nearest to it in cost.
    """
    if not costs:
        return []
    every = range(len(costs))
    held, new = [i for i in every if cached[i]], [i for i in every if not cached[i]]
    first = held[0] if held and (not new or not limits.holds([costs[i] for i in held] + [min(costs)])) else new[0]
    group = [i for i in (held if cached[first] else new) if kinds[i] == kinds[first]]
    taken: list[int] = []
    for i in sorted(group, key=lambda i: (abs(costs[i] - costs[first]), i)):
        if taken and not limits.holds([costs[j] for j in (*taken, i)]):
            break
        taken.append(i)
    return sorted(taken, key=lambda i: (-costs[i], i))
