"""Batches without padding, for CPUs: the tokens of all rows are concatenated along the sequence; each row owns a key-value cache that grows
in place.

A padded rectangle costs on a CPU what its padding costs, a copy of every cache at every step, and repeats key and value heads for
grouped-query attention: at the heads of 3B one token attends to 1,300 without these copies in a tenth of the time (float32; a twentieth in
bfloat16), and a prompt of 1,300 in 0.6 of it, since it needs no mask (measured). On a GPU a call for each row is what costs; there
``varlen_batch`` makes one call for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from awares_bench.models.prompt_chunk import PromptChunk, joined_deepstack

from .attention import own_attention
from .batch import Batch
from .reply_decoder import ReplyDecoder
from .session import Session

SPARE = 4
"""Room for this many times a turn's tokens: the second turn of an AwaRes conversation then goes on in the same place. A CPU's
memory that is never written is never taken."""


class RowCache:
    """The cache of one conversation: per layer keys and values (2, 1, G, room, d), the first ``length`` of ``room`` in use."""

    def __init__(self, session: Session, layers: int):
        self.length = session.length
        self.buffers: list[Any] = list(session.storage) or [None] * layers  # None until a layer's first token
        self.kept = [] if session.storage else list(zip(session.keys, session.values, strict=True))

    def append(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (2, G, n, d) -> all of them (1, G, length + n, d). ``length`` is the caller's to move, after the last layer."""
        after, buffer = self.length + new.shape[2], self.buffers[layer]
        if buffer is None or buffer.shape[3] < after:
            wider = new.new_empty((2, 1, new.shape[1], SPARE * after, new.shape[3]))
            if self.length:
                wider[:, 0, :, : self.length] = (
                    buffer[:, 0, :, : self.length] if buffer is not None else torch.stack(self.kept[layer])
                )
            self.buffers[layer] = buffer = wider
        buffer.narrow(3, self.length, new.shape[2]).copy_(new.unsqueeze(1))
        keys, values = buffer.narrow(3, 0, after).unbind(0)
        return keys, values

    def copy(self) -> RowCache:
        """A cache of its own with the same content."""
        out = RowCache(Session(), 0)
        out.length, out.buffers = self.length, [torch.empty_like(b) for b in self.buffers]
        for mine, theirs in zip(out.buffers, self.buffers, strict=True):
            mine[:, :, :, : self.length] = theirs[:, :, :, : self.length]
        return out


class RaggedBatch(Batch):
    """A ``Batch`` whose rows never share a tensor: what is computed is what each row needs, and a row that is done is gone."""

    def layout(self, sessions: list[Session], chunks: list[PromptChunk]) -> None:
        self.caches = [RowCache(s, self.host.layers) for s in sessions]
        self.chunks = chunks

    def prefill(self) -> Tensor:
        lengths = [len(c.embeds) for c in self.chunks]
        embeds, positions = torch.cat([c.embeds for c in self.chunks]), torch.cat([c.positions for c in self.chunks], 1)
        deepstack = joined_deepstack(self.chunks)
        hidden = self.run_layers(embeds, positions, lengths, None if deepstack is None else torch.cat(deepstack, 1)[:, None])
        return self.host.logits(hidden[torch.tensor(lengths, device=hidden.device).cumsum(0) - 1])[:, None]

    def step(self, inputs: list[list[int]]) -> Tensor:
        lengths = [len(tokens) for tokens in inputs]
        tokens = torch.tensor([t for row in inputs for t in row])
        positions = torch.tensor(
            [self.next_position[b] + self.fed[b] + i for b, n in zip(self.rows, lengths, strict=True) for i in range(n)]
        ).expand(self.host.position_axes, -1)
        scores = self.host.logits(self.run_layers(self.host.embed(tokens), positions, lengths))
        if max(lengths) == 1:
            return scores[:, None]
        out = scores.new_zeros((len(inputs), max(lengths), scores.shape[1]))
        for row, part in zip(out, scores.split(lengths), strict=True):
            row[len(row) - len(part) :] = part
        return out

    def run_layers(self, embeds: Tensor, positions: Tensor, lengths: list[int], deepstack: Tensor | None = None) -> Tensor:
        """Feed the rows ``lengths`` tokens each: (T, D) at positions (axes, T) -> (T, D) after the last layer. deepstack: (N, 1, T, D)."""
        self.open(lengths)
        hidden = self.through_layers(embeds, positions[:, None], deepstack)
        self.close(lengths)
        return hidden

    def through_layers(self, embeds: Tensor, positions: Tensor, deepstack: Tensor | None = None) -> Tensor:
        """All layers, whose attention is ``attend``: (T, D) at positions (axes, 1, T) -> (T, D)."""
        hidden, rope = embeds[None], self.host.rope(embeds[None], positions)
        with own_attention(self.host.decoder.config):
            for layer in range(self.host.layers):
                hidden = self.host.layer(layer, hidden, rope, deepstack, rows=self)
        return hidden[0]

    def open(self, lengths: list[int]) -> None:
        """Rows of ``lengths`` tokens are about to be fed."""
        self.fed_now = lengths
        caches = [self.caches[b] for b in self.rows]
        self.segments = [(c, n, _causal_mask(c.length, n)) for c, n in zip(caches, lengths, strict=True)]

    def close(self, lengths: list[int]) -> None:
        """They have been."""
        for cache, n, _ in self.segments:
            cache.length += n

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every row's queries on its own keys: (1, H, T, d) and twice (1, G, T, d), all rows in one line -> (1, T, H, d)."""
        new, out, at = torch.cat([k, v]), [], 0
        groups, width = k.shape[1], q.shape[3]
        for cache, n, mask in self.segments:
            keys, values = cache.append(layer, new[:, :, at : at + n])
            mine = q[:, :, at : at + n]
            if n == 1:  # heads that share a key head are its queries: no key is copied
                one = scaled_dot_product_attention(mine.reshape(1, groups, -1, width), keys, values)
                out.append(one.reshape(1, 1, -1, width))
            else:
                several = scaled_dot_product_attention(mine, keys, values, mask, is_causal=mask is None, enable_gqa=True)
                out.append(several.transpose(1, 2))
            at += n
        return torch.cat(out, 1)

    def drop_finished(self, active: list[int], replies: list[ReplyDecoder]) -> None:
        self.rows = active

    def reject_drafts(self, inputs: list[list[int]], accepted: list[int]) -> None:
        for b, tokens, n in zip(self.rows, inputs, accepted, strict=True):
            self.caches[b].length -= len(tokens) - n  # what is beyond is written over

    def expand(self, copies: list[int]) -> None:
        used: set[int] = set()
        caches = []
        for row in copies:
            caches.append(self.caches[row].copy() if row in used else self.caches[row])
            used.add(row)
        self.caches = caches

    def caches_to(self, request: int, session: Session) -> None:
        row = self.caches[request]
        session.storage = row.buffers
        session.keys, session.values = ([buffer[kind, 0, :, : row.length] for buffer in row.buffers] for kind in (0, 1))


def _causal_mask(past: int, new: int) -> Tensor | None:
    """Which keys each new token sees, (new, past + new); None where causality alone says it, or there is one token."""
    return torch.ones((new, past + new), dtype=torch.bool).tril(past) if past and new > 1 else None
