"""A batch whose visual tokens are cut between decoder layers, so that the layers' caches have different lengths."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from awares_bench.methods.pruner import Pruner, quirks_of
from awares_bench.models.attention_scores import AttentionRows
from awares_bench.models.prompt_chunk import Chunk, Span

from .padded_batch import CACHE, Batch
from .session import Session

if TYPE_CHECKING:
    from .local_model import VLM


class StagedBatch(Batch):
    """Runs the decoder layer by layer, with a mask per layer, and cuts the chunks after the pruner's layers.

    stages: decoder layer after which to cut -> share of each image's tokens that go on.
    """

    def __init__(self, vlm: VLM, sessions: list[Session], chunks: list[Chunk], pruner: Pruner, stages: dict[int, float]):
        super().__init__(vlm, sessions, chunks)
        self.pruner, self.stages, self.chunks = pruner, stages, chunks
        self.renumber = quirks_of(pruner).renumber_positions
        self.columns = self.mask.shape[1]  # of the prompt, at the first layer
        self.raters, self.asked = self._choose_raters()
        layers = len(vlm.decoder.layers)
        self.past = [[s.keys[layer].shape[1] if s.keys else 0 for s in sessions] for layer in range(layers)]
        self.shifts = torch.tensor([s.shifts or [0] * layers for s in sessions], device=vlm.device).T.clone()  # (layers, B)
        self.before = self.shifts.clone()
        self.first = torch.stack([c.positions[0, 0] for c in chunks])
        self.held: list[Tensor] = []  # per layer, (B, L): where the prompt has a token

    def _choose_raters(self) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Places of every row's raters, and where all of them are: row and place. Counted back from the end, which no cut moves."""
        places = [self._raters(c) for c in self.chunks]
        return places, (torch.cat([torch.full_like(p, b) for b, p in enumerate(places)]), torch.cat(places))

    def _raters(self, chunk: Chunk) -> Tensor:
        """Places of the text tokens after the last image whose attention ranks the visual tokens: (R,), -1 the last of the chunk."""
        if not chunk.spans:
            return torch.empty(0, dtype=torch.long, device=self.vlm.device)
        visual = [chunk.embeds[s.start : s.stop] for s in chunk.spans]
        visual = visual[0] if len(visual) == 1 else torch.cat(visual)  # one image is not copied
        text = chunk.embeds[chunk.spans[-1].stop :]
        return self.pruner.raters(visual, text) - len(text)

    def prefill(self) -> Tensor:
        decoder, hidden, positions = self.vlm.decoder, self.embeds, self.positions
        entering = []
        for layer in range(len(decoder.layers)):
            self.held.append(self._held(self.past[layer], [len(c.embeds) for c in self.chunks]))
            entering.append([c.visual for c in self.chunks])
            shift = self.before[layer] * (not self._repacked(layer))
            rope = decoder.rotary_emb(hidden, positions + shift[None, :, None])
            if layer not in self.stages:
                hidden = self._layer(layer, hidden, rope)
                continue
            with decoder.layers[layer].self_attn.q_proj.register_forward_hook(partial(self._ask, rope)):
                hidden = self._layer(layer, hidden, rope)
            self.chunks = [self._cut(layer, b, hidden[b], positions[:, b], rope) for b in self.rows]
            hidden, positions = self._padded(self.chunks)
            if self.renumber:
                positions = self._repack(layer, positions)
        self.visual = torch.tensor(entering, dtype=torch.float64).mean(0).tolist()
        return self.vlm.model.lm_head(decoder.norm(hidden[:, -1:])).float()

    def _cut(self, layer: int, b: int, hidden: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> Chunk:
        """Row ``b`` reduced between ``layer`` and the next; hidden: its states (L, D) there."""
        chunk = self.chunks[b]
        new = len(chunk.embeds)
        rows = partial(self._rows, layer, b, new, (rope[0][b], rope[1][b]))
        return Chunk(hidden[-new:], positions[:, -new:], chunk.after, chunk.spans).cut(self.pruner, self.stages[layer], rows)

    def _forward(self, embeds: Tensor, positions: Tensor, last: int) -> Tensor:
        hidden, rope = embeds, None
        for layer in range(len(self.vlm.decoder.layers)):
            shift = self.shifts[layer][self.rows]
            if rope is None or self.renumber:
                rope = self.vlm.decoder.rotary_emb(hidden, positions + shift[None, :, None])
            hidden = self._layer(layer, hidden, rope)
        return self.vlm.model.lm_head(self.vlm.decoder.norm(hidden[:, -last:])).float()

    def _layer(self, layer: int, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        mask = attention_mask(self.vlm.decoder.config._attn_implementation, self._mask(layer), hidden)
        return self.vlm.decoder.layers[layer](
            hidden, attention_mask=mask, use_cache=True, position_embeddings=rope, **{CACHE: self.cache}
        )

    def _mask(self, layer: int) -> Tensor:
        """Where layer ``layer`` has a token: (B, L), the prompt and what was written since."""
        return torch.cat([self.held[layer][self.rows], self.mask[:, self.columns :].to(self.held[layer].dtype)], 1)

    def _held(self, past: list[int], new: list[int]) -> Tensor:
        """Rows of [padding | past | padding | new] -> (B, L) bool."""
        left, right = torch.arange(max(past)), torch.arange(max(new))
        cached, fresh = torch.tensor(past)[:, None], torch.tensor(new)[:, None]
        return torch.cat([left >= max(past) - cached, right >= max(new) - fresh], 1).to(self.vlm.device)

    def _padded(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        """-> hidden (B, L, D) and positions (3, B, L), padded on the left."""
        length = max(len(c.embeds) for c in chunks)
        hidden = chunks[0].embeds.new_zeros((len(chunks), length, chunks[0].embeds.shape[1]))
        positions = chunks[0].positions.new_zeros((3, len(chunks), length))
        for b, c in enumerate(chunks):
            hidden[b, length - len(c.embeds) :] = c.embeds
            positions[:, b, length - len(c.embeds) :] = c.positions
        return hidden, positions

    def _ask(self, rope: tuple[Tensor, Tensor], module: nn.Module, args: tuple, made: Tensor) -> None:
        """Keep the raters' queries as a layer makes them, (B, L, H * d), turned to their places: (R, H, d) a row."""
        at = self.asked
        cos, sin = (t[at][:, None] for t in rope)
        q = made[at].unflatten(-1, (-1, cos.shape[-1]))
        low, high = q.chunk(2, -1)
        q = torch.addcmul(q * cos, torch.cat([-high, low], -1), sin)
        self.queries = q.split([len(r) for r in self.raters])

    def _rows(self, layer: int, b: int, new: int, rope: tuple[Tensor, Tensor], span: Span) -> AttentionRows:
        """The raters' attention on an image in ``layer``, among the ``new`` tokens of row ``b``; rope: cosines and sines there."""
        past, left = self.past[layer][b], max(self.past[layer])
        keys = self.cache.layers[layer].keys[b]  # (G, padding and K, d)
        keys = keys[:, -new:] if not past else torch.cat([keys[:, left - past : left], keys[:, -new:]], 1)
        columns = slice(past + span.start, past + span.stop)
        return AttentionRows(self.queries[b].transpose(0, 1), keys, past + new + self.raters[b], columns, rope)

    def _repacked(self, layer: int) -> bool:
        return self.renumber and layer > min(self.stages)

    def _repack(self, layer: int, positions: Tensor) -> Tensor:
        """Positions that count the tokens of layer ``layer + 1`` one by one; later tokens of these layers go on from there."""
        length = torch.tensor([len(c.embeds) for c in self.chunks], device=positions.device)
        first = self.first + self.before[layer + 1]
        place = torch.arange(positions.shape[2], device=positions.device) - (positions.shape[2] - length)[:, None]  # (B, L)
        self.shifts[layer + 1 :] = first + length - self.next
        return (first[:, None] + place).clamp(min=0).expand(3, -1, -1)

    def _row(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        layers = list(enumerate(self.cache.layers))
        at = [self._mask(layer)[i].nonzero().squeeze(1) for layer, _ in layers]
        return [x.keys[i][:, at[n]] for n, x in layers], [x.values[i][:, at[n]] for n, x in layers]

    def keep(self, b: int, session: Session, written: list[int]) -> None:
        """As ``Batch.keep``, and by how much each layer's positions differ from the conversation's."""
        super().keep(b, session, written)
        session.shifts = self.shifts[:, b].tolist()


def attention_mask(implementation: str, held: Tensor, hidden: Tensor) -> Tensor | None:
    """Where there is a token (B, L) -> the mask that transformers' attention functions take for the last columns ``hidden`` (B, n, D)."""
    n, length = hidden.shape[1], held.shape[1]
    if len(held) == 1 and n == length and implementation != "eager":
        return None  # one conversation without a past has no padding, and these functions are causal by themselves
    if "flash" in implementation:
        return held
    place = torch.arange(length, device=held.device)
    query = place[length - n :, None]
    # a padding query sees itself: a row without any key is NaN in some kernels, and would spread
    allowed = (held[:, None, None] & (place <= query)) | (place == query)  # (B, 1, n, L)
    if implementation == "eager":
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill_(~allowed, torch.finfo(hidden.dtype).min)
    return allowed
