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

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seconds(self) -> float:
        """Wall-clock of all phases."""
        return self.preprocess_seconds + self.encode_seconds + self.prefill_seconds + self.decode_seconds

    def rtr(self, full_tokens: int) -> float | None:
        """Retained token ratio: prefill tokens over the same images' full-resolution tokens (paper Eq. 9); None without images."""
        return self.prefill / full_tokens if full_tokens else None

    def as_dict(self) -> dict:
        return asdict(self)
