"""A pruner decides which visual tokens survive. It is a function of one image's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .options import check_choices

if TYPE_CHECKING:
    from torch import Tensor

    from awares_bench.models.attention_scores import AttentionRows


@dataclass(frozen=True)
class Visual:
    """The visual tokens of one image as a pruner sees them, in raster order.

    features:  (V, D) what enters the decoder, or at a decoder stage the hidden states there
    grid:      rows and columns of the whole image in tokens
    places:    (V,) raster place of each token in the grid: all places before the first cut
    attention: (V,) attention received in the pruner's vision block, mean over heads, queries and a token's patches; float32
    metric:    (V, d) key in that block, mean over heads and patches; float32
    rows:      attention of the raters on these tokens, at a decoder stage (``attention_scores.AttentionRows``)
    seed:      a number that the picture alone decides
    """

    features: Tensor
    grid: tuple[int, int]
    places: Tensor | None = None
    attention: Tensor | None = None
    metric: Tensor | None = None
    rows: AttentionRows | None = None
    seed: int = 0


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
    """Fields of ``Visual`` to be computed: any of attention, metric, seed. ``rows`` comes with a decoder stage."""

    vision_block: ClassVar[int] = -1
    """The block that attention and metric are taken from."""

    repacks: ClassVar[bool] = False
    """Give the tokens after a decoder stage the positions 0, 1, 2, ...; only to reproduce released code."""

    offset: ClassVar[int] = 0
    """Tokens by which the cut is moved against the image; only to reproduce released code."""

    def score(self, image: Visual) -> Tensor:
        """-> (V,) scores; the highest are kept, the first of equals."""
        raise NotImplementedError(f"{type(self).__name__} must write score, select or reduce")

    def select(self, image: Visual, n: int) -> Tensor:
        """-> (n,) ascending places of the kept tokens in ``image.features``."""
        return self.score(image).argsort(descending=True, stable=True)[:n].sort().values

    def reduce(self, image: Visual, n: int) -> tuple[Tensor, Tensor]:
        """-> (features (m, D), indices (m,)): what goes on, and whose position each takes; m is n, or close to it when merging."""
        chosen = self.select(image, n)
        return image.features[chosen], chosen

    def budget(self, visual: int, share: float) -> int:
        """Tokens to keep of an image of ``visual``: the share rounded down, and at least one."""
        return max(1, int(share * visual + 1e-9))

    def stages(self, layers: int) -> dict[int, float]:
        """Decoder layer after which to cut (from 0) -> share of the image's tokens that go on. Empty: cut before the first layer."""
        return {}

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """Text tokens whose attention is asked for at the stages: visual (V, D) and text after it (T, D), embedded -> (R,)."""
        return visual.new_tensor([len(text) - 1], dtype=int)

    def __post_init__(self):
        if isinstance(self.retention, bool) or not isinstance(self.retention, (int, float)) or not 0 < self.retention <= 1:
            raise ValueError(f"retention is {self.retention!r}; it must be a number above 0 and at most 1, such as 0.5")
        check_choices(self)
