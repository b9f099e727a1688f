"""A linear gate over resolutions, on a hidden state of a proxy model; one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from awares_bench.errors import RunError


@dataclass(frozen=True)
class Gate:
    """``softmax(weight @ hidden + bias)`` over ``sizes``, K of them."""

    weight: np.ndarray
    """(K, D)."""

    bias: np.ndarray
    """(K,)."""

    sizes: tuple[int, ...]
    """K longer sides in pixels, ascending."""

    view: int
    """Longer side in pixels of the thumbnail that the gate reads."""

    depth: float
    """Share of the proxy's layers after which it reads the last token."""

    trained_on: str = ""
    """The proxy's checkpoint, for people."""

    def __post_init__(self) -> None:
        if self.weight.shape != (len(self.sizes), self.weight.shape[-1]) or self.bias.shape != (len(self.sizes),):
            raise ValueError(f"a gate over {len(self.sizes)} sizes has weights {self.weight.shape} and bias {self.bias.shape}")
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes are {self.sizes}; they must be positive and ascending")

    def probabilities(self, hidden: tuple[float, ...]) -> tuple[float, ...]:
        """(D,) -> (K,). Raises RunError when the hidden state is not of the proxy it was trained on."""
        if len(hidden) != self.weight.shape[1]:
            raise RunError(
                f"the gate reads {self.weight.shape[1]} numbers and the proxy gives {len(hidden)}; "
                f"pass the proxy it was trained on ({self.trained_on or 'unknown'})"
            )
        logits = self.weight.astype(np.float64) @ np.asarray(hidden, np.float64) + self.bias
        weights = np.exp(logits - logits.max())
        return tuple((weights / weights.sum()).tolist())

    def save(self, path: str | Path) -> None:
        """Write the file."""
        meta = {"sizes": ",".join(map(str, self.sizes)), "view": str(self.view), "depth": str(self.depth)}
        tensors = {"weight": np.ascontiguousarray(self.weight, np.float32), "bias": np.ascontiguousarray(self.bias, np.float32)}
        save_file(tensors, path, meta | {"trained_on": self.trained_on})

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Read the file. Raises ValueError when it is not a gate."""
        try:
            with safe_open(str(Path(path).expanduser()), "numpy") as f:
                meta = f.metadata() or {}
                sizes = tuple(int(s) for s in meta["sizes"].split(","))
                tensors = f.get_tensor("weight"), f.get_tensor("bias")
                return cls(*tensors, sizes, int(meta["view"]), float(meta["depth"]), meta.get("trained_on", ""))
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is not a gate that can be read ({error}); pass gate=FILE as the training wrote it"
            ) from error


def gate_path(name: str) -> Path:
    """``nano`` -> the gate in this package, trained for the nano weights; anything else -> the file of that name."""
    packaged = Path(__file__).parents[1] / "weights" / "nano-cares" / "gate.safetensors"
    return packaged if name == "nano" else Path(name)
