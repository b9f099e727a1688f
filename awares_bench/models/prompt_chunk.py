"""Where pruners are applied: a conversation's new tokens, the images among them, and the cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awares_bench.methods.pruner import Pruner, VisualTokens, quirks_of

from .attention_scores import AttentionRows, Probe, raster_order, window_order


@dataclass(frozen=True)
class Span:
    """An image among a chunk's tokens. visual: what pruners may see of it, kept in step with the cuts; full: tokens before them."""

    start: int
    visual: VisualTokens
    full: int

    @property
    def stop(self) -> int:
        return self.start + len(self.visual.features)


@dataclass(frozen=True)
class Chunk:
    """The tokens that a turn adds to a conversation, ready for the decoder.

    embeds: (L, D); positions: (3, L) M-RoPE; after: the position that follows the unpruned chunk; spans: its images in order.
    """

    embeds: Tensor
    positions: Tensor
    after: int
    spans: tuple[Span, ...] = ()

    @property
    def visual(self) -> int:
        """Visual tokens in the chunk."""
        return sum(len(s.visual.features) for s in self.spans)

    def cut(self, pruner: Pruner, share: float, rows: Callable[[Span], AttentionRows | None] | None = None) -> Chunk:
        """The chunk with every image reduced to its share; ``rows`` gives the attention on an image at a decoder stage."""
        embeds, positions, spans, at, length = [], [], [], 0, 0
        offset = quirks_of(pruner).span_offset
        for span in self.spans:
            start, stop = span.start + offset, span.stop + offset
            seen = span.visual
            attention = seen.decoder_attention if rows is None else rows(span)
            image = replace(seen, features=self.embeds[start:stop], decoder_attention=attention)
            n = min(pruner.tokens_to_keep(span.full, share), stop - start)
            features, chosen = pruner.reduce(image, n)
            embeds += [self.embeds[at:start], features.to(self.embeds.dtype)]
            positions += [self.positions[:, at:start], self.positions[:, start:stop][:, chosen]]
            length += start - at
            spans.append(Span(length - offset, _kept(image, features, chosen), span.full))
            length, at = length + len(features), stop
        embeds, positions = torch.cat([*embeds, self.embeds[at:]]), torch.cat([*positions, self.positions[:, at:]], 1)
        return Chunk(embeds, positions, self.after, tuple(spans))


def _kept(image: VisualTokens, features: Tensor, chosen: Tensor) -> VisualTokens:
    """What is left to be seen of an image after a cut."""
    one_each = (None if t is None else t[chosen] for t in (image.places, image.attention, image.vision_keys))
    return VisualTokens(features, image.grid, *one_each, seed=image.seed)


def look(
    features: Tensor, grids: list[tuple[int, int]], probe: Probe | None, patches: list[Tensor] | None, window: int
) -> list[VisualTokens]:
    """Merged features (V, D) of several images and what the probe holds -> one VisualTokens an image, all in raster order.

    grids: rows and columns in tokens. patches: the pixels, when a seed is wanted. window: side of an attention window in tokens.
    """
    out, start = [], 0
    for i, (rows, columns) in enumerate(grids):
        n = rows * columns
        attention = keys = order = None
        if probe is not None:
            back = raster_order(rows, columns, window, features.device)
            order = window_order(rows, columns, window, features.device)

            def raster(t: Tensor | None, start: int = start, n: int = n, back: Tensor = back) -> Tensor | None:
                if t is None:
                    return None
                group = len(t) // len(features)  # patches of a merged token
                return t[start * group : (start + n) * group].view(n, group, *t.shape[1:]).mean(1)[back]

            attention, keys = raster(probe.attention), raster(probe.metric)
        seed = zlib.crc32(patches[i].contiguous().numpy()) if patches is not None else 0
        places = torch.arange(n, device=features.device)
        out.append(
            VisualTokens(features[start : start + n], (rows, columns), places, attention, keys, seed=seed, tower_order=order)
        )
        start += n
    return out
