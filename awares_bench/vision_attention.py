"""One attention call per window size for Qwen2.5-VL's vision tower, instead of one per 112-pixel window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "flash_grouped_windows"  # a name with "flash" in it makes the tower pass cu_seq_lens instead of looping
"""Key under which the function is known to transformers; only a tower whose config names it is affected."""


def grouped_windows(
    module, q: Tensor, k: Tensor, v: Tensor, attention_mask=None, scaling=None, dropout=0.0, cu_seq_lens_q=None, **_
):
    """Attention within segments: segments of equal length share one call. q, k, v: (1, H, N, D) -> (1, N, H, D), None."""
    if (probe := getattr(module, "probe", None)) is not None:  # see attention_scores.probed
        probe(q, k, scaling, cu_seq_lens_q)
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]
    heads, width = q.shape[1], q.shape[3]
    parts, places = [], []
    for n in torch.unique(lengths).tolist():
        if n == 0:
            continue
        place = (starts[lengths == n, None] + torch.arange(n, device=q.device)).reshape(-1)

        def cut(t: Tensor, place: Tensor = place, n: int = n) -> Tensor:
            return t[0][:, place].reshape(heads, -1, n, width).transpose(0, 1)  # (windows, H, n, D)

        if q.requires_grad and q.device.type == "cpu":  # in training on CPU, the fused backward is 2 to 6 times slower
            weights = ((cut(q) * scaling) @ cut(k).transpose(-1, -2)).softmax(-1, dtype=torch.float32)
            out = weights.to(v.dtype) @ cut(v)
        else:
            out = scaled_dot_product_attention(cut(q), cut(k), cut(v), scale=scaling)
        parts.append(out.transpose(1, 2).reshape(-1, heads, width))
        places.append(place)
    order = torch.cat(places)
    merged = parts[0].new_empty(q.shape[2], heads, width).index_copy(0, order, torch.cat(parts))
    return merged[None], None


@contextmanager
def windowed_attention(model) -> Iterator[None]:
    """Within the block, ``model``'s vision tower (and no other) uses ``grouped_windows``."""
    AttentionInterface.register(NAME, grouped_windows)
    config = model.model.visual.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before
