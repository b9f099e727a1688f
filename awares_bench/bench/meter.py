"""What a pruner's own work takes, call by call, while a prefill goes on: seconds, or the most memory; for ``pruner_bench.py``."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from awares_bench.inference.layerwise_batch import LayerwiseBatch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.memory import peak, process_status, start_peak
from awares_bench.methods.pruner import Pruner, VisualTokens
from awares_bench.models.attention_scores import AttentionRows
from awares_bench.models.prompt_chunk import PromptChunk


@dataclass
class Meter:
    """Runs calls and keeps their seconds or, since asking slows them down, the most memory that any of them needed."""

    vlm: LocalModel
    memory: bool = False
    """Whether memory is kept."""
    seconds: list[float] = field(default_factory=list)
    """Of each call."""
    peak: int | None = 0
    """Bytes; None where the system does not say."""
    cut: float = 0.0
    """Seconds of the cuts among the calls."""
    within: float = 0.0
    """Seconds of the scoring within those cuts."""

    def __call__(self, call: Callable, *args):
        before = reset_peak(self.vlm) if self.memory else None
        seconds, out = timed(self.vlm, call, *args)
        self.seconds.append(seconds)
        if self.memory:
            self.peak = None if before is None or self.peak is None else max(self.peak, peak(self.vlm.device) - before)
        return out

    def cutting(self, call: Callable, *args):
        """A call that scores and cuts."""
        out = self(call, *args)
        self.cut += self.seconds[-1]
        return out

    def scoring(self, call: Callable, *args):
        """A call within one that cuts."""
        seconds, out = timed(self.vlm, call, *args)
        self.within += seconds
        return out

    @property
    def scored(self) -> float:
        """Seconds without what a cut takes beside scoring."""
        return sum(self.seconds) - self.cut + self.within


def clock(vlm: LocalModel) -> Callable[[], float]:
    """Gives seconds: of the wall on a GPU, once it has done what it was given; on a CPU of this process, all its threads, so that
    other programs do not count. Chosen before it is read, since a small decision takes no longer than choosing."""
    if vlm.device.type != "cuda":
        return time.process_time

    def read() -> float:
        vlm.synchronise()
        return time.perf_counter()

    return read


def timed(vlm: LocalModel, call: Callable, *args) -> tuple[float, object]:
    """-> seconds of a call, and what it returned."""
    now = clock(vlm)
    start = now()
    out = call(*args)
    return now() - start, out


def reset_peak(vlm: LocalModel) -> int | None:
    """Start a new peak -> bytes in use; on a CPU of the process, where Linux can say."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that was freed and not returned would hide what is asked for next
    if not start_peak(vlm.device):
        return None
    return torch.cuda.memory_allocated(vlm.device) if vlm.device.type == "cuda" else process_status("VmRSS")


class MeteredBatch(LayerwiseBatch):
    """A prefill whose raters, their queries and cuts are metered."""

    def __init__(self, meter: Meter, *args):
        self.meter = meter
        super().__init__(*args)

    def choose_raters(self, *args) -> Tensor:
        return self.meter(super().choose_raters, *args)

    def observe(self, *args) -> None:
        if self.pruner.looks_ahead:  # within what is metered
            super().observe(*args)
        else:
            self.meter(super().observe, *args)

    def look_ahead(self, *args) -> tuple[Tensor, Tensor]:
        return self.meter(super().look_ahead, *args)

    def cut(self, *args) -> PromptChunk:
        return self.meter.cutting(super().cut, *args)

    def attention_rows(self, *args) -> AttentionRows:
        return self.meter.scoring(super().attention_rows, *args)


def metered(pruner: Pruner, meter: Meter) -> Pruner:
    """The same pruner, whose ``reduce`` is metered."""
    kind = type(pruner)

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        return meter.scoring(kind.reduce, self, image, n)

    return type(kind.__name__, (kind,), {"reduce": reduce, "__module__": kind.__module__})(**vars(pruner))
