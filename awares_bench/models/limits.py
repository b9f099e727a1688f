"""How small and how large a picture may be when a processor has resized it: the one place of these numbers, and sets of them by name.

Papers and toolkits set the two limits differently, and with them the number of visual tokens that a full picture costs: 391, 391 and 1,302
for one of 640 x 480 under ``hf``, ``lmms-eval`` and ``vlmevalkit``. Retained token ratios under different limits have different
denominators and belong into different tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

OWN = "hf"
"""The set that every family has: the limits of its released processors."""


def areas(side: int, least: int, most: int) -> tuple[int, int]:
    """Limits in visual tokens of ``side`` x ``side`` pixels -> in pixels."""
    return least * side * side, most * side * side


RELEASED = areas(28, 4, 16384)
"""Of the released Qwen2-VL and Qwen2.5-VL processors (``preprocessor_config.json``): 3,136 to 12,845,056 pixels."""


@dataclass(frozen=True)
class NamedLimits:
    """Limits that somebody measured under."""

    name: str

    families: tuple[str, ...]
    """``config.model_type`` of the checkpoints that the source states them for; empty for every one."""

    pixels: tuple[int, int] | None
    """Fewest and most pixels of a picture; None for those of the checkpoint's family."""

    source: str
    """Where they stand, and what for."""


QWEN2_5, QWEN3 = ("qwen2_5_vl",), ("qwen3_vl", "qwen3_vl_moe")

NAMED = (
    NamedLimits(OWN, (), None, "the released processors of the checkpoint's family"),
    NamedLimits(
        "lmms-eval",
        (*QWEN2_5, *QWEN3),
        areas(28, 256, 2048),
        "lmms-eval 0.7.3, `models/simple/qwen2_5_vl.py` and `qwen3_vl.py`; it enlarges half-size views, so only for full-image rows. Its chat "
        "`qwen3_vl` does not apply them to pictures",
    ),
    NamedLimits(
        "lmms-eval-vllm",
        QWEN2_5,
        (28, 2048 * 28 * 28),
        "lmms-eval 0.7.3, `models/chat/vllm.py`, which passes its least side, 28, as the least area: no lower limit in effect",
    ),
    NamedLimits("lmms-eval-qwen2", ("qwen2_vl",), areas(28, 4, 768), "lmms-eval 0.7.3, `models/simple/qwen2_vl.py`"),
    NamedLimits(
        "lmms-eval-interleave",
        QWEN2_5,
        areas(28, 256, 256),
        "lmms-eval 0.7.3, `models/simple/qwen2_5_vl_interleave.py`: every picture is 256 tokens",
    ),
    NamedLimits(
        "vlmevalkit",
        ("qwen2_vl", *QWEN2_5),
        areas(28, 1280, 16384),
        "VLMEvalKit e8e78f0, `vlmeval/config.py`: the rows of the OpenCompass leaderboard but OCRBench",
    ),
    NamedLimits("vlmevalkit", QWEN3, None, "VLMEvalKit e8e78f0 sets none for Qwen3-VL: the processor's own"),
    NamedLimits(
        "vlmevalkit-ocrbench",
        ("qwen2_vl", *QWEN2_5),
        areas(28, 100, 16384),
        "VLMEvalKit e8e78f0, `vlm/qwen2_vl/model.py`: OCRBench",
    ),
    NamedLimits("thyme", QWEN2_5, areas(28, 4, 6800), "Thyme's fork of VLMEvalKit, `vlmeval/config.py`: its table"),
    NamedLimits(
        "angelslim",
        QWEN2_5,
        areas(28, 256, 16384),
        "AngelSlim 67394ce, `token_compressor/utils/eval_utils.py`: its pruning table",
    ),
    NamedLimits(
        "awares-adapter",
        QWEN2_5,
        areas(28, 32, 2048),
        "AwaRes 2121cde, `lmms_eval/qwen2_5_vl_awares.py`: the authors' released numbers",
    ),
    NamedLimits(
        "pixel-reasoner", QWEN2_5, areas(28, 512, 5120), "Pixel Reasoner, README and example scripts: that method's checkpoints"
    ),
    NamedLimits("qwen-advice", ("qwen2_vl", *QWEN2_5), areas(28, 256, 1280), "Qwen's model cards, an example of a budget"),
    NamedLimits("qwen-advice", QWEN3, areas(32, 256, 1280), "Qwen3-VL, README, an example of a budget"),
    *(
        NamedLimits(name, QWEN2_5, RELEASED, f"{title}: the released processor's; the method sizes its own views")
        for name, title in {
            "visionthink": "VisionThink",
            "adaptvision": "AdaptVision",
            "ergo": "ERGO",
            "mini-o3": "Mini-o3",
            "deepeyes": "DeepEyes",
            "chain-of-focus": "Chain-of-Focus",
        }.items()
    ),
)

NAMES = tuple(dict.fromkeys(limits.name for limits in NAMED))
"""What the option ``limits`` may be."""


@dataclass(frozen=True)
class Limits:
    """What was asked for: a set by its name, and numbers in its place."""

    name: str | None = None
    """None: ``OWN``."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    @overload
    def resolve(self, family: str, own: tuple[int, int]) -> tuple[tuple[int, int], str]: ...

    @overload
    def resolve(self, family: str, own: tuple[int, int] | None) -> tuple[tuple[int, int] | None, str]: ...

    def resolve(self, family: str, own: tuple[int, int] | None) -> tuple[tuple[int, int] | None, str]:
        """-> fewest and most pixels of a picture, and what a record calls them.

        family: ``config.model_type`` of the checkpoint. own: limits of its released processors; None where its processor has none in
        pixels, and then none are returned. Raises ValueError for a set that is not known or not of this family, and for numbers
        that cannot be.
        """
        name = self.name or OWN
        asked = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        given = {k: v for k, v in asked.items() if v is not None}
        pixels = _of_family(name, family).pixels or own
        if pixels is None:
            if given:
                raise ValueError(
                    f"{next(iter(given))} is given, and the picture processor of this {family} checkpoint has no limits in pixels; leave it out"
                )
            return None, name
        least, most = (given.get(key, value) for key, value in zip(("min_pixels", "max_pixels"), pixels, strict=True))
        if not 0 < least <= most:
            raise ValueError(f"need 0 < min_pixels <= max_pixels; got {least} and {most}")
        others = [f"{k}={v}" for k, v, said in zip(("min_pixels", "max_pixels"), (least, most), pixels, strict=True) if v != said]
        return (least, most), " ".join([name, *others])


def _of_family(name: str, family: str) -> NamedLimits:
    rows = [row for row in NAMED if row.name == name]
    if not rows:
        raise ValueError(f"limits is {name!r}; allowed: {', '.join(NAMES)}")
    found = next((row for row in rows if not row.families or family in row.families), None)
    if found is None:
        known = ", ".join(f for row in rows for f in row.families)
        raise ValueError(
            f"limits={name} is stated for {known}, and this checkpoint is a {family}; pass limits={OWN}, or min_pixels and max_pixels"
        )
    return found
