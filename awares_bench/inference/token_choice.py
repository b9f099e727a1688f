"""Which token comes next, for all rows of a batch at once: the most probable one, or one that is sampled."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor


class TokenChooser(Protocol):
    """Chooses among a batch's scores. A reply's call grammar, or tokens that are forced, may overrule it (``ReplyDecoder``)."""

    def __call__(self, scores: Tensor, rows: list[int], steps: list[int]) -> list[tuple[list[int], list[float]]]:
        """Scores (rows, n, vocabulary) -> per row the token after each of the n places, and its value.

        rows: of the request that each row belongs to. steps: tokens that each row's reply has so far.
        """


class Greedy:
    """The most probable token; its value is its log-probability, or the largest score where that is not finite (NaN where any is NaN)."""

    def __call__(self, scores: Tensor, rows: list[int], steps: list[int]) -> list[tuple[list[int], list[float]]]:
        top, scores = scores.max(-1), scores.float()
        value = top.values.float()
        # in one transfer from the device; twice the precision holds every token's number
        tokens, largest, logprobs = torch.stack([top.indices.double(), value, value - scores.logsumexp(-1)]).tolist()
        return [
            ([int(token) for token in row], [new if isfinite(old) else old for old, new in zip(*values, strict=True)])
            for row, *values in zip(tokens, largest, logprobs, strict=True)
        ]


@dataclass
class Sampling:
    """Settings of sampled replies. Every reply draws from random numbers of its own, a function of (seed, name of the conversation,
    turn), so that neither batch nor process count changes what it says."""

    temperature: float = 1.0
    """0 takes the most probable token."""

    seed: str = "0"

    banned: tuple[int, ...] = ()
    """Tokens that are never taken."""

    banned_first: tuple[int, ...] = ()
    """Tokens that no conversation's first reply may begin with."""

    def chooser(self, names: Sequence[str], turns: list[int], budget: int, device: torch.device) -> Sampler:
        """For a batch of replies. names: of the conversations; turns: replies that each has had; budget: tokens of the longest."""
        draws = torch.zeros((len(names), budget), dtype=torch.float64)
        if self.temperature:
            for b, (name, turn) in enumerate(zip(names, turns, strict=True)):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{turn}".encode()))
                draws[b] = torch.rand(budget, generator=generator, dtype=torch.float64)
        return Sampler(self, draws.to(device), [turn == 0 for turn in turns])


@dataclass
class Sampler:
    """A ``TokenChooser`` whose values are log-probabilities, at the temperature and without the banned tokens."""

    settings: Sampling
    draws: Tensor = field(repr=False)
    """Uniform numbers (B, budget): a row's next token is where its number falls in the cumulated probabilities."""

    opens: list[bool]
    """Whether a row's reply is the first of its conversation."""

    def __call__(self, scores: Tensor, rows: list[int], steps: list[int]) -> list[tuple[list[int], list[float]]]:
        scores = scores[:, -1].clone()  # (rows, vocabulary); nothing is drafted where tokens are sampled
        if not scores.isfinite().all():
            raise ValueError(
                "the model's scores are not finite: training has diverged, or the weights overflow in their precision"
            )
        scores[:, list(self.settings.banned)] = float("-inf")
        if self.settings.banned_first:
            first = [i for i, (b, step) in enumerate(zip(rows, steps, strict=True)) if step == 0 and self.opens[b]]
            scores[torch.tensor(first, dtype=torch.long)[:, None], list(self.settings.banned_first)] = float("-inf")
        logprobs = (scores / (self.settings.temperature or 1.0)).log_softmax(-1)
        if self.settings.temperature:
            cumulated = logprobs.double().exp().cumsum(-1)
            places = torch.tensor(steps, device=scores.device).clamp(max=self.draws.shape[1] - 1)
            draws = self.draws[torch.tensor(rows, device=scores.device), places][:, None]
            chosen = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True)[:, 0].clamp(max=scores.shape[1] - 1)
        else:
            chosen = logprobs.argmax(-1)
        values = logprobs.gather(1, chosen[:, None])[:, 0]
        return [([token], [value]) for token, value in zip(chosen.tolist(), values.tolist(), strict=True)]
