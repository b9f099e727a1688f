"""Golden files: ``x.safetensors`` lies in ``tests/golden`` as ``x.safetensors.xz``, a fifth smaller. Other folders may hold it unpacked.

Packed by ``xz --lzma2=preset=9,lc=0,lp=2,pb=2``, which is for numbers of two or four bytes: neighbours are told by their place in a word.
"""

from __future__ import annotations

import lzma
import shutil
import tempfile
from functools import cache
from pathlib import Path

PACKED = ".xz"


@cache
def _room() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="golden-")


def named(folder: Path, pattern: str) -> list[Path]:
    """The files ``pattern`` (without ``.xz``) of a folder, packed or not, by their plain names."""
    return sorted({p.with_suffix("") if p.suffix == PACKED else p for s in ("", PACKED) for p in folder.glob(pattern + s)})


@cache
def plain(path: Path) -> Path:
    """A golden file by its plain name -> where it lies unpacked: itself, or a copy that lasts as long as the process."""
    packed = path.with_name(path.name + PACKED)
    if path.exists() or not packed.exists():
        return path
    copy = Path(_room().name) / path.parent.name / path.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(lzma.decompress(packed.read_bytes()))
    return copy


def checkpoint(folder: Path) -> Path:
    """A golden checkpoint -> a folder that transformers loads: itself, or a copy."""
    weights = plain(folder / "model.safetensors")
    if weights.parent != folder:
        shutil.copy(folder / "config.json", weights.parent)
    return weights.parent
