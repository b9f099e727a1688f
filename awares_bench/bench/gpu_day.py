"""``awares-bench bench gpu-day``: everything that only a GPU can tell, in one command for a device that is lent for minutes.

Sections run in the order of their value, each in a process of its own, within a share of the time. What was measured is in a file a
section (``DIR/NAME.json``) after every single measurement, so that a run that is cut, or a device that fails, loses one measurement; the
same command goes on from there, and tries again what failed. Nothing is downloaded: weights are random, of published sizes. Needs PyTorch,
transformers, PEFT and what they bring; no lmms-eval. ``awares-bench report DIR`` makes tables and figures of the files.

    python -m pip install --no-deps --no-build-isolation --no-index -e .     on a machine without a network
    python -m awares_bench bench gpu-day --out DIR --minutes 25
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from .gpu_records import DEVICE_FAILED, SCALES, Record, Scale, Section, measure
from .gpu_sections import SECTIONS

LEAST = 90.0
"""Seconds that a section has at the least, since a process and its model take their time to start."""

GRACE = 30.0
"""Seconds that a section's process may go on after its time is up before it is ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the records; the same command goes on there")
    parser.add_argument("--minutes", type=float, default=25.0, help="time for everything (default: 25)")
    parser.add_argument("--geometry", choices=list(SCALES), default="full", help="tiny: a rehearsal of every section on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sections", default="", help="comma-separated; default: all, the most telling first")
    parser.add_argument("--in-process", action="store_true", help="run the sections in this process, without a process for each")


def main(args: argparse.Namespace) -> int:
    names = tuple(args.sections.split(",")) if args.sections else ()
    return run(args.out, args.minutes, SCALES[args.geometry], args.device, names, args.in_process)


def run(
    out: Path, minutes: float = 25.0, scale: Scale = SCALES["full"], device: str = "auto", names: tuple[str, ...] = (), here: bool = False
) -> int:  # fmt: skip
    """Run the sections that are not complete -> 0 when all of them are now, else 1. here: in this process, and try nothing again.

    Raises ValueError for an unknown section, RunError for a folder that holds another device's records.
    """
    known = {s.name: s for s in SECTIONS}
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"--sections holds {unknown[0]!r}; known: {', '.join(known)}")
    if minutes <= 0:
        raise ValueError(f"minutes is {minutes}; it must be above 0")
    sections = [known[n] for n in names] if names else list(SECTIONS)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    out.mkdir(parents=True, exist_ok=True)
    records = {s.name: Record(out, s, scale, device) for s in sections}
    if not here:
        for record in records.values():
            record.forget_failures()
    end = time.monotonic() + 60 * minutes
    for i, section in enumerate(sections):
        if records[section.name].complete:
            print(f"{section.name}: complete", flush=True)
            continue
        left = end - time.monotonic()
        # time that a section leaves over is the others'
        share = min(left, max(LEAST, left * section.minutes / sum(s.minutes for s in sections[i:])))
        if here:
            measure(records[section.name], section.items(scale, device, out, share), time.monotonic() + share)
        else:
            in_a_process(section, out, scale, device, share)
        print(records[section.name].sentence(), flush=True)
    return 0 if all(record.complete for record in records.values()) else 1


def in_a_process(section: Section, out: Path, scale: Scale, device: str, seconds: float) -> None:
    """Run a section as a process; where it dies or hangs, the measurement it was at is a failure, and another process does the rest."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        words = ["bench", "gpu-day", "--out", str(out), "--geometry", scale.name, "--device", device, "--in-process"]
        words += ["--sections", section.name, "--minutes", f"{left / 60:.4f}"]
        with (out / "log.txt").open("a") as log:
            log.write(f"--- {section.name}\n")
            log.flush()
            process = subprocess.Popen([sys.executable, "-m", "awares_bench", *words], stdout=log, stderr=log)
            try:
                process.wait(left + GRACE)
                why = f"the process ended with status {process.returncode} (see log.txt)"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                why = "the section's time was up"
        record = Record(out, section, scale, device)
        running = record.state["running"]
        if running is not None:
            record.end(running, 0.0, {"error": why})
        elif process.returncode != DEVICE_FAILED:  # it came to its end, or never began
            if not record.state["items"]:
                record.end("start", 0.0, {"error": why})
            return
