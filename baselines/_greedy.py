"""What several pruners share: cosines of all pairs of tokens, and the greedy choice that covers most."""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosines(x: Tensor, block: int = 256) -> Tensor:
    """(V, D) -> (V, V) in float32, a block at a time, and symmetric to the bit.

    The two tokens of a closest pair are equally lonely: rounding that differs between (i, j) and (j, i) would choose between them.
    """
    out = torch.empty(len(x), len(x), device=x.device)
    for i in range(0, len(x), block):
        rows = normalize(x[i : i + block].float(), dim=1)
        for j in range(0, i + 1, block):
            part = rows @ normalize(x[j : j + block].float(), dim=1).T
            if j == i:
                part = part.tril() + part.tril(-1).T
            out[i : i + block, j : j + block] = part
            out[j : j + block, i : i + block] = part.T
    return out


def cover(rows: Tensor, n: int, weight: Tensor | None = None, bonus: Tensor | None = None) -> list[int]:
    """The ``n`` tokens, in the order of their choice, that each add most: ``gain * weight + bonus``, the first of equals.

    rows: (V, R), how well each token covers each of R things; a token's gain is what it covers beyond the best of those chosen, summed.
    Gains only fall while tokens are chosen, so a gain that was computed earlier bounds a later one, and few are computed again; they are
    never updated by differences, whose rounding adds up. On the CPU, where so many small steps cost least.
    """
    table = rows.detach().cpu().numpy()
    scale = np.ones(len(table)) if weight is None else weight.detach().double().cpu().numpy()
    extra = np.zeros(len(table)) if bonus is None else bonus.detach().double().cpu().numpy()
    best, beyond = np.zeros(table.shape[1], table.dtype), np.empty(table.shape[1], table.dtype)

    def value(token: int) -> float:
        np.subtract(table[token], best, out=beyond)
        return -float(np.maximum(beyond, 0, out=beyond).sum()) * scale[token] - extra[token]

    bounds = [(value(token), token, 0) for token in range(len(table))]  # negative, since the heap gives the smallest
    heapq.heapify(bounds)
    chosen: list[int] = []
    while len(chosen) < n:
        _, token, known = bounds[0]
        if known == len(chosen):
            chosen.append(heapq.heappop(bounds)[1])
            np.maximum(best, table[token], out=best)
        else:
            heapq.heapreplace(bounds, (value(token), token, len(chosen)))
    return chosen
