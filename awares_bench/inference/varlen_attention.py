"""Causal attention over rows of different lengths that lie in one line: the kernels that a GPU may have, and what each must compute.

A kernel is taken only where it has agreed with ``reference`` on this device: kernels differ in how they align queries that are fewer than
their keys, and in whether heads may share keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""(q (T, H, d), k (K, G, d), v (K, G, d), cu_q (B + 1,), cu_k (B + 1,), longest row of q, of k) -> (T, H, d).

Row b is q[cu_q[b] : cu_q[b + 1]] on the keys cu_k[b] to cu_k[b + 1]; its last query sees all of them, the one before all but the last.
H // G query heads share a key head. cu_q, cu_k: int32."""

AGREES = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Norm of the difference from ``reference`` in float32, relative to the output's, up to which a kernel is right. Operands of 8 and 11 bits
give 4e-3 and 5e-4; a query that sees one key too many or too few gives 1e-1."""


def reference(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """The contract of a ``Kernel`` in plain products, softmax in float32."""
    heads, shared, out = q.shape[1], q.shape[1] // k.shape[1], []
    with torch.autocast(q.device.type, enabled=False):
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            keys, values = (t[c:d].float().repeat_interleave(shared, 1).transpose(0, 1) for t in (k, v))  # (H, n, width)
            scores = q[a:b].float().transpose(0, 1) @ keys.transpose(1, 2) * q.shape[2] ** -0.5
            late = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).triu(d - c - (b - a) + 1)
            out.append((scores.masked_fill_(late, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out).to(q.dtype) if out else q.new_empty(0, heads, q.shape[2])


def kernels() -> Iterator[tuple[str, Kernel]]:
    """Name and kernel of what is installed, the preferred first."""
    try:  # in PyTorch since 2.10
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        pass
    else:
        known = signature(varlen_attn).parameters
        words: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}  # since 2.11, before
        # before it had ``enable_gqa`` it did not look at the numbers of heads
        words |= {"enable_gqa": True} if "enable_gqa" in known else {}
        kernel: Any = partial(varlen_attn, **words)  # its second result, the normaliser, comes only where it is asked for
        yield "torch.nn.attention.varlen", kernel
        yield "torch.nn.attention.varlen, keys repeated for every head", partial(_repeated, kernel)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return
    yield "flash_attn", partial(flash_attn_varlen_func, causal=True)


def _repeated(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *lengths) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    return kernel(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), *lengths)


@lru_cache(maxsize=16)
def kernel_for(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> tuple[str, Kernel] | None:
    """Name and function of the first of ``kernels`` that works on a GPU, tried once; None, and a warning that says why, where none does."""
    return first_right(kernels(), device, dtype, heads, groups, width) if device.type == "cuda" and dtype in AGREES else None


def first_right(
    candidates: Iterable[tuple[str, Kernel]], device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> tuple[str, Kernel] | None:
    """The first that agrees with ``reference``."""
    wrong = []
    for name, kernel in candidates:
        try:
            difference = trial(kernel, device, dtype, heads, groups, width)
        except (RuntimeError, TypeError, ValueError) as error:
            wrong.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if difference <= AGREES[dtype]:
            return name, kernel
        wrong.append(f"{name} differs from the reference by {difference:.2g}")
    reasons = "; ".join(wrong) or "PyTorch is older than 2.10, and flash-attn is not installed"
    warnings.warn(f"rows are padded: no attention over rows of different lengths works here ({reasons})", stacklevel=3)
    return None


@torch.no_grad()
def trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> float:
    """Norm of a kernel's difference from ``reference``, relative to the output's, on rows that are prompts, second turns and single
    tokens."""
    generator = torch.Generator().manual_seed(0)
    new, all_ = [70, 5, 1, 33], [70, 140, 65, 34]
    q, k, v = (torch.randn(sum(n), h, width, generator=generator) for n, h in ((new, heads), (all_, groups), (all_, groups)))
    q, k, v = (t.to(device, dtype) for t in (q, k, v))
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for n in (new, all_))
    found = kernel(q, k, v, cu_q, cu_k, max(new), max(all_)).float()
    wanted = reference(q.float(), k.float(), v.float(), cu_q, cu_k, max(new), max(all_))
    return float((found - wanted).norm() / wanted.norm())
