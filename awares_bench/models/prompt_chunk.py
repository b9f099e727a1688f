"""A conversation's new tokens, the images among them, and the cut that a pruner makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awares_bench.methods.pruner import OF_THE_TOWER, DecoderAttention, Pruner, VisualTokens, quirks_of


@dataclass(frozen=True)
class ImageSpan:
    """A run of visual tokens among a chunk's tokens."""

    start: int

    visual: VisualTokens
    """What pruners may see of it, kept in step with the cuts."""

    full: int
    """Tokens that enter the decoder: what the shares of cuts inside it are of."""

    cuts: tuple[tuple[int | None, Tensor, Tensor], ...] = ()
    """Where cuts are noted: (decoder layer, raster places (m,) of what went on, whether each is no longer the token's own (m,))."""

    @property
    def stop(self) -> int:
        return self.start + len(self.visual.features)


@dataclass(frozen=True)
class PromptChunk:
    """The tokens that a turn adds to a conversation, ready for the decoder."""

    embeds: Tensor
    """(L, D)"""

    positions: Tensor
    """(axes, L)"""

    next_position: int
    """The position that follows the unpruned chunk."""

    spans: tuple[ImageSpan, ...] = ()
    """Its runs of visual tokens, in order."""

    deepstack: Tensor | None = None
    """(N, L, D) what is added after the first N decoder layers (``VisualTokens.deepstack``), 0 at text; None for nothing."""

    question: slice | None = None
    """Of the tokens after the last image, those that the user wrote; all where nobody asked."""

    @property
    def visual(self) -> int:
        """Visual tokens in the chunk."""
        return sum(len(s.visual.features) for s in self.spans)

    def cut(
        self,
        pruner: Pruner,
        share: float,
        attention: Callable[[ImageSpan], DecoderAttention | None] | None = None,
        layer: int | None = None,
        noted: bool = False,
    ) -> PromptChunk:
        """The chunk with every image reduced to its share; ``attention`` gives the attention on an image between decoder layers.

        layer: the decoder layer after which it is cut. noted: keep in ``ImageSpan.cuts`` which tokens went on.
        """
        embeds, positions, deepstack, spans, at, length = [], [], [], [], 0, 0
        text = self.embeds[self.spans[-1].stop :] if self.spans else None
        offset = quirks_of(pruner).span_offset
        for span in self.spans:
            start, stop = span.start + offset, span.stop + offset
            rows = attention(span) if attention else span.visual.decoder_attention
            image = replace(span.visual, features=self.embeds[start:stop], decoder_attention=rows, text=text)
            image = replace(image, question=self.question)
            n = min(pruner.tokens_to_keep(span.full, share), stop - start)
            features, chosen = pruner.reduce(image, n)
            # the text before the image stays as it is; each token that goes on takes the position of one that was chosen
            embeds += [self.embeds[at:start], features.to(self.embeds.dtype)]
            positions += [self.positions[:, at:start], self.positions[:, start:stop][:, chosen]]
            if self.deepstack is not None:
                deepstack += [self.deepstack[:, at:start], self.deepstack[:, start:stop][:, chosen]]
            length += start - at
            # what a cut before the decoder leaves is the whole for those inside
            full = span.full if attention else len(features)
            cuts = (*span.cuts, (layer, *_noted(image, features, chosen, offset))) if noted else span.cuts
            spans.append(ImageSpan(length - offset, _kept(image, features, chosen), full, cuts))
            length, at = length + len(features), stop
        kept, places = torch.cat([*embeds, self.embeds[at:]]), torch.cat([*positions, self.positions[:, at:]], 1)
        added = None if self.deepstack is None else torch.cat([*deepstack, self.deepstack[:, at:]], 1)
        return PromptChunk(kept, places, self.next_position, tuple(spans), added, self.question)


def _noted(image: VisualTokens, features: Tensor, chosen: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Raster places of what goes on, and whether each is no longer the token's own. What is no token of the image is left out."""
    count = len(image.features)
    places = torch.arange(count, device=chosen.device) if image.places is None else image.places
    inside = (chosen >= 0) & (chosen + offset >= 0) & (chosen + offset < count)
    own, chosen = (features == image.features[chosen]).all(1), chosen + offset
    return places[chosen[inside]], ~own[inside]


def _kept(image: VisualTokens, features: Tensor, chosen: Tensor) -> VisualTokens:
    """What is left to be seen of an image after a cut."""
    seen = {name: getattr(image, name) for name in ("places", *OF_THE_TOWER)}
    seen = {name: None if values is None else values[chosen] for name, values in seen.items()}
    return replace(image, features=features, text=None, decoder_attention=None, tower_order=None, **seen)


def joined_deepstack(chunks: list[PromptChunk]) -> list[Tensor] | None:
    """What is added to each of several chunks, (N, L, D) each; None where nothing is added to any."""
    some = next((c.deepstack for c in chunks if c.deepstack is not None), None)
    if some is None:
        return None
    return [some.new_zeros((len(some), *c.embeds.shape)) if c.deepstack is None else c.deepstack for c in chunks]
