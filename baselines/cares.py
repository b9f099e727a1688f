"""CARES: a small proxy reads the question and a thumbnail, and a linear gate on its middle layer picks the resolution.

Paper    Kimhi et al., ACL 2026, https://arxiv.org/abs/2510.19496
Code     https://github.com/mkimhi/CARES at ee9763e (training of the gate; no weights of it)
Needs    a gate trained for the proxy (``awares-bench train gate``); no training of the model under test
Cost     the chosen size's tokens; the proxy's own in the aux columns
Differs  the paper's last token where the code pools over the text; a proxy that cuts pictures into tiles takes the thumbnail's share of them (the code: all); each of several images gets its own size
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from awares_bench import Event, EventKind, Policy, Sample, Turn, TurnGenerator
from awares_bench.errors import RunError
from awares_bench.methods.images import share_of, within
from awares_bench.methods.policy import UNDER_TEST
from awares_bench.methods.resolution_gate import Gate, gate_path

STEP = 28
"""Sizes that Qwen2.5-VL tells apart: one merged token."""


@dataclass(frozen=True)
class Cares(Policy):
    """Choose a size for each image, then ask.

    gate:  file written by the gate's training: weights, the sizes it chooses from, the thumbnail and the depth it reads;
           ``nano``: the one in the package
    proxy: checkpoint the gate was trained on; ``pretrained``: the model under test, whose tokens then count as its own
    mode:  ``continuous``: the expected size, rounded up to a whole token; ``discrete``: the most probable size
    """

    gate: str = ""
    proxy: str = UNDER_TEST
    mode: Literal["continuous", "discrete"] = "continuous"

    @property
    def models(self) -> dict[str, str]:
        _ = self.loaded_gate  # a missing gate is said before any weights are loaded
        return {"proxy": self.proxy}

    @cached_property
    def loaded_gate(self) -> Gate:
        """The gate. Raises RunError when there is none: no document can be answered without it."""
        if not self.gate:
            raise RunError("cares needs gate=FILE; train one with: awares-bench train gate --out FILE")
        try:
            return Gate.load(gate_path(self.gate))
        except ValueError as error:
            raise RunError(str(error)) from error

    def turns(self, sample: Sample) -> TurnGenerator:
        gate, views = self.loaded_gate, []
        for image in sample.images:
            thumbnail = within(image, gate.view)
            probe = Turn(
                (thumbnail,),
                sample.question,
                shares=(share_of(thumbnail, image),),
                model="proxy",
                hidden_state_depth=gate.depth,
            )
            size = choose(gate.probabilities((yield probe).hidden), gate.sizes, self.mode)
            yield Event(EventKind.RESOLUTION, f"longer side at most {size} of {max(image.size)} pixels")
            views.append(within(image, size))
        shares = tuple(share_of(view, image) for view, image in zip(views, sample.images, strict=True))
        return (yield sample.ask(tuple(views), shares=shares))


def choose(probabilities: tuple[float, ...], sizes: tuple[int, ...], mode: str) -> int:
    """Probability of each size -> longer side in pixels. Ties go to the larger size, which loses nothing."""
    if mode == "discrete":
        return max(zip(probabilities, sizes, strict=True))[1]
    expected = sum(p * size for p, size in zip(probabilities, sizes, strict=True))
    return min(max(sizes), STEP * math.ceil(expected / STEP - 1e-6))
