"""Batches without padding, for GPUs: prompts of all rows in one line through one attention call a layer, then a token a step for all rows,
as one CUDA graph.

The keys and values of a batch's rows lie in one block with room for replies, a slot a row, so that a step writes in place and reads all
rows in one call. A second turn copies its conversations' caches into a block of its own once: 57 kB a token at 7B, which memory of 3 TB/s
moves in 40 ns, where prefilling a token takes 15 GFLOP, 30 microseconds of a whole device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from awares_bench.models.base import moved
from awares_bench.models.prompt_chunk import PromptChunk

from .ragged_batch import RaggedBatch
from .reply_decoder import ReplyDecoder
from .session import Session
from .step_graph import StepGraph
from .varlen_attention import kernel_for, reference

ROOM = 64
"""Tokens that a block has room for beside the prompts; a longer reply moves into a larger block. Rooms are multiples of it, as kernels like
their masks."""

PLAIN_STEPS = 3
"""Steps of one token a row that a block runs from Python before the next is recorded: recording costs about two of them, so it pays where
replies are longer than a call."""


FEW = 32
"""Key heads of all rows below which a step attends by products: a fused kernel without split keys keeps as many multiprocessors busy as
there are heads, of 132. Reasoned, not measured; ``gpu-day`` measures both."""


class VarlenBatch(RaggedBatch):
    """Block of a layer: keys and values (2, B * room + 1, G, d), slot b from b * room on; the last place takes what padding writes."""

    recorder: ClassVar[Callable[..., Any]] = StepGraph
    graphs: ClassVar[bool | None] = None
    """Whether steps are recorded; None where the device is a GPU."""

    def layout(self, sessions: list[Session], chunks: list[PromptChunk]) -> None:
        self.chunks = chunks
        self.lengths = [s.length for s in sessions]
        """Tokens in each slot."""
        self.past = [list(zip(s.keys, s.values, strict=True)) for s in sessions]
        self.room = rounded(max(n + len(c.embeds) for n, c in zip(self.lengths, chunks, strict=True)) + ROOM)
        self.blocks: list[Tensor | None] = [None] * self.host.layers  # until a layer's first token
        self.finished: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # caches of rows that left the batch
        self.forget_graph()

    # ------------------------------------------------------------------ the prompts, in a line

    def open(self, lengths: list[int]) -> None:
        """Rows of ``lengths`` tokens are about to be fed: where they are written, and which keys each sees."""
        self.fed_now, device = lengths, self.host.device
        after = [n + new for n, new in zip(self.lengths, lengths, strict=True)]
        self.fresh = not any(self.lengths)  # the new keys are all there are
        slots = [b * self.room for b in range(len(after))]
        where = torch.cat([torch.arange(s + n, s + m) for s, n, m in zip(slots, self.lengths, after, strict=True)])
        read = torch.cat([torch.arange(s, s + m) for s, m in zip(slots, after, strict=True)])
        ends = torch.tensor([[0, *lengths], [0, *after]]).cumsum(1).to(torch.int32)
        self.where, self.read = moved(where, device), moved(read, device)
        self.ends_q, self.ends_k = moved(ends, device)
        self.longest = max(lengths), max(after)
        self.mask: Tensor | None = None
        self.stepping = False

    def close(self, lengths: list[int]) -> None:
        self.lengths = [n + new for n, new in zip(self.lengths, lengths, strict=True)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every row's queries on its own keys: (1, H, T, d) and twice (1, G, T, d), all rows in one line -> (1, T, H, d)."""
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast rotary embeddings leave them wider
        new = torch.stack([k[0].transpose(0, 1), v[0].transpose(0, 1)])  # (2, T, G, d)
        block = self.block(layer, new)
        block.index_copy_(1, self.where, new)
        if self.stepping:
            return self.attend_step(q, block)
        keys, values = new if self.fresh else block.index_select(1, self.read)
        queries = q[0].transpose(0, 1).contiguous()
        found = kernel_for(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3])
        kernel = found[1] if found else reference
        return kernel(queries, keys, values, self.ends_q, self.ends_k, *self.longest)[None]

    def block(self, layer: int, new: Tensor) -> Tensor:
        """The block of a layer, made at its first token with what the sessions hold of it."""
        block = self.blocks[layer]
        if block is None:
            # zeros: a key that was never written must not be NaN, since masked products are still products
            block = new.new_zeros((2, len(self.lengths) * self.room + 1, *new.shape[2:]))
            for b, pairs in enumerate(self.past):
                if pairs:
                    slot = block[:, b * self.room : b * self.room + self.lengths[b]]
                    slot[0].copy_(pairs[layer][0].transpose(0, 1))
                    slot[1].copy_(pairs[layer][1].transpose(0, 1))
            self.blocks[layer] = block
        return block

    # ------------------------------------------------------------------ replies, a step at a time

    def step(self, inputs: list[list[int]]) -> Tensor:
        width, device, pad = max(map(len, inputs)), self.host.device, self.host.tokenizer.pad_token_id
        if max(self.lengths) + width > self.room:
            self.move(list(range(len(self.rows))), rounded(max(self.lengths) + width + ROOM))
        self.fed_now = [len(f) for f in inputs]
        tokens = moved(torch.tensor([[pad] * (width - len(f)) + f for f in inputs]), device)
        starts = [self.next_position[b] + self.fed[b] for b in self.rows]
        counts = moved(torch.tensor([self.lengths, self.fed_now, starts]), device)
        scores = self.advance(tokens, counts) if width > 1 or not self._records() else self._replay(tokens, counts)
        self.close(self.fed_now)
        return scores

    def advance(self, tokens: Tensor, counts: Tensor, longest: int | None = None) -> Tensor:
        """Feed token ids (B, w), padded on the left -> scores (B, w, vocabulary). Decided by tensors alone, so that it can be recorded.

        counts (3, B): tokens in each slot, tokens fed to it, position of the first of them. longest: keys to look at, of every slot; None
        for all that are there.
        """
        (batch, width), device = tokens.shape, tokens.device
        keys = longest or max(self.lengths) + width
        held, fed, starts = counts
        place = torch.arange(width, device=device) - (width - fed)[:, None]  # (B, w), below 0 for padding
        slots = torch.arange(batch, device=device)[:, None] * self.room
        self.where = torch.where(place < 0, batch * self.room, slots + held[:, None] + place).flatten()
        # padding sees one key: a softmax over nothing is not a number
        seen = (held[:, None] + place + 1).clamp(min=1)
        self.mask = torch.arange(keys, device=device) < seen[:, :, None]  # (B, w, keys)
        self.stepping, self.keys = True, keys
        positions = (starts[:, None] + place.clamp(min=0)).flatten().expand(self.host.position_axes, 1, -1)
        hidden = self.through_layers(self.host.embed(tokens.flatten()), positions)
        return self.host.logits(hidden).unflatten(0, (batch, width))

    def attend_step(self, q: Tensor, block: Tensor) -> Tensor:
        """Queries (1, H, B * w, d) on the slots of a block -> (1, B * w, H, d). Heads that share a key head are its queries: no key is
        copied, and kernels that know no shared heads do."""
        assert self.mask is not None
        batch, width, _ = self.mask.shape
        groups, size = block.shape[2:]
        # (B, slot, G, d) -> (B, G, keys, d), without a copy
        slots = block[:, :-1].unflatten(1, (batch, self.room))[:, :, : self.keys].transpose(2, 3)
        shared = q.shape[1] // groups
        queries = q[0].unflatten(0, (groups, shared)).unflatten(2, (batch, width)).permute(2, 0, 1, 3, 4)  # (B, G, shared, w, d)
        mask = self.mask[:, None, None].expand(-1, 1, shared, -1, -1).flatten(2, 3)  # (B, 1, shared * w, keys)
        attend = products if batch * groups < FEW else scaled_dot_product_attention
        out = attend(queries.flatten(2, 3), slots[0], slots[1], mask)
        return out.unflatten(2, (shared, width)).permute(0, 3, 1, 2, 4).reshape(1, batch * width, -1, size)

    # ------------------------------------------------------------------ recorded steps

    def forget_graph(self) -> None:
        """The block is another one: what was recorded of it is void."""
        self.graph: Any = None
        self.plain = 0

    def _records(self) -> bool:
        wanted = self.host.device.type == "cuda" if self.graphs is None else self.graphs
        # what hooks onto a layer would see the recording alone
        if not wanted or torch.is_grad_enabled() or self.host.decoder.layers[0]._forward_pre_hooks:
            return False
        self.plain += 1
        return self.plain > PLAIN_STEPS

    def _replay(self, tokens: Tensor, counts: Tensor) -> Tensor:
        if self.graph is None:
            try:
                self.graph = type(self).recorder(
                    lambda tokens, counts: self.advance(tokens, counts, longest=self.room), [tokens, counts]
                )
            except RuntimeError as error:
                type(self).graphs = False
                warnings.warn(f"decoding goes on without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
                return self.advance(tokens, counts)
        return self.graph(tokens, counts)

    # ------------------------------------------------------------------ rows that leave, drafts that fail, caches that go on

    def move(self, slots: list[int], room: int) -> None:
        """Keep these slots, in this order, in a block with that room; a slot may come several times."""
        used = min(self.room, room)
        for layer, block in enumerate(self.blocks):
            if block is None:
                continue
            larger = block.new_zeros((2, len(slots) * room + 1, *block.shape[2:]))
            old, new = (b[:, :-1].unflatten(1, (-1, r)) for b, r in ((block, self.room), (larger, room)))
            new[:, :, :used] = old[:, slots, :used]
            self.blocks[layer] = larger
        self.lengths, self.room = [self.lengths[s] for s in slots], room
        self.forget_graph()

    def drop_finished(self, active: list[int], replies: list[ReplyDecoder]) -> None:
        """Once they are half of the batch: the others move into a smaller block."""
        if len(active) > len(self.rows) // 2:
            return
        for slot, b in enumerate(self.rows):
            if b not in active and not replies[b].request.turn.is_final:
                self.finished[b] = self.cache_of(slot)
        self.move([self.rows.index(b) for b in active], self.room)
        self.rows = active

    def reject_drafts(self, inputs: list[list[int]], accepted: list[int]) -> None:
        """What is beyond is written over."""
        self.lengths = [n - (len(f) - kept) for n, f, kept in zip(self.lengths, inputs, accepted, strict=True)]

    def expand(self, copies: list[int]) -> None:
        self.move(copies, self.room)

    def cache_of(self, slot: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of a slot, (G, L, d) per layer, without the rest of the block."""
        rows = [b[:, slot * self.room :][:, : self.lengths[slot]].clone().transpose(1, 2) for b in self.blocks if b is not None]
        return [pair[0] for pair in rows], [pair[1] for pair in rows]

    def caches_to(self, request: int, session: Session) -> None:
        done = self.finished.pop(request, None)
        session.keys, session.values = done or self.cache_of(self.rows.index(request))
        session.storage = []


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in plain products, in float32: queries (B, G, n, d) on (B, G, K, d), mask (B, 1, n or 1, K) -> (B, G, n, d)."""
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def rounded(tokens: int) -> int:
    """Up to the next multiple of ``ROOM``."""
    return -(-tokens // ROOM) * ROOM
