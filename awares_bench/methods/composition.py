"""Two pruners at once: one cuts before the decoder, the other what is left, inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import options
from .pruner import Pruner

DEPTH = 28
"""Decoder layers of Qwen2.5-VL-7B: a pruner that cuts inside that many cuts inside any decoder."""


@dataclass(frozen=True)
class ComposedPruner(Pruner):
    """Both, in this order. ``retention`` is that of the two together: the product of their own."""

    before: Pruner = field(default_factory=Pruner)
    inside: Pruner = field(default_factory=Pruner)
    names: tuple[str, str] = ("", "")

    @property
    def members(self) -> dict[str, Pruner]:
        """The two by name."""
        return dict(zip(self.names, (self.before, self.inside), strict=True))

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # of a class elsewhere
        return tuple(dict.fromkeys([*self.before.needs, *self.inside.needs]))

    @property
    def vision_block(self) -> int:  # type: ignore[override]
        return self.before.vision_block

    @property
    def fingerprints(self) -> dict[str, str]:
        return self.before.fingerprints | self.inside.fingerprints

    def check(self, width: int) -> None:
        self.before.check(width)
        self.inside.check(width)

    def cut_layers(self, layers: int) -> dict[int, float]:
        """Those of the second; what it keeps is a share of what the first left."""
        return self.inside.cut_layers(layers) if self.inside.retention < 1 else {}

    def before_and_inside(self, layers: int) -> tuple[Pruner | None, Pruner | None]:
        both = (self.before, self.inside)
        before, inside = (part if part.retention < 1 else None for part in both)
        return before, inside


def compose(classes: Mapping[str, type[Pruner]], given: Mapping[str, Any]) -> ComposedPruner:
    """Two pruners by name, with options: ``option`` goes to each that has it, ``NAME.option`` to one.

    ``retention`` is that of both together: each keeps its square root, or what the retention given for the other leaves over.
    Raises ValueError that says which two can be composed.
    """
    parts = {}
    for name, cls in classes.items():
        own = {k: given[k] for k in options(cls) if k in given and k != "retention"}
        parts[name] = own | {k: given[f"{name}.{k}"] for k in options(cls) if f"{name}.{k}" in given}
    shares = _shares({name: own.pop("retention", None) for name, own in parts.items()}, given.get("retention"))
    made = [(name, cls(retention=shares[name], **parts[name])) for name, cls in classes.items()]
    made.sort(key=lambda item: bool(item[1].cut_layers(DEPTH)))
    (first, before), (second, inside) = made
    if bool(before.cut_layers(DEPTH)) == bool(inside.cut_layers(DEPTH)):
        where = "inside" if before.cut_layers(DEPTH) else "before"
        raise ValueError(
            f"{first} and {second} both cut {where} the decoder; compose one that cuts before it, such as visionzip, with one that cuts "
            "inside it, such as pyramiddrop"
        )
    return ComposedPruner(round(before.retention * inside.retention, 12), before, inside, (first, second))


def _shares(own: dict[str, float | None], total: float | None) -> dict[str, float]:
    """What each pruner keeps of what it is given."""
    told = {name: share for name, share in own.items() if share is not None}
    default = Pruner().retention
    for share in [*told.values(), *([] if total is None else [total])]:
        Pruner(share)  # says what is allowed
    if not told:
        return dict.fromkeys(own, (default if total is None else total) ** 0.5)
    if len(told) == 2:
        if total is not None:
            raise ValueError(f"retention is {total!r} beside one for each pruner; leave one of the three out")
        return told
    ((name, share),) = told.items()
    rest = default if total is None else total / share
    if rest > 1:
        raise ValueError(f"{name}.retention is {share!r}, less than the retention of both, {total!r}; give it at least that")
    return {other: share if other == name else rest for other in own}
