"""Pooling: neighbouring visual tokens averaged, 2x2 at retention 0.25; the plainest way to have fewer, as a control.

Paper    none; parameter-free pooling as in LLaVA-OneVision, https://arxiv.org/abs/2408.03326
Code     none
Needs    nothing
Cost     the share ``retention`` of the tokens in every decoder layer
Differs  nothing: the grid shrinks in both directions alike, and a pooled token has the position at the centre of its cell
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from awares_bench import Pruner, VisualTokens


@dataclass(frozen=True)
class Pooling(Pruner):
    """Average the tokens of each cell of a coarser grid."""

    def cells(self, rows: int, columns: int, n: int) -> tuple[int, int]:
        """Rows and columns of the coarser grid: at most ``n`` cells, as many as the image's shape allows."""
        ideal = rows * sqrt(n / (rows * columns))
        heights = {min(max(1, h), rows, n) for h in (int(ideal), round(ideal), int(ideal) + 1)}
        shapes = [(h, min(columns, n // h)) for h in heights]
        return max(shapes, key=lambda s: (s[0] * s[1], -abs(log(s[0] / rows * columns / s[1])), s))

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        """The averages, and the token at the centre of each cell."""
        (rows, columns), device = image.grid, image.features.device
        h, w = self.cells(rows, columns, n)
        whole = image.features.float().view(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        pooled = adaptive_avg_pool2d(whole, (h, w))[0].flatten(1).T.to(image.features.dtype)
        row, column = _centres(rows, h, device), _centres(columns, w, device)
        return pooled, (row[:, None] * columns + column).reshape(-1)


def _centres(length: int, cells: int, device) -> Tensor:
    """Middle place of each cell that adaptive pooling averages, (cells,)."""
    i = torch.arange(cells, device=device)
    first, last = i * length // cells, -(-(i + 1) * length // cells) - 1
    return (first + last) // 2
