"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL with few calls: one per layer or per window size for attention, a matrix product for patches.

Stock, the tower makes one attention call per 112-pixel window, embeds patches with a convolution that meets no two of them,
and on a CPU sends every token of a layer through temporaries larger than any cache. Features differ by rounding only (tests).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from awares_bench.errors import RunError

from .attention_scores import column_attention
from .cpu_kernels import ONEDNN, WIDE, linear_onednn, onednn_linears

try:  # in PyTorch since 2.10; older ones group
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]  # no type of a function says that it may be missing

NAME = "flash_grouped_windows"  # a name with "flash" in it makes the tower say how long the longest segment is

BLOCK = 2**18
"""Numbers rotated at a time on a CPU: 1 MiB in float32, which the cache holds."""

ROWS = 512
"""Tokens that pass a layer at a time on a CPU. What it makes of them stays in the cache, and oneDNN divides the number well:
of a 3B MLP in bfloat16, 1,369 rows at once take 1.4 times as long."""

FEW = 2**19
"""Numbers that go at once: they are in the cache in any case, and nano's 2,048 rows take 1.2 times as long in parts."""

LONG = 512
"""Tokens of a segment that attends by products on a CPU."""

USE_MATMUL_ATTENTION = ONEDNN and WIDE and not getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
"""With AVX-512 and without AMX (PyTorch before 2.6 does not say), PyTorch's fused attention is MKL's products, which take twice as long on
AMD's processors (see products). Without AVX-512 it takes half as long as single products (1,369 tokens, 4 heads: 20 against 40 ms)."""


def in_row_blocks(layer, x: Tensor) -> Tensor:
    """``layer(x)`` of a layer that treats every row alone, on a CPU ``ROWS`` at a time: (N, D) -> (N, E)."""
    if x.device.type != "cpu" or x.requires_grad or x.numel() <= FEW:
        return layer(x)
    return torch.cat([layer(part) for part in x.split(ROWS)])


def attend(attn, hidden: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], max_seqlen: int, **_) -> Tensor:
    """The forward pass of a vision block's attention, segments between ``cu_seqlens``: (N, D) -> (N, D)."""
    qkv = in_row_blocks(attn.qkv, hidden).view(len(hidden), 3, attn.num_heads, -1)
    q, k = rotated(qkv[:, :2], *position_embeddings).permute(1, 2, 0, 3)[:, None]  # (1, H, N, d)
    v = qkv[:, 2].transpose(0, 1)[None]
    if (probe := getattr(attn, "probe", None)) is not None:  # see ``probed``
        probe(q, k, attn.scaling, cu_seqlens)
    if fits_varlen(q):
        out = varlen_windows(varlen_attn, q, k, v, cu_seqlens, max_seqlen)
    else:
        out = grouped_windows(q, k, v, cu_seqlens)
    return in_row_blocks(attn.proj, out.reshape(len(hidden), -1))


