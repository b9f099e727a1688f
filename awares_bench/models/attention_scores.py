"""Attention that pruners rank visual tokens by, in float32 and in blocks: no (H, N, N) matrix ever exists.

The q and k are those of the forward pass, so the scores are the same whichever kernel the model attends with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .cpu_kernels import linears_onednn

BLOCK = 2**19
"""Scores held at a time: 2 MiB, and as much again for their softmax; near a core's cache."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be an index in training too
def window_order(rows: int, columns: int, window: int = 4, device: torch.device | str = "cpu") -> Tensor:
    """Raster places (V,) of an image's merged tokens in the order in which Qwen2.5-VL's vision blocks hold them.

    Windows in raster order, raster order within each; 4 tokens are the 112 pixels of the released models. window 0: a tower without windows.
    """
    places = torch.arange(rows * columns)
    if not window:
        return places.to(device)
    row, column = places // columns, places % columns
    return (row // window * -(-columns // window) + column // window).argsort(stable=True).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def raster_order(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """The inverse of ``window_order``: its place (V,) for each merged token in raster order."""
    return window_order(rows, columns, window).argsort().to(device)


def softmaxed(scores: Tensor) -> Tensor:
    """Softmax over the last axis; on a CPU in place of the scores, where fresh memory is as dear as the exponentials."""
    return torch.softmax(scores, -1, out=scores if scores.device.type == "cpu" else None)


def column_attention(q: Tensor, k: Tensor, scaling: float, block: int = BLOCK) -> Tensor:
    """Attention that each key receives, the mean over heads and queries: (H, N, d) twice -> (N,)."""
    heads, n, _ = q.shape
    together = max(1, block // (n * n)) if q.device.type != "cpu" else 1  # heads in one product
    step = max(1, min(n, block // n)) if together == 1 else n  # queries in one product
    out = torch.zeros(n, device=q.device)
    for a in range(0, heads, together):
        keys = k[a : a + together].float().contiguous()
        for i in range(0, n, step):
            scores = linears_onednn(q[a : a + together, i : i + step].float() * scaling, keys)
            out += softmaxed(scores).sum((0, 1))
    return out.div_(heads * n)


@dataclass(frozen=True)
class AttentionRows:
    """Attention of some text tokens on an image's tokens in one decoder layer, computed when asked for.

    q: (H, R, d) and keys: (G, K, d) after RoPE, G key heads shared by the H query heads.
    rows: (R,) place of each query among the K keys: it sees itself and what is before. columns: the V places of the image's
    tokens, all before the queries.
    phases: cosines and sines (L, d) of the rotary embedding at the last L keys, which the image and the queries are among.
    final_norm: the decoder's norm after its last layer.
    """

    q: Tensor
    keys: Tensor
    rows: Tensor
    columns: slice
    phases: tuple[Tensor, Tensor]
    final_norm: Callable[[Tensor], Tensor] = lambda states: states

    def per_head(self, divisor: Tensor | None = None, block: int = BLOCK) -> Tensor:
        """Mean over the R queries of the attention, divided by ``divisor`` (R, V) if given: (H, V)."""
        heads, n, width = self.q.shape
        groups, length, _ = self.keys.shape
        keys = self.keys.float().transpose(1, 2)  # (G, d, K)
        after = self.columns.stop
        out: Tensor | None = None
        late = torch.arange(after, length, device=self.q.device) > self.rows[:, None]  # (R, K - after): what a query does not see
        step = max(1, block // (heads * length))
        for i in range(0, n, step):
            q = self.q[:, i : i + step].float() * width**-0.5
            scores = (q.reshape(groups, -1, width) @ keys).view(heads, -1, length)
            scores[..., after:].masked_fill_(late[i : i + step], -torch.inf)
            weights = softmaxed(scores)[..., self.columns]
            part = (weights if divisor is None else weights / divisor[i : i + step]).sum(1)
            out = part if out is None else out.add_(part)
        assert out is not None  # there is a query
        return out.div_(n)

    def rotary_kernel(self) -> Tensor:
        """Inner product of all-ones vectors rotated to each query's and each token's place, over sqrt(d): (R, V)."""
        length, width = self.keys.shape[1:]
        rows, columns = self.rows - length, slice(self.columns.start - length, self.columns.stop - length)  # from the end
        return sum(t[rows].float() @ t[columns].float().T for t in self.phases) * width**-0.5
