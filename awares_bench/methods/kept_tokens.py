"""Which visual tokens of a picture a pruner let through, cut by cut, and the bit masks that a record holds of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeptTokens:
    """The visual tokens of one picture that went on after one cut, by their places in the grid."""

    image: int
    """Place of the picture among those of its turn."""

    layer: int | None
    """The decoder layer after which the cut was made, from 0; None: before the first."""

    grid: tuple[int, int]
    """Rows and columns in tokens."""

    size: tuple[int, int]
    """Width and height in pixels of what the grid covers: the picture, on a larger white sheet where the processor needs one."""

    kept: tuple[int, ...]
    """Raster places of the tokens that went on, ascending; a place of several tokens stands once."""

    merged: tuple[int, ...] = ()
    """Those of ``kept`` whose features are no longer the token's own since this cut or one before: averages of several tokens."""

    run: int = 0
    """Which of the picture's runs of tokens: a tile, of families that cut pictures into tiles."""

    runs: int = 1
    """How many runs the picture has."""

    def as_dict(self) -> dict:
        """For JSON: places as bit masks in raster order, written in hexadecimal (``mask``)."""
        tokens = self.grid[0] * self.grid[1]
        told: dict[str, Any] = {"image": self.image, "layer": self.layer, "grid": list(self.grid), "size": list(self.size)}
        told |= {"kept": mask(self.kept, tokens), "merged": mask(self.merged, tokens)}
        return told | ({"run": self.run, "runs": self.runs} if self.runs > 1 else {})

    @classmethod
    def from_dict(cls, told: dict) -> KeptTokens:
        """The inverse of ``as_dict``."""
        rows, columns = told["grid"]
        kept, merged = (places(told[name], rows * columns) for name in ("kept", "merged"))
        width, height = told["size"]
        return cls(
            told["image"], told["layer"], (rows, columns), (width, height), kept, merged, told.get("run", 0), told.get("runs", 1)
        )


def mask(chosen: Iterable[int], tokens: int) -> str:
    """Places -> a bit for each of ``tokens``, the first place the highest bit of the first digit, filled up with zeros to whole digits."""
    bits = ["0"] * (-(-tokens // 4) * 4)
    for place in chosen:
        bits[place] = "1"
    return "".join(f"{int(''.join(bits[i : i + 4]), 2):x}" for i in range(0, len(bits), 4))


def places(written: str, tokens: int) -> tuple[int, ...]:
    """The inverse of ``mask``. Raises ValueError for a mask of another length."""
    if len(written) != -(-tokens // 4):
        raise ValueError(f"a mask of {tokens} tokens has {-(-tokens // 4)} digits; this one has {len(written)}")
    bits = "".join(f"{int(digit, 16):04b}" for digit in written)
    return tuple(i for i, bit in enumerate(bits) if bit == "1")
