"""Vision features of pictures that were encoded before: several methods on the same documents share them, and rollouts share them with scoring."""

from __future__ import annotations

from collections import OrderedDict

from awares_bench.methods.pruner import VisualTokens


class FeatureStore:
    """Visual tokens by the key of their picture (``HostModel.image_key``), the least recently used dropped beyond ``capacity`` bytes."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity is {capacity} bytes; it must be at least 1")
        self.capacity, self.used = capacity, 0
        self._kept: OrderedDict[str, list[VisualTokens]] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> list[VisualTokens] | None:
        """The runs of a picture, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, runs: list[VisualTokens]) -> None:
        """Keep the features of a picture's runs, and nothing that a pruner asked for beside them."""
        if key in self._kept:
            return
        # clones: not views that keep a whole batch alive
        self._kept[key] = [
            VisualTokens(
                run.features.clone(), run.grid, run.places, deepstack=None if run.deepstack is None else run.deepstack.clone()
            )
            for run in runs
        ]
        self.used += _bytes(runs)
        while self.used > self.capacity:
            self.used -= _bytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Drop everything. Features differ in the last bit with the pictures encoded beside them: a training step that began with what
        another left could not be repeated by a run that resumes there."""
        self._kept.clear()
        self.used = 0


def _bytes(runs: list[VisualTokens]) -> int:
    return sum(run.features.nbytes + (0 if run.deepstack is None else run.deepstack.nbytes) for run in runs)
