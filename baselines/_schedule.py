"""Cuts inside the decoder whose mean over the layers is what was asked for."""

from __future__ import annotations


def fraction(after: list[int], layers: int, mean: float) -> float:
    """What each cut must keep of the one before it, so that the mean share over all decoder layers is ``mean``; 0 where none does.

    after: decoder layers after which to cut, ascending from 0.
    """
    runs = [b - a for a, b in zip([-1, *after], [*after, layers - 1], strict=True)]  # layers between cuts
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection: the mean grows with the fraction
        x = (low + high) / 2
        reached = sum(run * x**i for i, run in enumerate(runs)) / layers
        low, high = (low, x) if reached > mean else (x, high)
    return low
