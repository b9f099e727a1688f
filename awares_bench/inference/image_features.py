"""Vision features of pictures that were encoded before: several methods on the same documents share them when asked."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor


class FeatureStore:
    """Merged features by the patches they came from, the least recently used dropped beyond ``capacity`` bytes."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity is {capacity} bytes; it must be at least 1")
        self.capacity, self.used = capacity, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    @staticmethod
    def key(patches: Tensor, grid: tuple[int, int, int]) -> bytes:
        """Of one image: equal for equal pixels in an equal grid."""
        return hashlib.blake2b(patches.contiguous().numpy().tobytes() + repr(grid).encode(), digest_size=16).digest()

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def get(self, key: bytes) -> Tensor | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, features: Tensor) -> None:
        if key in self._kept:
            return
        features = features.clone()  # not a view that keeps a whole batch alive
        self._kept[key] = features
        self.used += features.nbytes
        while self.used > self.capacity:
            _, dropped = self._kept.popitem(last=False)
            self.used -= dropped.nbytes
