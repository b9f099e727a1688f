"""Documents per second on a quiet machine and beside busy processes, with OpenMP's spin as this package sets it and as it comes.

A policy of OpenMP is read when PyTorch is loaded, so each contestant is a process of its own: it answers the nano suite for a while at each
line on its standard input, and writes documents per second and the cores that it got, which the system's scheduler decides: two threads
that it puts beside each other on one of two busy cores get two thirds of it, on one core each they get half of both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from statistics import median

from awares_bench.openmp import OF_THE_USER, SHORT_SPIN

BUSY = 2
"""Processes beside the engine that compute all the time."""

CONTESTANTS = {"ours": SHORT_SPIN, "as OpenMP comes": {}}


@dataclass(frozen=True)
class Rate:
    """Of a contestant; medians over its rounds."""

    documents: float
    """Per second."""

    cores: float
    """That it got: CPU seconds of all its threads in a second."""

    per_core: float
    """Documents per CPU second."""


def contention(pretrained: str, documents: int, batch: int, repeats: int, seconds: float = 4.0) -> dict[str, dict[str, Rate]]:
    """Contestant -> its rate ``quiet`` and ``busy``, all in alternation.

    seconds: of one round of one contestant; a round ends sooner when all documents are answered.
    """
    kept = {name: value for name, value in os.environ.items() if name not in OF_THE_USER}
    command = [sys.executable, "-m", "awares_bench.bench.contention", pretrained, str(documents), str(batch), str(seconds)]
    rounds: dict[str, dict[str, list[tuple[float, float]]]] = {name: {"quiet": [], "busy": []} for name in CONTESTANTS}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                subprocess.Popen(command, env=kept | policy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for name, policy in CONTESTANTS.items()
        }
        for worker in workers.values():
            _line(worker)  # it has loaded its model
        for _ in range(repeats):
            for state in ("quiet", "busy"):
                with busy(BUSY if state == "busy" else 0):
                    for name, worker in workers.items():
                        print("go", file=worker.stdin, flush=True)
                        rate, cores = map(float, _line(worker).split())
                        rounds[name][state].append((rate, cores))
        for worker in workers.values():
            worker.stdin.close()  # type: ignore[union-attr]
    return {name: {state: _median(values) for state, values in states.items()} for name, states in rounds.items()}


def _median(rounds: list[tuple[float, float]]) -> Rate:
    rates, cores = zip(*rounds, strict=True)
    return Rate(median(rates), median(cores), median(rate / used for rate, used in rounds))


def _line(worker: subprocess.Popen) -> str:
    line = worker.stdout.readline() if worker.stdout else ""
    if not line:
        raise RuntimeError(f"a process of the contention bench ended with status {worker.wait()}; its error stands above")
    return line


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Processes that compute all the time within the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _work(pretrained: str, documents: int, batch: int, seconds: float) -> None:
    """A contestant: a round for each line of standard input."""
    from awares_bench.inference.engine import Engine, Job
    from awares_bench.inference.local_model import LocalModel
    from awares_bench.methods.registry import build
    from awares_bench.models.packaged import resolve

    from .contestants import nano_samples

    vlm = LocalModel.load(resolve(pretrained))
    samples = nano_samples(Path(str(files("awares_bench.tasks.nano") / "nano_chart.yaml")).parent, documents)
    engine = Engine(vlm, build("full", {}).policy, batch)
    vlm.warm_up()
    print("ready", flush=True)
    for _ in sys.stdin:
        start, used, answered = time.perf_counter(), time.process_time(), 0
        for _ in engine.run(Job(sample, 16) for sample in cycle(samples)):
            answered += 1
            if answered >= documents or time.perf_counter() - start > seconds:
                break
        taken = time.perf_counter() - start
        print(answered / taken, (time.process_time() - used) / taken, flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
