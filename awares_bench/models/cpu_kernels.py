"""Matrix products on a CPU by oneDNN, which PyTorch carries, asks for half precision only, and has add no bias.

Otherwise those of bfloat16 begin with a copy of the bias into every row, and those of float32 are MKL's, which on AMD's processors keeps to
AVX2: twice as long where oneDNN has AVX-512. Without AVX-512 oneDNN wins only where few rows meet a large matrix (8 to 120 rows and
2,048 x 11,008: MKL takes 1.5 to 3.3 times as long); a small one is not worth its set-up of 60 microseconds (192 x 576: 0.15 ms against
0.09 at 32 rows, 1.2 either way at 720). Measured with PyTorch 2.13 and 2.14 on a shared machine. Results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether the CPU has AVX-512 (PyTorch may be told otherwise by ATEN_CPU_CAPABILITY)."""

FEWEST_ROWS = 32 if WIDE else 8
"""Below this oneDNN's set-up costs more than it saves (nano, 8 rows: 0.028 ms against 0.022 ms)."""

FEWEST_WEIGHTS = 0 if WIDE else 2**20
"""Numbers in a float32 matrix from which oneDNN is faster."""

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # PyTorch's own, without a public name

KINDS = {torch.float32, torch.bfloat16} if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear``: (..., K), (M, K), (M,) -> (..., M)."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in KINDS and x.numel() >= FEWEST_ROWS * x.shape[-1]
    large = weight.numel() >= FEWEST_WEIGHTS or x.dtype != torch.float32
    if not (fits and large and ONEDNN) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linears_onednn(x: Tensor, weights: Tensor) -> Tensor:
    """``linear_onednn`` of every x with a weight of its own: (B, N, K), (B, M, K) -> (B, N, M)."""
    if x.device.type != "cpu":
        return x @ weights.transpose(1, 2)
    # oneDNN wants rows without gaps: 1,000 times slower with them
    made = [linear_onednn(a.contiguous(), b.contiguous()) for a, b in zip(x, weights, strict=True)]
    return made[0][None] if len(made) == 1 else torch.stack(made)


@contextmanager
def onednn_linears(*parts: nn.Module) -> Iterator[None]:
    """Within the block the linear layers of ``parts`` (and of no other module) on a CPU use ``linear_onednn``."""
    every = [m for part in parts for m in part.modules() if type(m) is nn.Linear]
    changed = [m for m in every if m.weight.device.type == "cpu" and m.weight.dtype in KINDS]
    for module in changed:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]  # of this layer, not of its class
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear_onednn(x, module.weight, module.bias)
