"""A trained scorer of visual tokens: the mean product of a token's query with the keys of its picture (VisionSelector's).

Four tensors, ``q_proj`` and ``k_proj`` with weight and bias, from a safetensors file, or by themselves from a whole checkpoint's: no code
beside the weights is ever run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import find

PARTS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
MARK = "importance_scorer."
"""In the names of the scorer's tensors in a whole checkpoint."""
PACKAGED = Path(__file__).parents[1] / "weights" / "nano-scorer" / "scorer.safetensors"
"""What ``scorer=nano`` stands for."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """Two linear maps: weights (H, D) and biases (H,), float32."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor

    @property
    def width(self) -> int:
        """D, the width of the features it was trained on."""
        return self.query.shape[1]

    def scores(self, features: Tensor) -> Tensor:
        """(V, D) -> (V,) in float32. The mean product is the product with the mean key, so no (V, V) matrix is made."""
        parts = [part.to(features.device) for part in (self.query, self.query_bias, self.key, self.key_bias)]
        query, query_bias, key, key_bias = parts
        mean = key @ features.mean(0, dtype=torch.float32) + key_bias  # (H,)
        direction, constant = query.T @ mean, query_bias @ mean
        return torch.cat([some.float() @ direction for some in features.split(512)]).add_(constant).div_(len(query) ** 0.5)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that any change of a weight changes."""
        state = hashlib.sha256()
        for part in (self.query, self.query_bias, self.key, self.key_bias):
            state.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
        return state.hexdigest()[:16]


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may be used in training too
def load_scorer(name: str) -> Scorer:
    """A scorer by its file, its folder or hub name; ``nano``: the one in this package, for the nano weights. Raises ValueError that says what was found instead."""
    place = PACKAGED if name == "nano" else Path(name).expanduser()
    if not place.is_file():
        place = find(name)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(str(path), "pt") as file:
                names = list(file.keys())
                alone = set(names) == set(PARTS)
                for key in names:
                    part = key.rpartition(MARK)[2] if MARK in key else key if alone else ""
                    if part in PARTS:
                        found[part] = file.get_tensor(key).float().contiguous()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} is not a safetensors file that can be read ({error}); pass scorer=FILE.safetensors"
            ) from error
    if missing := [part for part in PARTS if part not in found]:
        raise ValueError(
            f"scorer={name} holds no {missing[0]}; pass a safetensors file with {', '.join(PARTS)}, or a checkpoint with {MARK}* tensors"
        )
    scorer = Scorer(*(found[part] for part in PARTS))
    hidden, width = scorer.query.shape
    if scorer.key.shape != (hidden, width) or scorer.query_bias.shape != (hidden,) or scorer.key_bias.shape != (hidden,):
        shapes = ", ".join(f"{part} {tuple(found[part].shape)}" for part in PARTS)
        raise ValueError(f"scorer={name}: both maps must have one shape, and biases their height; found {shapes}")
    if not all(found[part].isfinite().all() for part in PARTS):
        raise ValueError(f"scorer={name} holds numbers that are not finite; load the file again from its source")
    return scorer
