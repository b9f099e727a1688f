"""A padded batch whose visual tokens are cut between decoder layers, so that the layers' caches have different lengths."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from awares_bench.methods.pruner import Pruner, quirks_of
from awares_bench.models.attention_scores import AttentionRows
from awares_bench.models.base import CACHE, HostModel
from awares_bench.models.prompt_chunk import ImageSpan, PromptChunk

from .attention import own_attention
from .padded_batch import PaddedBatch, attention_mask
from .session import Session


class _SeenError(Exception):
    """Queries and keys are known, and the rest of the layer need not run."""


class LayerwiseBatch(PaddedBatch):
    """Runs the decoder with a mask per layer, and cuts the chunks after the pruner's layers.

    cuts: decoder layer after which to cut -> share of each image's tokens that go on. noted: keep in the chunks which ones did.
    """

    def __init__(
        self,
        host: HostModel,
        sessions: list[Session],
        chunks: list[PromptChunk],
        pruner: Pruner,
        cuts: dict[int, float],
        noted: bool = False,
    ):
        super().__init__(host, sessions, chunks)
        self.noted = noted
        self.pruner, self.cuts, self.chunks = pruner, cuts, chunks
        self.renumber = quirks_of(pruner).renumber_positions
        self.prompt_columns = self.mask.shape[1]  # at the first layer
        self.raters = [self.choose_raters(c) for c in chunks]
        """Places of every row's raters, counted back from the end, which no cut moves."""
        self.past = [[s.keys[layer].shape[1] if s.keys else 0 for s in sessions] for layer in range(host.layers)]
        self.shifts = torch.tensor([s.shifts or [0] * host.layers for s in sessions], device=host.device).T.clone()  # (layers, B)
        self.shifts_before = self.shifts.clone()
        self.first = torch.stack([c.positions[0, 0] for c in chunks])
        self.filled: list[Tensor] = []
        """Per layer, (B, L): where the prompt has a token."""

    def choose_raters(self, chunk: PromptChunk) -> Tensor:
        """Places of the text tokens after the last image whose attention ranks the visual tokens: (R,), -1 the last of the chunk."""
        if not chunk.spans:
            return torch.empty(0, dtype=torch.long, device=self.host.device)
        runs = [chunk.embeds[s.start : s.stop] for s in chunk.spans]
        visual = runs[0] if len(runs) == 1 else torch.cat(runs)  # one image is not copied
        text = chunk.embeds[chunk.spans[-1].stop :]
        return self.pruner.raters(visual, text) - len(text)

    def prefill(self) -> Tensor:
        hidden, positions, deepstack = self.embeds, self.positions, self.deepstack
        entering = []
        for layer in range(self.host.layers):
            self.filled.append(self._filled(self.past[layer], [len(c.embeds) for c in self.chunks]))
            entering.append([c.visual for c in self.chunks])
            shift = self.shifts_before[layer] * (not self._renumbered(layer))
            rope = self.host.rope(hidden, positions + shift[None, :, None])
            if layer not in self.cuts:
                hidden = self._layer(layer, hidden, rope, deepstack)
                continue
            # a layer after which tokens are cut: the raters' queries are kept as its attention sees them, or as the next one's would
            if self.pruner.looks_ahead:
                hidden = self._layer(layer, hidden, rope, deepstack)
                rope = self.look_ahead(layer + 1, hidden, positions)
            else:
                observed: dict[str, Any] = {"observer": self.observe, "implementation": self.host.attention}
                with own_attention(self.host.decoder.config):
                    hidden = self._layer(layer, hidden, rope, deepstack, **observed)
            self.chunks = [self.cut(layer, b, hidden[b], positions[:, b], rope) for b in self.rows]
            hidden, positions, deepstack = self.padded(self.chunks)
            if self.renumber:
                positions = self._renumber(layer, positions)
        self.visual = torch.tensor(entering, dtype=torch.float64).mean(0).tolist()
        return self.host.logits(hidden[:, -1:])

    def cut(self, layer: int, b: int, hidden: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> PromptChunk:
        """Row ``b`` reduced between ``layer`` and the next; hidden: its states (L, D) there."""
        chunk = self.chunks[b]
        new = len(chunk.embeds)
        rows = partial(self.attention_rows, layer, b, new, (rope[0][b], rope[1][b]))
        uncut = replace(chunk, embeds=hidden[-new:], positions=positions[:, -new:])
        return uncut.cut(self.pruner, self.cuts[layer], rows, layer, self.noted)

    def run_layers(self, hidden: Tensor, positions: Tensor, deepstack: Tensor | None = None) -> Tensor:
        rope = None
        for layer in range(self.host.layers):
            shift = self.shifts[layer][self.rows]
            if rope is None or self.renumber:
                rope = self.host.rope(hidden, positions + shift[None, :, None])
            hidden = self._layer(layer, hidden, rope, deepstack)
        return hidden

    def _layer(
        self,
        layer: int,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        deepstack: Tensor | None,
        implementation: str = "",
        **observed,
    ) -> Tensor:
        alone = len(self.rows) == 1 and not self.gaps  # one conversation has no padding
        mask = attention_mask(implementation or self.host.attention, self._mask(layer), hidden, not alone)
        cache = {"use_cache": True, CACHE: self.cache}
        if observed:
            observed["implementation"] = implementation
        return self.host.layer(layer, hidden, rope, deepstack, attention_mask=mask, **cache, **observed)

    def _mask(self, layer: int) -> Tensor:
        """Where layer ``layer`` has a token: (B, L), the prompt and what was written since."""
        return torch.cat([self.filled[layer][self.rows], self.mask[:, self.prompt_columns :]], 1)

    def _filled(self, past: list[int], new: list[int]) -> Tensor:
        """Rows of [padding | past | padding | new] -> (B, L) bool."""
        left, right = torch.arange(max(past)), torch.arange(max(new))
        cached, fresh = torch.tensor(past)[:, None], torch.tensor(new)[:, None]
        return torch.cat([left >= max(past) - cached, right >= max(new) - fresh], 1).to(self.host.device)

    def observe(self, query: Tensor, key: Tensor) -> None:
        """Keep the raters' queries (R, H, d) of every row, of all queries (B, H, n, d)."""
        self.queries = [query[b][:, places].transpose(0, 1) for b, places in enumerate(self.raters)]

    def look_ahead(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of ``layer`` on tokens that it has not run on yet, up to where it attends -> its cosines and sines."""

        def observe(query: Tensor, key: Tensor) -> None:
            self.observe(query, key)
            self.keys_ahead = key
            raise _SeenError

        shift = self.shifts_before[layer] - self.shifts_before[layer - 1] * self._renumbered(layer - 1)
        cos, sin = self.host.rope(hidden, positions + shift[None, :, None])
        if quirks_of(self.pruner).unrotated:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        with own_attention(self.host.decoder.config), suppress(_SeenError):
            self.host.layer(layer, hidden, (cos, sin), attention_mask=None, observer=observe)
        return cos, sin

    def attention_rows(self, layer: int, b: int, new: int, rope: tuple[Tensor, Tensor], span: ImageSpan) -> AttentionRows:
        """The raters' attention on an image in ``layer``, or in the next where the pruner looks ahead, among the ``new`` tokens of row
        ``b``; rope: cosines and sines there."""
        ahead, quirks = self.pruner.looks_ahead, quirks_of(self.pruner)
        past, left = self.past[layer + ahead][b], max(self.past[layer + ahead])
        if quirks.unrotated:  # what an earlier turn left in the cache is rotated
            past = 0
        cached = self.cache.layers[layer + ahead].keys  # (B, G, padding and K, d)
        keys = self.keys_ahead[b][:, -new:] if ahead else cached[b][:, -new:]
        if past:
            keys = torch.cat([cached[b][:, left - past : left], keys], 1)
        columns = slice(past + span.start, past + span.stop)
        places = past + new + self.raters[b]
        return AttentionRows(self.queries[b].transpose(0, 1), keys, places, columns, rope, self.host.decoder.norm)

    def _renumbered(self, layer: int) -> bool:
        return self.renumber and layer > min(self.cuts)

    def _renumber(self, layer: int, positions: Tensor) -> Tensor:
        """Positions that count the tokens of layer ``layer + 1`` one by one; later tokens of these layers go on from there."""
        length = torch.tensor([len(c.embeds) for c in self.chunks], device=positions.device)
        first = self.first + self.shifts_before[layer + 1]
        place = torch.arange(positions.shape[2], device=positions.device) - (positions.shape[2] - length)[:, None]  # (B, L)
        self.shifts[layer + 1 :] = first + length - self.starts
        return (first[:, None] + place).clamp(min=0).expand(len(positions), -1, -1)

    def cache_of(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        layers = list(enumerate(self.cache.layers))
        at = [self._mask(layer)[row].nonzero().squeeze(1) for layer, _ in layers]
        return [x.keys[row][:, at[n]] for n, x in layers], [x.values[row][:, at[n]] for n, x in layers]

    def save_session(self, request: int, session: Session, tokens: list[int]) -> None:
        """As of every batch, and by how much each layer's positions differ from the conversation's."""
        super().save_session(request, session, tokens)
        session.shifts = self.shifts[:, request].tolist()
