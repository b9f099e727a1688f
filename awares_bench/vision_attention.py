"""Qwen2.5-VL's vision tower with few calls: one per layer or per window size for attention, a matrix product for patches.

Stock, the tower makes one attention call per 112-pixel window and embeds patches with a convolution that meets no two of
them: on a CPU as slow as several layers, and slow in bfloat16 on GPUs too. Features differ by rounding only (tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

try:  # in PyTorch since 2.10; older ones group
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

NAME = "flash_grouped_windows"  # a name with "flash" in it makes the tower pass cu_seq_lens instead of looping
"""Key under which the function is known to transformers; only a tower whose config names it is affected."""


def grouped_windows(
    module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    cu_seq_lens_q=None,
    max_length_q=None,
    **_,
):
    """Attention within segments: segments of equal length share one call. q, k, v: (1, H, N, D) -> (1, N, H, D), None."""
    if (probe := getattr(module, "probe", None)) is not None:  # see attention_scores.probed
        probe(q, k, scaling, cu_seq_lens_q)
    if fits_varlen(q, scaling):
        return varlen_windows(varlen_attn, q, k, v, cu_seq_lens_q, int(max_length_q)), None
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]
    heads, width = q.shape[1], q.shape[3]
    sizes, parts, places = torch.unique(lengths).tolist(), [], []
    for n in sizes:
        if n == 0:
            continue
        place = (starts[lengths == n, None] + torch.arange(n, device=q.device)).reshape(-1)

        def cut(t: Tensor, place: Tensor = place, n: int = n) -> Tensor:
            mine = t[0] if len(sizes) == 1 else t[0][:, place]
            return mine.reshape(heads, -1, n, width).transpose(0, 1)  # (windows, H, n, D)

        if q.requires_grad and q.device.type == "cpu":  # in training on CPU, the fused backward is 2 to 6 times slower
            weights = ((cut(q) * scaling) @ cut(k).transpose(-1, -2)).softmax(-1, dtype=torch.float32)
            out = weights.to(v.dtype) @ cut(v)
        else:
            out = scaled_dot_product_attention(cut(q), cut(k), cut(v), scale=scaling)
        parts.append(out.transpose(1, 2).reshape(-1, heads, width))
        places.append(place)
    if len(sizes) == 1:
        return parts[0][None], None
    order = torch.cat(places)
    merged = parts[0].new_empty(q.shape[2], heads, width).index_copy(0, order, torch.cat(parts))
    return merged[None], None


def fits_varlen(q: Tensor, scaling: float | None) -> bool:
    """Whether PyTorch's variable-length kernel takes this call: half precision on a GPU, without gradients."""
    plain = scaling is None or abs(scaling * q.shape[-1] ** 0.5 - 1) < 1e-6
    return varlen_attn is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not q.requires_grad and plain


def varlen_windows(kernel, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int) -> Tensor:
    """All segments in one call of ``kernel(q, k, v, cu_q, cu_k, max_q, max_k)`` on (N, H, D). (1, H, N, D) -> (1, N, H, D)."""
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    cu_seq_lens = cu_seq_lens.to(torch.int32)
    return kernel(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest)[None]


@contextmanager
def windowed_attention(model) -> Iterator[None]:
    """Within the block, ``model``'s vision tower (and no other) uses ``grouped_windows`` and embeds patches by a product."""
    AttentionInterface.register(NAME, grouped_windows)
    tower = model.model.visual
    before, tower.config._attn_implementation = tower.config._attn_implementation, NAME
    weight = tower.patch_embed.proj.weight
    tower.patch_embed.forward = lambda patches: linear(patches.to(weight.dtype), weight.flatten(1))  # (P, 1176) -> (P, D)
    try:
        yield
    finally:
        tower.config._attn_implementation = before
        del tower.patch_embed.forward