def rotated(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys (N, 2, H, d) turned by the angles (N, d) of their places, in float32; in place without gradients."""
    half = qk.shape[-1] // 2
    cos, sin = (t[:, None, None, :half].float() for t in (cos, sin))  # both halves have the same angles
    if qk.requires_grad:
        return _rotated(qk, cos, sin)
    rows = max(1, BLOCK // qk[0].numel()) if qk.device.type == "cpu" else len(qk)
    for part in zip(qk.split(rows), cos.split(rows), sin.split(rows), strict=True):
        part[0].copy_(_rotated(*part))
    return qk


def _rotated(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = qk.float().chunk(2, -1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1).to(qk.dtype)


def grouped_windows(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention within segments: segments of equal length share one call. q, k, v: (1, H, N, d) -> (1, N, H, d)."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
    heads, width = q.shape[1], q.shape[3]
    sizes, parts, places = torch.unique(lengths).tolist(), [], []
    for n in sizes:
        if n == 0:
            continue
        place = (starts[lengths == n, None] + torch.arange(n, device=q.device)).reshape(-1)

        def cut(t: Tensor, place: Tensor = place, n: int = n) -> Tensor:
            mine = t[0] if len(sizes) == 1 else t[0][:, place]
            return mine.reshape(heads, -1, n, width).transpose(0, 1)  # (windows, H, n, d)

        if q.requires_grad and q.device.type == "cpu":  # in training on CPU, the fused backward is 2 to 6 times slower
            weights = ((cut(q) * width**-0.5) @ cut(k).transpose(-1, -2)).softmax(-1, dtype=torch.float32)
            out = weights.to(v.dtype) @ cut(v)
        elif n >= LONG and USE_MATMUL_ATTENTION and q.device.type == "cpu" and not torch.is_grad_enabled():
            heads_of = (t.flatten(0, 1) for t in (cut(q), cut(k), cut(v)))
            out = torch.stack([matmul_attention(*head) for head in zip(*heads_of, strict=True)]).view(-1, heads, n, width)
        else:
            out = scaled_dot_product_attention(cut(q), cut(k), cut(v))
        parts.append(out.transpose(1, 2).reshape(-1, heads, width))
        places.append(place)
    if len(sizes) == 1:
        return parts[0][None]
    order = torch.cat(places)
    merged = parts[0].new_empty(q.shape[2], heads, width).index_copy(0, order, torch.cat(parts))
    return merged[None]


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head within one segment, in float32, ``ROWS`` queries at a time: three times (n, d) -> (n, d)."""
    scaled, keys, values = q.float() * q.shape[1] ** -0.5, k.float().contiguous(), v.float().T.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    for rows, queries in zip(out.split(ROWS), scaled.split(ROWS), strict=True):
        weights = linear_onednn(queries, keys)
        rows.copy_(linear_onednn(weights.softmax(-1), values))
    return out


def fits_varlen(q: Tensor) -> bool:
    """Whether PyTorch's variable-length kernel takes this call: half precision on a GPU, without gradients."""
    return varlen_attn is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not q.requires_grad


def varlen_windows(kernel, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int) -> Tensor:
    """All segments in one call of ``kernel(q, k, v, cu_q, cu_k, max_q, max_k)`` on (N, H, D). (1, H, N, D) -> (1, N, H, D)."""
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    cu_seq_lens = cu_seq_lens.to(torch.int32)
    return kernel(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest)[None]


@dataclass
class VisionProbe:
    """What one vision block leaves behind, per patch in the tower's window order."""

    wants_attention: bool
    wants_keys: bool

    attention: Tensor | None = None
    """(P,) attention that each patch receives, mean over heads and queries."""

    keys: Tensor | None = None
    """(P, d) key of each patch, mean over heads."""

    middle: VisionProbe | None = None
    """That of the middle block, where it is asked for."""

    unmerged: Tensor | None = None
    """(P, d) what enters the projector."""

    def __call__(self, q: Tensor, k: Tensor, scaling: float, boundaries: Tensor) -> None:
        """q, k: (1, H, P, d) after RoPE; boundaries (segments + 1,): images never attend to one another."""
        if self.wants_keys:
            self.keys = k[0].mean(0, dtype=torch.float32)
        if self.wants_attention:
            pieces = pairwise(boundaries.tolist())
            self.attention = torch.cat([column_attention(q[0, :, a:b], k[0, :, a:b], scaling) for a, b in pieces])


@contextmanager
def probed(tower, block: int, needs: Iterable[str]) -> Iterator[VisionProbe]:
    """Within the block, vision block ``block`` of ``tower`` (and of no other) fills the probe at every forward pass.

    needs: fields of ``VisualTokens``; ``middle_attention`` is that of the middle one of the blocks that see the whole image.
    """
    number, every = range(len(tower.blocks))[block], [*range(len(tower.blocks))]
    full = getattr(tower.config, "fullatt_block_indexes", every)  # only Qwen2.5-VL has windows
    if "attention" in needs and number not in full:
        raise RunError(f"vision block {block} attends within windows only; blocks that see the whole image: {list(full)}")
    probe = VisionProbe("attention" in needs, "vision_keys" in needs)
    probes = {number: [probe]}
    if "middle_attention" in needs:
        probe.middle = VisionProbe(True, False)
        probes.setdefault(full[(len(full) - 1) // 2], []).append(probe.middle)

    def keep(_, args) -> None:
        probe.unmerged = args[0]

    hooks = [tower.merger.register_forward_pre_hook(keep)] if "unmerged" in needs else []
    for n, some in probes.items():
        tower.blocks[n].attn.probe = lambda *args, some=some: [each(*args) for each in some]
    try:
        yield probe
    finally:
        for n in probes:
            del tower.blocks[n].attn.probe
        for hook in hooks:
            hook.remove()


@contextmanager
def windowed_attention(tower) -> Iterator[None]:
    """Within the block, this vision tower (and no other) attends with ``attend`` and embeds patches by a product."""
    before, tower.config._attn_implementation = tower.config._attn_implementation, NAME
    weight, bias = tower.patch_embed.proj.weight, tower.patch_embed.proj.bias
    # (P, channels x frames x patch x patch) -> (P, D)
    tower.patch_embed.forward = lambda patches: linear_onednn(patches.to(weight.dtype), weight.flatten(1), bias)
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", [])]
    # a merger without an ``mlp`` is one over groups of patches in a row, of which ``ROWS`` is a multiple
    alone = [*(getattr(merger, "mlp", merger) for merger in mergers), *(block.mlp for block in tower.blocks)]
    for module in alone:
        module.forward = partial(in_row_blocks, module.forward)
    for block in tower.blocks:
        block.attn.forward = partial(attend, block.attn)
    try:
        with onednn_linears(tower):
            yield
    finally:
        tower.config._attn_implementation = before
        for module in (tower.patch_embed, *alone, *(block.attn for block in tower.blocks)):
            del module.forward
