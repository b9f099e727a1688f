"""The attention function of the decoder while this package runs it: one for rows without padding, and one that lets rankings of tokens look on.

An attention function sees queries and keys after projection, query and key norms, and RoPE, whatever the family; a hook on a projection
does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface

NAME = "awares"


class AttendingRows(Protocol):
    """A batch that attends for itself, with the caches of its rows."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (1, H, T, d), keys and values (1, G, T, d) of all rows -> (1, T, H, d)."""


class AttentionModule(Protocol):
    """An attention layer of transformers, as far as it is read here."""

    layer_idx: int
    config: Any


def attend(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args,
    rows: AttendingRows | None = None,
    observer: Callable[[Tensor, Tensor], None] | None = None,
    implementation: str = "",
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of its own attention.

    rows: the batch that attends for itself. observer: is shown queries (B, H, n, d) and keys (B, G, L, d); ``implementation`` then attends.
    """
    if rows is not None:
        return rows.attend(module.layer_idx, query, key, value), None
    assert observer is not None  # a layer attends with rows or is observed
    observer(query, key)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    module.config._attn_implementation = implementation  # which some functions read
    try:
        function = AttentionInterface().get_interface(implementation, eager)
        return function(module, query, key, value, *args, **kwargs)
    finally:
        module.config._attn_implementation = NAME


@contextmanager
def own_attention(config) -> Iterator[None]:
    """Within the block the layers of the decoder with this config (and of no other) attend with ``attend``."""
    AttentionInterface.register(NAME, attend)
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before
