"""What a checkpoint's ``generation_config.json`` asks of greedy decoding: its repetition penalty is applied, its ends are ends, and whatever
else would change an answer is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .generation import NEUTRAL, neutral, penalty_of

OF_A_RELEASE = ("eos_token_id", "max_length", "max_time")
"""Settings that every ``generation_config.json`` may have: its ends are ends here too, and the task says how long an answer may be."""


def unsupported(config) -> list[str]:
    """Settings of transformers' ``GenerationConfig`` that change a greedy answer and are not applied here, as ``name=value``.

    Sampling (do_sample, temperature, top_k, ...) is not among them: decoding here is greedy, as benchmarks ask.
    """
    asked = {name: getattr(config, name, None) for name in NEUTRAL if name not in OF_A_RELEASE}
    return [f"{name}={value!r}" for name, value in asked.items() if not neutral(name, value)]


def own_penalty(config) -> float:
    """The repetition penalty of a ``GenerationConfig``; 1 where it sets none."""
    value = getattr(config, "repetition_penalty", None)
    return 1.0 if value is None else penalty_of(value)


def penalised(scores: Tensor, before: Tensor, penalty: Tensor | float) -> Tensor:
    """Scores (..., vocabulary) with those of the tokens ``before`` (..., n) made less likely: divided by ``penalty`` above 0, multiplied below.

    The repetition penalty of CTRL (Keskar et al. 2019, Sec. 4.1) as transformers applies it, to the tokens of the prompt and of the reply;
    a token may be named several times.
    """
    held = scores.gather(-1, before)
    return scores.scatter(-1, before, torch.where(held < 0, held * penalty, held / penalty))


class Repetition:
    """The tokens that each row of a batch holds, and the scores after them.

    seen: per row, the ids of its prompt (at least one). penalty: per row.
    """

    def __init__(self, seen: Sequence[Iterable[int]], penalty: Sequence[float], device: torch.device):
        self.on = any(p != 1 for p in penalty)
        if self.on:
            held = [sorted(set(ids)) or [0] for ids in seen]
            self.fill = [ids[0] for ids in held]  # naming a token twice changes nothing
            self.before = padded(held).to(device)  # (B, n)
            self.penalty = torch.tensor(penalty, device=device)[:, None]

    def first(self, scores: Tensor) -> Tensor:
        """Scores (B, 1, vocabulary) after the prompt -> penalised."""
        return penalised(scores, self.before[:, None], self.penalty[:, None]) if self.on else scores

    def next(self, scores: Tensor, rows: list[int], feeds: list[list[int]]) -> Tensor:
        """Scores (rows, width, vocabulary) after tokens of a reply, padded on the left -> penalised by all that each of them follows."""
        if not self.on:
            return scores
        before, penalty, width = self.before[rows], self.penalty[rows], scores.shape[1]
        filled = [[self.fill[b]] * (width - len(f)) + f for b, f in zip(rows, feeds, strict=True)]
        fed = torch.tensor(filled, device=scores.device)
        columns = [penalised(scores[:, j], torch.cat([before, fed[:, : j + 1]], 1), penalty) for j in range(width)]
        return columns[0][:, None] if width == 1 else torch.stack(columns, 1)

    def keep(self, rows: list[int], feeds: list[list[int]], stands: list[int]) -> None:
        """Of what was fed to ``rows``, the first ``stands`` tokens of each are part of its reply."""
        if not self.on:
            return
        width = max(stands, default=0)
        new = [[token] * width for token in self.fill]
        for b, fed, n in zip(rows, feeds, stands, strict=True):
            new[b][:n] = fed[:n]
        self.before = torch.cat([self.before, torch.tensor(new, device=self.before.device)], 1)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids, none empty -> (B, n), short ones filled with their first."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows])
