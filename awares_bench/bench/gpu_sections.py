"""The sections of ``gpu-day``, the most telling first."""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from awares_bench.errors import RunError
from awares_bench.inference.batch import Batch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.varlen_batch import VarlenBatch
from awares_bench.methods.registry import pruner_classes

from . import engine_bench, pruner_bench
from .contestants import load
from .device_rates import rates
from .equality import OWN, PLAIN, PlainSteps, questions
from .gpu_records import Item, Scale, Section

AGREE = 0.02
"""Norm of the difference of two ways in bfloat16, relative to the scores', up to which they are the same but for rounding."""


def device(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    return [Item("rates", partial(rates, device, scale.matrix, scale.copied))]


def equality(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    asked = questions(scale.small, scale.layers, device, scale.unequal, scale.answer)
    return [Item(name, ask) for name, ask in asked.items()]


def engine(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    return engine_of(scale.small, scale, device, out)


def engine_large(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    return engine_of(scale.large, scale, device, out)


def engine_of(size: str, scale: Scale, device: str, out: Path) -> list[Item]:
    """Every page size at the smallest batch, then the others; a batch of one calls, larger ones at every call rate. ``generate`` takes a
    second turn one page at a time, so it is timed at the batch of one."""

    @cache
    def model() -> LocalModel:
        vlm = load(None, size, scale.layers, "auto", device)
        vlm.layout = trusted_layout(vlm, out)
        return vlm

    def measured(tokens: int, batch: int, call_rate: float) -> dict:
        vlm = model()
        own = vlm.layout or vlm.own_layout()
        others: dict[str, type[Batch]] = {"rectangle": PaddedBatch} if own is not PaddedBatch else {}
        if own is VarlenBatch:
            others["steps from Python"] = PlainSteps
        repeats = scale.repeats if batch * tokens <= 20_000 else 1
        settings = engine_bench.Settings(
            geometry=size, layers=scale.layers, device=device, tokens=tokens, batch=batch, call_rate=call_rate,
            answer=scale.answer, repeats=repeats, parts=("turns", "stock"),
        )  # fmt: skip
        try:
            return engine_bench.measure(settings, vlm, others, twice=batch == 1)
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            why = str(error).splitlines()[0]
        # outside of the handler, whose traceback holds what was computed
        gc.collect()
        alone = engine_bench.measure(replace(settings, parts=("turns",)), vlm)
        return alone | {"notes": [*alone["notes"], f"model.generate and the rectangle are left out: no room ({why})"]}

    items = []
    for batch in scale.batches:
        for tokens in scale.pages:
            for call_rate in scale.call_rates if batch > 1 else scale.call_rates[:1]:
                key = f"{tokens} tokens, batch {batch}, call rate {call_rate:g}"
                items.append(Item(key, partial(measured, tokens, batch, call_rate), tokens * batch + 2000.0))
    return items


def trusted_layout(vlm: LocalModel, out: Path) -> type[Batch] | None:
    """None for the device's own layout; where this run's equality has shown that to be wrong, or to fail, the same without recorded steps,
    else the rectangle."""
    path = out / "equality.json"
    items = json.loads(path.read_text(encoding="utf-8"))["items"] if path.exists() else {}
    kind = str(vlm.host.dtype).removeprefix("torch.")

    def agrees(question: str) -> bool:
        result = items.get(f"{kind}: {question}", {}).get("result")
        return result is not None and result["a batch beside one by one"]["relative"] <= AGREE

    if vlm.own_layout() is PaddedBatch or f"{kind}: {OWN}" not in items or agrees(OWN):
        return None  # the rectangle anyway, or nobody has looked, or it is right
    print(f"equality: {vlm.own_layout().__name__} is not trusted here", file=sys.stderr)
    return PlainSteps if agrees(PLAIN) else PaddedBatch


def pruners(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    """All pruners at once, so that they share a prefill; one by one where one of them fails, which is then named in the result."""
    dtype = "bfloat16" if device.startswith("cuda") else "float32"

    def measured(retention: float, only: str = "") -> dict:
        return pruner_bench.run(scale.small, scale.pruned, 1, retention, scale.repeats, device, dtype, only=only)

    def every(retention: float) -> dict:
        try:
            return measured(retention) | {"failed": {}}
        except Exception as error:  # told below, by name
            print(f"pruners one by one: {error}", file=sys.stderr)
        results, failed = [], {}
        for name in map(pruner_bench.name_of, pruner_classes()):
            try:
                results.append(measured(retention, name))
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        if not results:
            raise RunError(f"no pruner could be measured: {failed}")
        return results[0] | {"pruners": [p for r in results for p in r["pruners"]], "failed": failed}

    return [Item(f"{scale.pruned} tokens, retention {retention:g}", partial(every, retention)) for retention in (0.5, 0.25)]


def grpo(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    def measured() -> dict:
        from .grpo_step import step

        path = out / "device.json"
        found = json.loads(path.read_text(encoding="utf-8"))["items"].get("rates", {}).get("result") if path.exists() else None
        found = found or rates(device, scale.matrix, scale.copied)
        kind = "bfloat16" if device.startswith("cuda") else "float32"
        return step(
            scale.small, scale.layers, device, scale.prompts, scale.group, scale.page, scale.answer, scale.steps,
            found["matmul_flops"][kind], found["memory_bytes"],
        )  # fmt: skip

    return [Item("LoRA step", measured)]


def nano(scale: Scale, device: str, out: Path, seconds: float) -> list[Item]:
    """A larger nano: its vision tower, as far as the time goes."""
    return [Item("tower", partial(train_tower, scale, device, out / "nano-tower", 0.8 * seconds))]


def train_tower(scale: Scale, device: str, out: Path, seconds: float) -> dict:
    """Train the tower of a larger nano from nothing for about so many seconds, or ``scale.nano_steps`` steps -> its log and its speed.

    A few steps tell the speed, which tells how many steps the learning rate's schedule has.
    """
    from awares_bench.training.nano import model, tower

    width, depth = scale.nano_width, scale.nano_depth
    geometry = model.Geometry(
        width=width, layers=depth, heads=width // 32, kv_heads=width // 96, mlp=width * 7 // 3, vision_width=width * 2 // 3,
        vision_depth=depth, vision_heads=max(1, width // 96), vision_mlp=2 * width,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    few, start = 60, time.perf_counter()
    args = argparse.Namespace(start=None, scenes=scale.nano_scenes, lr=1e-3, seed=0, device=device, out=out)
    args.steps, args.walls = scale.nano_steps or 10**6, few
    if not scale.nano_steps:
        tower.main(args, geometry, stop=few, workers=scale.workers)
        taken = time.perf_counter() - start
        args.steps = few + max(few, math.floor((seconds - taken) / (taken / few) * 0.8))
    args.walls = args.steps * 700 // 2600  # the share of the shipped tower's steps
    tower.main(args, geometry, workers=scale.workers)
    taken = time.perf_counter() - start
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "geometry": vars(geometry),
        "steps": args.steps,
        "pictures": args.steps * scale.nano_scenes,
        "seconds": taken,
        "steps_per_second": args.steps / taken,
        "log": [line for line in lines if "loss" in line][-40:],
        "evaluation": next((line["evaluation"] for line in reversed(lines) if "evaluation" in line), None),
    }


SECTIONS = (
    Section("device", "what the device can do", 0.5, device),
    Section("equality", "the same scores by every way", 3.0, equality),
    Section("engine", "the engine beside model.generate", 6.5, engine),
    Section("engine_large", "the engine beside model.generate, large model", 6.0, engine_large),
    Section("pruners", "what pruners cost beside the prefill", 1.5, pruners),
    Section("grpo", "a GRPO step beside its floor", 2.5, grpo),
    Section("nano", "a larger nano, as far as the time goes", 5.0, nano),
)  # fmt: skip
