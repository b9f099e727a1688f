"""A pruner decides which visual tokens survive. It is a function of one image's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from .options import check_choices

if TYPE_CHECKING:
    from torch import Tensor


class DecoderAttention(Protocol):
    """Attention of R rating text tokens on an image's V tokens in one decoder layer of H heads, computed when asked for."""

    @property
    def keys(self) -> Tensor:
        """Keys of the layer after RoPE, of all tokens before the cut: (G, K, d) of G key heads."""

    @property
    def columns(self) -> slice:
        """The V places of the image's tokens among those K; the text after the last image ends there."""

    def final_norm(self, states: Tensor) -> Tensor:
        """The decoder's norm after its last layer: (..., D) -> (..., D)."""

    def per_head(self, divisor: Tensor | None = None) -> Tensor:
        """Mean over the raters of the attention, divided by ``divisor`` (R, V) if given: (H, V) in float32."""

    def rotary_kernel(self) -> Tensor:
        """Inner product of all-ones vectors rotated to each rater's and each token's place, over sqrt(head width): (R, V)."""


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image as a pruner sees them, in raster order."""

    features: Tensor
    """(V, D) what enters the decoder; at a cut between decoder layers the hidden states there."""

    grid: tuple[int, int]
    """Rows and columns of the whole image in tokens."""

    places: Tensor | None = None
    """(V,) raster place of each token in the grid: all places before the first cut."""

    attention: Tensor | None = None
    """(V,) attention received in the pruner's vision block, mean over heads, queries and a token's patches; float32."""

    vision_keys: Tensor | None = None
    """(V, d) key in that block, mean over heads and a token's patches; float32."""

    decoder_attention: DecoderAttention | None = None
    """Attention of the raters on these tokens, at a cut between decoder layers."""

    seed: int = 0
    """A number that the picture alone decides."""

    deepstack: Tensor | None = None
    """(N, V, D) vision features that are added to the tokens after the first N decoder layers (Qwen3-VL's DeepStack), before the first cut.
    They are cut by the same places; where tokens are merged, those of the one whose position is taken go on."""

    tower_order: Tensor | None = None
    """(V,) raster places in the order in which the vision tower holds the tokens; with attention or keys, before the first cut."""

    middle_attention: Tensor | None = None
    """(V,) attention received, as ``attention``, in the middle one of the vision blocks that see the whole image."""

    unmerged: Tensor | None = None
    """(V, d) what leaves the last vision block, before the projector: mean over a token's patches."""

    text: Tensor | None = None
    """(T, D) the tokens after the prompt's last image, embedded; at a cut between decoder layers their hidden states there."""

    question: slice | None = None
    """Which of ``text`` the user wrote, where a pruner needs to know; else all."""

    @property
    def words(self) -> Tensor:
        """(M, D) the user's question; all of ``text`` where nothing of it is the user's."""
        assert self.text is not None  # every cut gives it
        asked = self.text if self.question is None else self.text[self.question]
        return asked if len(asked) else self.text


OF_THE_TOWER = ("attention", "vision_keys", "middle_attention", "unmerged")
NEEDS = (*OF_THE_TOWER, "question", "seed")
"""What a pruner may ask for in its ``needs``; the first are read inside the vision tower while it runs."""


@dataclass(frozen=True)
class ReleasedQuirks:
    """What released code does to positions beside choosing tokens. The defaults do nothing; see ``quirks_of``."""

    renumber_positions: bool = False
    """The tokens after a cut between decoder layers get the positions 0, 1, 2, ... (SparseVLM v1.5, PyramidDrop)."""

    span_offset: int = 0
    """Tokens by which the cut is moved against the image (HoloV)."""

    unrotated: bool = False
    """Queries and keys of the next layer are compared without their rotary embedding (VScan's PyramidDrop)."""


@dataclass(frozen=True)
class Pruner:
    """Decides which visual tokens survive, between encoder and decoder or inside it. A subclass is a frozen dataclass.

    It writes one of ``score``, ``select`` or ``reduce``, each of which defaults to the one before it, and sees one image at
    a time; batches, several images, positions and caches are the driver's. Kept tokens keep their M-RoPE positions and text
    is never cut. At retention 1 the driver leaves the pruner out.

    retention: share of an image's visual tokens to keep, in (0, 1].
    """

    retention: float = 0.5

    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of ``VisualTokens`` to be computed: any of ``NEEDS``. ``decoder_attention`` comes with a cut between layers."""

    vision_block: ClassVar[int] = -1
    """The block that attention and keys are taken from."""

    looks_ahead: ClassVar[bool] = False
    """At a cut between decoder layers, whether ``decoder_attention`` is that of the layer after the cut, on the tokens as they are before it,
    and not that of the layer which has just run."""

    def score(self, image: VisualTokens) -> Tensor:
        """-> (V,) scores; the highest are kept, the first of equals."""
        raise NotImplementedError(f"{type(self).__name__} must write score, select or reduce")

    def select(self, image: VisualTokens, n: int) -> Tensor:
        """-> (n,) ascending places of the kept tokens in ``image.features``."""
        return self.score(image).argsort(descending=True, stable=True)[:n].sort().values

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        """-> (features (m, D), indices (m,)): what goes on, and whose position each takes; m is n, or close to it when merging."""
        chosen = self.select(image, n)
        return image.features[chosen], chosen

    def tokens_to_keep(self, visual: int, share: float) -> int:
        """Tokens to keep of an image of ``visual``: the share rounded down, and at least one."""
        return max(1, int(share * visual + 1e-9))

    def cut_layers(self, layers: int) -> dict[int, float]:
        """Decoder layer after which to cut (from 0) -> share of the image's tokens that go on. Empty: cut before the first layer."""
        return {}

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """Text tokens whose attention is asked for at the stages: visual (V, D) and text after it (T, D), embedded -> (R,)."""
        return visual.new_tensor([len(text) - 1], dtype=int)  # type: ignore[arg-type]  # torch takes int, its annotation does not

    def check(self, width: int) -> None:
        """Raise ValueError where it cannot run on features of this width; asked before the first document."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Weights of its own: option -> digest, for the record."""
        return {}

    def before_and_inside(self, layers: int) -> tuple[Pruner | None, Pruner | None]:
        """What cuts before a decoder of so many layers, and what cuts inside it."""
        return (None, self) if self.cut_layers(layers) else (self, None)

    def __post_init__(self) -> None:
        if isinstance(self.retention, bool) or not isinstance(self.retention, (int, float)) or not 0 < self.retention <= 1:
            raise ValueError(f"retention is {self.retention!r}; it must be a number above 0 and at most 1, such as 0.5")
        check_choices(self)


def quirks_of(pruner: Pruner) -> ReleasedQuirks:
    """The quirks that a pruner reproduces: those of its property ``quirks``, which SparseVLM, HoloV and PyramidDrop have."""
    return getattr(pruner, "quirks", ReleasedQuirks())
