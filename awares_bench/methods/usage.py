"""What was spent: visual tokens, text tokens, output tokens and seconds. Ratios are taken once, at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Usage:
    """What one turn, or several added with ``+``, cost. Seconds are wall-clock; in a batch of several, the batch's, shared out by tokens."""

    encoded: int = 0
    """Merged visual tokens that left the vision tower."""

    prefill: float = 0.0
    """Visual tokens entering each decoder layer, averaged over the layers."""

    text: int = 0
    """Prompt tokens that are not visual."""

    output: int = 0
    """Tokens the model wrote."""

    preprocess_seconds: float = 0.0
    """Pictures to patches, text to tokens."""

    encode_seconds: float = 0.0
    """The vision tower."""

    prefill_seconds: float = 0.0
    """The decoder over the prompt."""

    decode_seconds: float = 0.0
    """The decoder over what it writes."""

    passes: int = 0
    """Forward passes of the decoder that wrote the output, after the prefill; tokens fixed by a grammar share one."""

    aux_encoded: int = 0
    """Of an auxiliary model (a cropper, a proxy): visual tokens out of its tower. Never part of the retained token ratio."""

    aux_decoder: float = 0.0
    """Of an auxiliary model: all tokens through its decoder, averaged over its layers."""

    aux_seconds: float = 0.0
    """Of an auxiliary model: seconds of every phase."""

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
