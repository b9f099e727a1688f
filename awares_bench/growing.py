"""A key-value cache in buffers with room to the right: a token is written into it, and what is there is not copied."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens of room beside those that are known to come: steps of decoding between two copies of the cache."""


class GrowingLayer(DynamicLayer):
    """One decoder layer's keys and values, (B, H, L, D) views of buffers that are longer."""

    def __init__(self):
        super().__init__()
        self.buffers: list[Tensor] = []

    def start(self, keys: list[Tensor | None], values: list[Tensor | None], new: int) -> None:
        """Hold (H, L_b, D) of each row, padded on the left, with room for ``new`` tokens; None is a row without a past."""
        like = next(k for k in keys if k is not None)
        self.lazy_initialization(like, like)
        length = max(k.shape[1] for k in keys if k is not None)
        self.buffers = [like.new_zeros((len(keys), like.shape[0], length + new + ROOM, like.shape[2])) for _ in range(2)]
        for buffer, rows in zip(self.buffers, (keys, values), strict=True):
            for b, row in enumerate(rows):
                if row is not None:
                    buffer[b, :, length - row.shape[1] : length] = row
        self._show(length)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """As ``DynamicLayer.update``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, states = self.get_seq_length(), (key_states, value_states)
        after = before + key_states.shape[2]
        if not self.buffers or after > self.buffers[0].shape[2]:
            self.buffers = [s.new_empty((*s.shape[:2], after + ROOM, s.shape[3])) for s in states]
            if before:
                self.buffers[0][:, :, :before], self.buffers[1][:, :, :before] = self.keys, self.values
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[:, :, before:after] = new
        self._show(after)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        length, self.buffers = self.get_seq_length(), [b[indices] for b in self.buffers]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (b[:, :, :length] for b in self.buffers)
