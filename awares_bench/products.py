"""Matrix products of float32 on a CPU by oneDNN, which PyTorch carries and asks for half precision only.

Otherwise they are MKL's, which takes twice as long on AMD's processors. Results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEWEST_ROWS = 32
"""Below this oneDNN's set-up costs more than it saves (8 rows of nano: 0.028 ms against 0.022 ms)."""

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)  # PyTorch's own, without a public name


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear``: (..., K), (M, K), (M,) -> (..., M)."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() >= FEWEST_ROWS * x.shape[-1]
    if not (fits and ONEDNN) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@contextmanager
def fast_products(*parts: nn.Module) -> Iterator[None]:
    """Within the block the float32 linear layers of ``parts`` (and of no other module) on a CPU use ``product``."""
    every = [m for part in parts for m in part.modules() if type(m) is nn.Linear]
    changed = [m for m in every if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    for module in changed:
        module.forward = lambda x, m=module: product(x, m.weight, m.bias)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
