"""Sessions side by side without padding: every row's tokens in one line, and to each row a cache of its own that grows in place.

For CPUs. The rectangle that ``batch.py`` makes of its rows costs there what the padding costs, a copy of every cache at every step, and
another for each query head that shares a key head: at the heads of 3B one token attends to 1,300 without these copies in a tenth of the
time (float32; a twentieth in bfloat16), and a prompt of 1,300 in 0.6 of it, since it needs no mask (measured). On a GPU a call for each
row is what costs; there the rectangle stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from awares_bench.models.prompt_chunk import Chunk

from .padded_batch import Batch
from .reply_decoder import Writer
from .session import Session

if TYPE_CHECKING:
    pass

NAME = "awares_rows"

SPARE = 4
"""Room for this many times a turn's tokens: the second turn of an AwaRes conversation then goes on in the same place. A CPU's
memory that is never written is never taken."""


class Row:
    """The cache of one conversation: per layer keys and values (2, 1, G, room, d), the first ``length`` of ``room`` in use."""

    def __init__(self, session: Session, layers: int):
        self.length = session.length
        self.held = list(session.held) or [None] * layers
        self.before = [] if session.held else list(zip(session.keys, session.values, strict=True))

    def put(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (2, G, n, d) -> all of them (1, G, length + n, d). ``length`` is the caller's to move, after the last layer."""
        after, buffer = self.length + new.shape[2], self.held[layer]
        if buffer is None or buffer.shape[3] < after:
            wider = new.new_empty((2, 1, new.shape[1], SPARE * after, new.shape[3]))
            if self.length:
                wider[:, 0, :, : self.length] = (
                    buffer[:, 0, :, : self.length] if buffer is not None else torch.stack(self.before[layer])
                )
            self.held[layer] = buffer = wider
        buffer.narrow(3, self.length, new.shape[2]).copy_(new.unsqueeze(1))
        return buffer.narrow(3, 0, after).unbind(0)


class RaggedBatch(Batch):
    """A ``Batch`` whose rows never share a tensor: what is computed is what each row needs, and a row that is done is gone."""

    def _lay_out(self, sessions: list[Session], chunks: list[Chunk]) -> None:
        self.caches = [Row(s, self.vlm.decoder.config.num_hidden_layers) for s in sessions]
        self.chunks = chunks

    def prefill(self) -> Tensor:
        count = [len(c.embeds) for c in self.chunks]
        hidden = self._run(torch.cat([c.embeds for c in self.chunks]), torch.cat([c.positions for c in self.chunks], 1), count)
        last = torch.tensor(count).cumsum(0) - 1
        return self.vlm.model.lm_head(hidden[last])[:, None].float()

    def _step(self, feeds: list[list[int]]) -> Tensor:
        count = [len(f) for f in feeds]
        tokens = torch.tensor([t for f in feeds for t in f])
        places = [self.after[b] + self.fed[b] + i for b, n in zip(self.rows, count, strict=True) for i in range(n)]
        hidden = self._run(self.vlm.decoder.get_input_embeddings()(tokens), torch.tensor(places).expand(3, -1), count)
        scores = self.vlm.model.lm_head(hidden).float()
        if max(count) == 1:
            return scores[:, None]
        out = scores.new_zeros((len(feeds), max(count), scores.shape[1]))
        for row, some in zip(out, scores.split(count), strict=True):
            row[len(row) - len(some) :] = some
        return out

    def _run(self, embeds: Tensor, positions: Tensor, count: list[int]) -> Tensor:
        """Feed the rows ``count`` tokens each: (T, D) and (3, T) -> hidden states (T, D) after the last layer."""
        decoder, hidden = self.vlm.decoder, embeds[None]
        self.line = [(self.caches[b], n, _mask(self.caches[b].length, n)) for b, n in zip(self.rows, count, strict=True)]
        rope = decoder.rotary_emb(hidden, positions[:, None])
        with row_attention(decoder):
            for layer in decoder.layers:
                hidden = layer(hidden, position_embeddings=rope, rows=self)
        for cache, n, _ in self.line:
            cache.length += n
        return decoder.norm(hidden)[0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every row's queries on its own keys: (1, H, T, d) and twice (1, G, T, d), all rows in one line -> (1, T, H, d)."""
        new, out, at = torch.cat([k, v]), [], 0
        groups, width = k.shape[1], q.shape[3]
        for cache, n, mask in self.line:
            keys, values = cache.put(layer, new[:, :, at : at + n])
            mine = q[:, :, at : at + n]
            if n == 1:  # heads that share a key head are its queries: no key is copied
                one = scaled_dot_product_attention(mine.reshape(1, groups, -1, width), keys, values)
                out.append(one.reshape(1, 1, -1, width))
            else:
                some = scaled_dot_product_attention(mine, keys, values, mask, is_causal=mask is None, enable_gqa=True)
                out.append(some.transpose(1, 2))
            at += n
        return torch.cat(out, 1)

    def _let_go(self, live: list[int], writers: list[Writer]) -> None:
        self.rows = live

    def _take_back(self, feeds: list[list[int]], stands: list[int]) -> None:
        for b, fed, n in zip(self.rows, feeds, stands, strict=True):
            self.caches[b].length -= len(fed) - n

    def _caches_of(self, b: int, session: Session) -> None:
        row = self.caches[b]
        session.held = row.held
        session.keys, session.values = ([buffer[kind, 0, :, : row.length] for buffer in row.held] for kind in (0, 1))


def _mask(past: int, new: int) -> Tensor | None:
    """Which keys each new token sees, (new, past + new); None where causality alone says it, or there is one token."""
    return torch.ones((new, past + new), dtype=torch.bool).tril(past) if past and new > 1 else None


def attend_rows(module, query: Tensor, key: Tensor, value: Tensor, *_, rows: RaggedBatch, **__) -> tuple[Tensor, None]:
    """What Transformers calls in place of its own attention."""
    return rows.attend(module.layer_idx, query, key, value), None


@contextmanager
def row_attention(decoder) -> Iterator[None]:
    """Within the block the layers of ``decoder`` (and of no other model) attend with ``attend_rows``."""
    AttentionInterface.register(NAME, attend_rows)
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = before
