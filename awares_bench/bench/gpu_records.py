"""What ``gpu-day`` measures, at which scale, and the file that a section's measurements are kept in."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from awares_bench.errors import RunError
from awares_bench.evaluation.provenance import cpu_name, provenance

FORMAT = 1
"""Of the files."""

DEVICE_FAILED = 3
"""Exit status of a process whose device answers nothing more; another process may go on."""


@dataclass(frozen=True)
class Scale:
    """How large everything is. The defaults are a GPU's; ``TINY`` rehearses on a CPU."""

    name: str = "full"
    small: str = "3b"
    """Published size of most sections."""
    large: str = "7b"
    """Of the second engine section."""
    layers: int | None = None
    """Cut both to so many layers; None for all."""
    matrix: int = 8192
    """Rows, columns and depth of the matrix product that is timed."""
    copied: int = 2**31
    """Bytes of the copies that are timed."""
    unequal: tuple[int, ...] = (300, 1200, 80, 600)
    """Visual tokens of the pages whose scores are compared."""
    pages: tuple[int, ...] = (1200, 4800)
    batches: tuple[int, ...] = (1, 16, 64)
    call_rates: tuple[float, ...] = (1.0, 0.3)
    answer: int = 16
    """Tokens of an answer."""
    repeats: int = 2
    pruned: int = 4096
    """Visual tokens of the pictures that pruners cut."""
    prompts: int = 4
    """Of a GRPO step."""
    group: int = 8
    page: int = 1200
    """Visual tokens of a GRPO prompt's page."""
    steps: int = 3
    """GRPO steps that count."""
    nano_width: int = 384
    """Width of the larger nano's decoder; the shipped one has 192."""
    nano_depth: int = 8
    nano_scenes: int = 16
    """Pictures of a step, times six while they are walls of glyphs."""
    nano_steps: int | None = None
    """Training steps; None for as many as fit."""
    workers: int = 12
    """Processes that draw them."""


TINY = Scale(
    name="tiny", small="nano", large="nano", layers=2, matrix=256, copied=2**22, unequal=(16, 36, 4), pages=(36,), batches=(1, 2),
    call_rates=(1.0,), answer=3, repeats=1, pruned=64, prompts=2, group=2, page=36, steps=1, nano_width=96, nano_depth=4, nano_scenes=1,
    nano_steps=2, workers=1,
)  # fmt: skip
"""Every section in seconds: nano's decoder and tower, cut to two layers."""

SCALES = {"full": Scale(), "tiny": TINY}


@dataclass(frozen=True)
class Item:
    """A single measurement of a section."""

    key: str
    measure: Callable[[], dict]
    work: float = 1.0
    """How long it takes, relative to the section's other items."""


@dataclass(frozen=True)
class Section:
    name: str
    """Of its file."""
    title: str
    minutes: float
    """Its share of the time, as minutes of 25."""
    items: Callable[[Scale, str, Path, float], list[Item]]
    """(scale, device, folder of the records, seconds that there are) -> its measurements, the most telling first. Loads nothing."""


class Record:
    """A section's file: what was measured, what failed, what is missing."""

    def __init__(self, out: Path, section: Section, scale: Scale, device: str):
        self.path, self.on_gpu = out / f"{section.name}.json", device.startswith("cuda")
        self.state: dict = {
            "format": FORMAT,
            "section": section.name,
            "title": section.title,
            "scale": json.loads(json.dumps(asdict(scale))),
            "device": device_name(device),
            "status": "partial",
            "seconds": 0.0,
            "items": {},
            "missing": [],
            "running": None,
        }
        self.read()

    def read(self) -> None:
        """Take what the file holds. Raises RunError where it is of another device or scale."""
        if not self.path.exists():
            return
        found = json.loads(self.path.read_text(encoding="utf-8"))
        for name in ("format", "device", "scale"):
            if found.get(name) != self.state[name]:
                raise RunError(
                    f"{self.path} has {name} {found.get(name)!r}, this run {self.state[name]!r}; pass another --out, or delete the file"
                )
        self.state = found

    def write(self) -> None:
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.state, indent=1, allow_nan=True) + "\n", encoding="utf-8")
        os.replace(draft, self.path)

    @property
    def complete(self) -> bool:
        return self.state["status"] == "complete"

    def forget_failures(self) -> None:
        """So that they are tried again."""
        kept = {key: item for key, item in self.state["items"].items() if "error" not in item}
        if len(kept) < len(self.state["items"]):
            self.state |= {"items": kept, "status": "partial"}
            self.write()

    def begin(self, key: str) -> None:
        self.state |= {"running": key, "provenance": provenance()}
        self.write()

    def end(self, key: str, seconds: float, outcome: dict) -> None:
        self.state["items"][key] = {"seconds": seconds, **outcome}
        self.state["seconds"] += seconds
        self.state["running"] = None
        self.write()

    def close(self, keys: list[str]) -> None:
        """keys: of all items that the section has."""
        items = self.state["items"]
        missing = [key for key in keys if key not in items or "error" in items[key]]
        self.state |= {"missing": missing, "status": "partial" if missing else "complete"}
        self.write()

    def sentence(self) -> str:
        self.read()
        items, missing = self.state["items"], self.state["missing"]
        failed = [f"{key}: {item['error']}" for key, item in items.items() if "error" in item]
        told = f"{self.state['section']}: {len(items) - len(failed)} measured in {self.state['seconds']:.0f} s"
        told += f", {len(missing)} missing" if missing else ""
        return "\n  ".join([told, *failed])


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def measure(record: Record, items: list[Item], deadline: float) -> None:
    """Measure what is not there yet, the others first where one would take longer than the time left. Failures are kept as such.

    deadline: on the monotonic clock.
    """
    keys, rate = [item.key for item in items], 0.0
    record.close(keys)
    for item in items:
        if item.key in record.state["items"]:
            continue
        left = deadline - time.monotonic()
        if left <= 0 or rate * item.work > left:  # by the slowest of the items before
            print(f"{item.key}: left out, {left:.0f} s are left", file=sys.stderr, flush=True)
            continue
        record.begin(item.key)
        outcome: dict = {}
        start = time.monotonic()
        try:
            outcome = {"result": item.measure()}
        except (Exception, SystemExit) as error:  # one measurement never ends the others
            outcome = {"error": f"{type(error).__name__}: {error}"[:2000]}
        seconds = time.monotonic() - start
        if "result" in outcome:
            rate = max(rate, seconds / item.work)
        record.end(item.key, seconds, outcome)
        if record.on_gpu:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # nothing runs in this process any more
                sys.exit(DEVICE_FAILED)
    record.close(keys)
