"""A decoding step that is recorded once and replayed by the GPU alone: a batch's step is hundreds of small kernels, and starting them one by
one from Python takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


class StepGraph:
    """``function`` of tensors of fixed shapes as a CUDA graph.

    What it reads and writes beside its arguments, such as weights and caches, must stay where it is, and nothing but those tensors may
    decide what it does: Python runs once. inputs: values of a typical call, which is not made.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor]):
        self.inputs = [t.clone() for t in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # not ``torch.cuda.graph``, which first gives all cached memory back. Other threads may pin pictures meanwhile
        here, aside = torch.cuda.current_stream(), _stream(inputs[0].device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.output = function(*self.inputs)
            finally:
                self.graph.capture_end()
        here.wait_stream(aside)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """-> the function's value; the next call writes over it."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that recording happens on: libraries keep memory for every stream that they have met."""
    return torch.cuda.Stream(device)
