"""The checkpoints that travel in the package, by name."""

from __future__ import annotations

from pathlib import Path

NANO = "nano"
"""The AwaRes checkpoint that ``pretrained`` defaults to: a small Qwen2.5-VL trained by this repository's own code."""


def resolve(pretrained: str) -> str:
    """``nano``, ``nano-base`` or another name of this package -> its folder; anything else (a path, a hub name) -> itself."""
    folder = Path(__file__).parents[1] / "weights" / pretrained
    if pretrained.startswith(NANO) and "/" not in pretrained and not Path(pretrained).is_dir():
        known = sorted(p.name for p in folder.parent.iterdir() if any(p.glob("*config.json"))) if folder.parent.is_dir() else []
        if pretrained not in known:
            raise ValueError(
                f"no weights named {pretrained!r} in the package; known: {', '.join(known) or 'none'}, or pass a folder or a hub name"
            )
        return str(folder)
    return str(Path(pretrained).expanduser()) if pretrained.startswith("~") else pretrained
