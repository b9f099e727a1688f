"""What was spent: visual tokens, text tokens, output tokens and seconds. Ratios are taken once, at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Usage:
    """What one turn, or several added with ``+``, cost.

    encoded: merged visual tokens that left the vision tower
    prefill: visual tokens entering each decoder layer, averaged over the layers
    text:    prompt tokens that are not visual
    output:  tokens the model wrote
    passes:  forward passes of the decoder that wrote them, after the prefill; tokens fixed by a grammar share one
    *_seconds: wall-clock per phase; in a batch of several, the batch's time shared out by tokens
    aux_*:   the same of an auxiliary model (a cropper, a proxy): visual tokens out of its tower, all tokens through its
             decoder (averaged over its layers), and its seconds of every phase. Never part of the retained token ratio
    """

    encoded: int = 0
    prefill: float = 0.0
    text: int = 0
    output: int = 0
    preprocess_seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    passes: int = 0
    aux_encoded: int = 0
    aux_decoder: float = 0.0
    aux_seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seconds(self) -> float:
        """Wall-clock of all phases, auxiliary models included."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name.endswith("_seconds"))

    def as_auxiliary(self) -> Usage:
        """The same cost in the columns of an auxiliary model."""
        return Usage(aux_encoded=self.encoded, aux_decoder=self.prefill + self.text + self.output, aux_seconds=self.seconds)

    def rtr(self, full_tokens: int) -> float | None:
        """Retained token ratio: prefill tokens over the same images' full-resolution tokens (paper Eq. 9); None without images."""
        return self.prefill / full_tokens if full_tokens else None

    def as_dict(self) -> dict:
        return asdict(self)
