"""Rows side by side in a padded rectangle, on one key-value cache: for attention other than PyTorch's own, and for GPUs without a kernel
for rows of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from awares_bench.models.base import CACHE
from awares_bench.models.prompt_chunk import PromptChunk, joined_deepstack

from .batch import Batch
from .reply_decoder import ReplyDecoder
from .session import Session


class PaddedBatch(Batch):
    """Layout of a row: [padding | cache of the session | padding | chunk | reply], with holes in a 2-D mask where nothing is."""

    def layout(self, sessions: list[Session], chunks: list[PromptChunk]) -> None:
        past, new = max(s.length for s in sessions), max(len(c.embeds) for c in chunks)
        self.embeds, self.positions, self.deepstack = self.padded(chunks)
        self.mask = torch.zeros((len(chunks), past + new), dtype=torch.bool, device=self.host.device)
        """(B, L): where a row has a token."""
        for b, (session, chunk) in enumerate(zip(sessions, chunks, strict=True)):
            self.mask[b, past - session.length : past] = True
            self.mask[b, past + new - len(chunk.embeds) :] = True
        self.gaps = len({s.length for s in sessions}) > 1 or len({len(c.embeds) for c in chunks}) > 1
        """Whether the mask has a hole anywhere."""
        self.starts = torch.tensor(self.next_position, device=self.host.device)  # (B,)
        self.finished: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # caches of rows that left the batch
        self.cache = DynamicCache(config=self.host.decoder.config)
        for layer in range(self.host.layers) if past else ():
            pairs = [(s.keys[layer], s.values[layer]) if s.keys else None for s in sessions]
            self.cache.update(_stacked([p and p[0] for p in pairs]), _stacked([p and p[1] for p in pairs]), layer)

    def padded(self, chunks: list[PromptChunk]) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> embeddings (B, L, D), positions (axes, B, L) and what is added after the first N layers (N, B, L, D), padded on the left."""
        length, embeds = max(len(c.embeds) for c in chunks), chunks[0].embeds
        hidden = embeds.new_zeros((len(chunks), length, embeds.shape[1]))
        positions = torch.zeros((self.host.position_axes, len(chunks), length), dtype=torch.long, device=self.host.device)
        for b, c in enumerate(chunks):
            hidden[b, length - len(c.embeds) :] = c.embeds
            positions[:, b, length - len(c.embeds) :] = c.positions
        added = joined_deepstack(chunks)
        if added is None:
            return hidden, positions, None
        deepstack = embeds.new_zeros((len(added[0]), *hidden.shape))
        for b, rows in enumerate(added):
            deepstack[:, b, length - rows.shape[1] :] = rows
        return hidden, positions, deepstack

    def run_layers(self, hidden: Tensor, positions: Tensor, deepstack: Tensor | None = None) -> Tensor:
        """All layers on the last columns: (B, n, D) at positions (axes, B, n) -> (B, n, D). deepstack: (N, B, n, D)."""
        rope = self.host.rope(hidden, positions)
        mask = attention_mask(self.host.attention, self.mask, hidden, self.gaps)
        for layer in range(self.host.layers):
            hidden = self.host.layer(layer, hidden, rope, deepstack, attention_mask=mask, use_cache=True, **{CACHE: self.cache})
        return hidden

    def prefill(self) -> Tensor:
        return self.host.logits(self.run_layers(self.embeds, self.positions, self.deepstack)[:, -1:])

    def step(self, inputs: list[list[int]]) -> Tensor:
        width, device, pad = max(map(len, inputs)), self.host.device, self.host.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (width - len(f)) + f for f in inputs], device=device)
        filled = torch.tensor([[False] * (width - len(f)) + [True] * len(f) for f in inputs], device=device)
        self.mask, self.gaps = torch.cat([self.mask, filled], 1), self.gaps or any(len(f) < width for f in inputs)
        first = self.starts + torch.tensor([self.fed[b] for b in self.rows], device=device)
        positions = first[:, None] + (filled.cumsum(1) - 1).clamp(min=0)  # (B, width)
        return self.host.logits(self.run_layers(self.host.embed(tokens), positions.expand(self.host.position_axes, -1, -1)))

    def reject_drafts(self, inputs: list[list[int]], accepted: list[int]) -> None:
        """The places of rejected tokens become holes."""
        width = max(map(len, inputs))
        kept = [[0] * (width - len(f)) + [1] * n + [0] * (len(f) - n) for n, f in zip(accepted, inputs, strict=True)]
        self.mask[:, -width:] = torch.tensor(kept, device=self.host.device)
        self.gaps = True

    def drop_finished(self, active: list[int], replies: list[ReplyDecoder]) -> None:
        """Once they are half of the batch: it takes a copy of the others."""
        if len(active) > len(self.rows) // 2:
            return
        for row, b in enumerate(self.rows):
            if b not in active and not replies[b].request.turn.is_final:
                self.finished[b] = self.cache_of(row)
        self._select([self.rows.index(b) for b in active])
        self.rows = active

    def expand(self, copies: list[int]) -> None:
        self._select(copies)

    def _select(self, rows: list[int]) -> None:
        """Keep these rows of cache, mask and positions, in this order; a row may come several times."""
        at = torch.tensor(rows, device=self.host.device)
        self.cache.batch_select_indices(at)
        self.mask, self.starts = self.mask[at], self.starts[at]

    def cache_of(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of a row without padding and holes, (H, L, D) per layer."""
        at = self.mask[row].nonzero().squeeze(1)
        layers = self.cache.layers
        return [x.keys[row][:, at] for x in layers], [x.values[row][:, at] for x in layers]

    def caches_to(self, request: int, session: Session) -> None:
        done = self.finished.pop(request, None)
        session.keys, session.values = done or self.cache_of(self.rows.index(request))
        session.storage = []


def _stacked(rows: list[Tensor | None]) -> Tensor:
    """(H, L_b, D) per row -> (B, H, longest, D), padded on the left."""
    like = next(r for r in rows if r is not None)
    length = max(r.shape[1] for r in rows if r is not None)
    out = like.new_zeros((len(rows), like.shape[0], length, like.shape[2]))
    for b, row in enumerate(rows):
        if row is not None:
            out[b, :, length - row.shape[1] :] = row
    return out


def attention_mask(implementation: str, filled: Tensor, hidden: Tensor, gaps: bool) -> Tensor | None:
    """Where there is a token (B, L) -> the mask that transformers' attention functions take for the last columns ``hidden`` (B, n, D).

    gaps: whether anything is missing in ``filled``. None where the functions need no mask: they are causal by themselves.
    """
    n, length = hidden.shape[1], filled.shape[1]
    if not gaps and (n == 1 or (n == length and implementation != "eager")):
        return None
    if "flash" in implementation:
        return filled.long() if gaps else None
    place = torch.arange(length, device=filled.device)
    query = place[length - n :, None]
    # a padding query sees itself: a row without any key is NaN in some kernels, and would spread
    allowed = (filled[:, None, None] & (place <= query)) | (place == query)  # (B, 1, n, L)
    if implementation == "eager":
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, torch.finfo(hidden.dtype).min)
    return allowed
