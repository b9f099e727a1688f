"""Sessions side by side in one padded batch: their caches, the new chunks, prefill and greedy decoding."""

from __future__ import annotations

from inspect import signature
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLTextModel

from awares_bench.models.prompt_chunk import Chunk

from .decoding import Repetition
from .reply_decoder import Writer
from .session import Session

if TYPE_CHECKING:
    from .local_model import VLM

CACHE = "cache" if "cache" in signature(Qwen2_5_VLTextModel.forward).parameters else "past_key_values"
"""What the decoder and its layers call the argument for their cache: transformers renamed it, and 5.40 drops the old name."""


class Batch:
    """Sessions side by side: a padded copy of their caches, the new chunk to the right of it, holes in the 2-D mask.

    Layout of a row: [padding | cache of the session | padding | chunk | reply]; padding is masked out, and positions are
    explicit, so that a row computes what it would alone.
    """

    def __init__(self, vlm: VLM, sessions: list[Session], chunks: list[Chunk]):
        self.vlm = vlm
        self.visual = [float(c.visual) for c in chunks]  # visual tokens entering a decoder layer, mean over the layers
        self.after = [c.after for c in chunks]  # the position of the reply's first token
        self.fed = [0] * len(chunks)  # tokens of the reply that are in the cache
        self.rows = list(range(len(chunks)))  # of the request that each row of the batch belongs to
        self._lay_out(sessions, chunks)

    def _lay_out(self, sessions: list[Session], chunks: list[Chunk]) -> None:
        """Put caches and chunks where the decoder takes them."""
        device = self.vlm.device
        rows, past, new = len(chunks), max(s.length for s in sessions), max(len(c.embeds) for c in chunks)
        self.embeds = chunks[0].embeds.new_zeros((rows, new, chunks[0].embeds.shape[1]))
        self.positions = torch.zeros((3, rows, new), dtype=torch.long, device=device)
        self.mask = torch.zeros((rows, past + new), dtype=torch.long, device=device)  # (B, L): 1 where there is a token
        for b, (session, chunk) in enumerate(zip(sessions, chunks, strict=True)):
            self.embeds[b, new - len(chunk.embeds) :] = chunk.embeds
            self.positions[:, b, new - len(chunk.embeds) :] = chunk.positions
            self.mask[b, past - session.length : past] = 1
            self.mask[b, past + new - len(chunk.embeds) :] = 1
        self.next = torch.tensor(self.after, device=device)  # (B,)
        self.done: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # caches of rows that left the batch
        self.cache = DynamicCache(config=self.vlm.decoder.config)
        if past:
            for layer in range(self.vlm.decoder.config.num_hidden_layers):
                self.cache.update(
                    *(
                        self._stack([getattr(s, kind)[layer] if s.keys else None for s in sessions])
                        for kind in ("keys", "values")
                    ),
                    layer,
                )

    @staticmethod
    def _stack(rows: list[Tensor | None]) -> Tensor:
        """(H, L_b, D) per row -> (B, H, longest, D), padded on the left."""
        like = next(r for r in rows if r is not None)
        length = max(r.shape[1] for r in rows if r is not None)
        out = like.new_zeros((len(rows), like.shape[0], length, like.shape[2]))
        for b, row in enumerate(rows):
            if row is not None:
                out[b, :, length - row.shape[1] :] = row
        return out

    def _forward(self, embeds: Tensor, positions: Tensor, last: int) -> Tensor:
        """-> scores after each of the ``last`` columns (B, last, vocabulary), in float32."""
        out = self.vlm.decoder(
            inputs_embeds=embeds, attention_mask=self.mask, position_ids=positions, use_cache=True, **{CACHE: self.cache}
        )
        return self.vlm.model.lm_head(out.last_hidden_state[:, -last:]).float()

    def prefill(self) -> Tensor:
        """-> scores after the prompt (B, 1, vocabulary)."""
        return self._forward(self.embeds, self.positions, 1)

    def decode(self, logits: Tensor, writers: list[Writer], repetition: Repetition) -> None:
        """Write every row's reply, greedily."""
        logits = repetition.first(logits)
        for b, (best, top) in enumerate(_best(logits)):
            if writers[b].live:
                self._take(writers[b], [0], best, top, logits[b])  # what was fed is the prompt
        while live := [b for b in self.rows if writers[b].live]:
            self._let_go(live, writers)
            feeds = [writers[b].feed() if writers[b].live else [] for b in self.rows]
            logits = repetition.next(self._step(feeds), self.rows, feeds)
            width, stands = logits.shape[1], [0] * len(feeds)
            for i, (b, fed, (best, top)) in enumerate(zip(self.rows, feeds, _best(logits), strict=True)):
                if fed:
                    writers[b].passes += 1
                    new = width - len(fed)
                    stands[i] = self._take(writers[b], fed, best[new:], top[new:], logits[i, new:])
                    self.fed[b] += stands[i]
            repetition.keep(self.rows, feeds, stands)
            if any(n < len(fed) for n, fed in zip(stands, feeds, strict=True)):
                self._take_back(feeds, stands)

    def _take(self, writer: Writer, fed: list[int], best: list[int], top: list[float], scores: Tensor) -> int:
        """``Writer.take``, or its failure where the best score is not a finite number."""
        wrong = [value for value in top if not isfinite(value)]
        if wrong:
            kind = str(self.vlm.model.dtype).removeprefix("torch.")
            advice = "overflow; pass dtype=bfloat16 or dtype=float32" if kind == "float16" else "the weights may be broken"
            writer.fail(f"the model's scores are {wrong[0]} in {kind} after {len(writer.written)} tokens of its reply: {advice}")
            return len(fed)
        return writer.take(fed, best, scores)

    def _step(self, feeds: list[list[int]]) -> Tensor:
        """Feed each row its tokens, none where a row is done -> scores after each, padded on the left."""
        width, device, pad = max(map(len, feeds)), self.vlm.device, self.vlm.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (width - len(f)) + f for f in feeds], device=device)
        on = torch.tensor([[0] * (width - len(f)) + [1] * len(f) for f in feeds], device=device)
        start = self.next + torch.tensor([self.fed[b] for b in self.rows], device=device)
        positions = start[:, None] + (on.cumsum(1) - 1).clamp(min=0)  # (B, width)
        self.mask = torch.cat([self.mask, on], 1)
        return self._forward(self.vlm.decoder.get_input_embeddings()(tokens), positions.expand(3, -1, -1), width)

    def _take_back(self, feeds: list[list[int]], stands: list[int]) -> None:
        """Of a draft that did not hold, ``stands`` tokens stand; the others leave a hole."""
        width = max(map(len, feeds))
        on = [[0] * (width - len(f)) + [1] * n + [0] * (len(f) - n) for n, f in zip(stands, feeds, strict=True)]
        self.mask[:, -width:] = torch.tensor(on, device=self.vlm.device)

    def _let_go(self, live: list[int], writers: list[Writer]) -> None:
        """Drop the rows that are done, once they are half of the batch: it takes a copy of the others."""
        if len(live) > len(self.rows) // 2:
            return
        for i, b in enumerate(self.rows):
            if b not in live and not writers[b].request.turn.is_final:
                self.done[b] = self._row(i)
        keep = torch.tensor([self.rows.index(b) for b in live], device=self.vlm.device)
        self.cache.batch_select_indices(keep)
        self.mask, self.next = self.mask[keep], self.next[keep]
        self.rows = live

    def _row(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of row ``i`` without padding and holes, (H, L, D) per layer."""
        at = self.mask[i].nonzero().squeeze(1)
        layers = self.cache.layers
        return [x.keys[i][:, at] for x in layers], [x.values[i][:, at] for x in layers]

    def keep(self, b: int, session: Session, written: list[int]) -> None:
        """Move row ``b`` of the cache into its session. Tokens written but never fed open its next chunk."""
        self._caches_of(b, session)
        session.next_position = self.after[b] + self.fed[b]
        session.pending = written[self.fed[b] :]

    def _caches_of(self, b: int, session: Session) -> None:
        """Give a session the cache of row ``b``."""
        session.keys, session.values = self.done.pop(b) if b in self.done else self._row(self.rows.index(b))
        session.held = []


def _best(scores: Tensor) -> list[tuple[list[int], list[float]]]:
    """Scores (B, n, vocabulary) -> per row the most probable token after each, and its score: NaN where any score is NaN."""
    top = scores.max(-1)
    found = torch.stack([top.indices.double(), top.values.double()]).tolist()  # in one transfer from the device
    return [([int(token) for token in row], values) for row, values in zip(*found, strict=True)]
