"""Sessions side by side in one padded batch: their caches, the new chunks, prefill and greedy decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from .pruning import Chunk
from .session import Request, Session

if TYPE_CHECKING:
    from .vlm import VLM


class Batch:
    """Sessions side by side: a padded copy of their caches, the new chunk to the right of it, holes in the 2-D mask.

    Layout of a row: [padding | cache of the session | padding | chunk | reply]; padding is masked out, and positions are
    explicit, so that a row computes what it would alone.
    """

    def __init__(self, vlm: VLM, sessions: list[Session], chunks: list[Chunk]):
        self.vlm, device = vlm, vlm.device
        rows, past, new = len(chunks), max(s.length for s in sessions), max(len(c.embeds) for c in chunks)
        self.embeds = chunks[0].embeds.new_zeros((rows, new, chunks[0].embeds.shape[1]))
        self.positions = torch.zeros((3, rows, new), dtype=torch.long, device=device)
        self.mask = torch.zeros((rows, past + new), dtype=torch.long, device=device)  # (B, L): 1 where there is a token
        self.prompt_length = past + new
        for b, (session, chunk) in enumerate(zip(sessions, chunks, strict=True)):
            self.embeds[b, new - len(chunk.embeds) :] = chunk.embeds
            self.positions[:, b, new - len(chunk.embeds) :] = chunk.positions
            self.mask[b, past - session.length : past] = 1
            self.mask[b, past + new - len(chunk.embeds) :] = 1
        self.visual = [float(c.visual) for c in chunks]  # visual tokens entering a decoder layer, mean over the layers
        self.next = torch.tensor([c.after for c in chunks], device=device)  # (B,)
        self.cache = DynamicCache(config=vlm.decoder.config)
        if past:
            for layer in range(vlm.decoder.config.num_hidden_layers):
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

    def _forward(self, embeds: Tensor, positions: Tensor) -> Tensor:
        out = self.vlm.decoder(
            inputs_embeds=embeds, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        logits = self.vlm.model.lm_head(out.last_hidden_state[:, -1]).float()  # (B, vocabulary)
        if self.vlm.trace is not None:
            self.vlm.trace.append(logits.clone())
        return logits

    def prefill(self) -> Tensor:
        return self._forward(self.embeds, self.positions)

    def decode(self, logits: Tensor, requests: list[Request]) -> tuple[list[list[int]], list[bool]]:
        """Greedy continuation of every row -> token ids (end token excluded), and whether the row ended by itself.

        A reply that the turn says for the model is taken as it stands: its tokens open the next chunk, nothing is decoded.
        """
        vlm, rows = self.vlm, len(requests)
        written: list[list[int]] = [[] for _ in range(rows)]
        live = [r.turn.said is None for r in requests]
        ended = [not decoded for decoded in live]
        for step in range(max(r.budget for r in requests) if any(live) else 0):
            chosen = logits.argmax(-1).tolist()
            for b, r in enumerate(requests):
                if not live[b]:
                    continue
                if chosen[b] in vlm.stop:
                    live[b], ended[b] = False, True
                    continue
                written[b].append(chosen[b])
                if r.until and any(s in vlm.tokenizer.decode(written[b], skip_special_tokens=True) for s in r.until):
                    live[b], ended[b] = False, True
                elif len(written[b]) >= r.budget:
                    live[b] = False
            if not any(live):
                break
            on = torch.tensor(live, device=vlm.device, dtype=self.mask.dtype)[:, None]
            self.mask = torch.cat([self.mask, on], 1)
            tokens = torch.tensor(chosen, device=vlm.device)[:, None]
            positions = (self.next + step)[None, :, None].expand(3, -1, -1)
            logits = self._forward(vlm.decoder.get_input_embeddings()(tokens), positions)
        for b, r in enumerate(requests):
            if r.turn.said is not None:
                written[b] = vlm.tokenizer(r.turn.said, add_special_tokens=False)["input_ids"]
        return written, ended

    def _row(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of row ``i`` without padding and holes, (H, L, D) per layer."""
        at = self.mask[i].nonzero().squeeze(1)
        layers = self.cache.layers
        return [x.keys[i][:, at] for x in layers], [x.values[i][:, at] for x in layers]

    def keep(self, b: int, session: Session, tokens: list[int]) -> None:
        """Move row ``b`` of the cache into its session. A last token that the budget cut off was never fed: it opens the next chunk."""
        fed = int(self.mask[b, self.prompt_length :].sum())
        session.keys, session.values = self._row(b)
        session.next_position = int(self.next[b]) + fed
        session.pending = tokens[fed:]
