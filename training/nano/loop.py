"""The training loop of all of nano's stages. It resumes: a batch is a pure function of the stage's seed and the step."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own."""

    parameters: list[torch.nn.Parameter]
    lr: float
    frozen_for: int = 0
    """Number of steps at the start during which they do not change."""


@dataclass(frozen=True)
class LoopSettings:
    """How long a stage trains, and how."""

    steps: int
    """Length of the learning-rate schedule."""
    stop: int | None = None
    """Step to end after, although the schedule goes on to ``steps``; by default the last one."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly."""
    floor: float = 0.05
    """Share of the learning rate that the cosine ends at."""
    weight_decay: float = 0.05
    clip: float = 1.0
    """Largest norm of the gradient."""
    log_every: int = 50
    evaluate_every: int = 500
    workers: int = 1
    """Processes that make batches."""
    device: str = "cpu"


class _Steps(Dataset):
    def __init__(self, make_batch: Callable[[int], dict], steps: int):
        self.make_batch, self.steps = make_batch, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        return self.make_batch(step)


def autocast(device: str) -> torch.autocast:
    """bf16 autocast where the device multiplies bf16 in hardware. Off elsewhere: emulated bf16 is 3 times slower than fp32."""
    has_bf16 = True
    if device == "cpu":
        capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM's name
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=has_bf16)


def train(
    modules: dict[str, torch.nn.Module],
    groups: list[ParameterGroup],
    make_batch: Callable[[int], dict],
    loss_of: Callable[[dict, int], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[int], dict],
    out: Path,
    settings: LoopSettings,
) -> None:
    """Minimise ``loss_of`` with AdamW, resuming from ``out/checkpoint.pt`` when it is there.

    make_batch: step, from 0 -> tensors; runs in a worker process. loss_of: batch, its step -> (scalar loss, metrics to log).
    evaluate: number of steps done -> what the log holds of it. For precision see ``autocast``.
    Writes ``out/log.jsonl``, a line per ``log_every`` steps and per evaluation, and ``out/checkpoint.pt`` at each evaluation.
    """
    steps, stop = settings.steps, settings.stop or settings.steps

    # 1) Make the optimizer, and restore everything from the checkpoint.
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr} for g in groups], betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    checkpoint, start, earlier_seconds = out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=settings.device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        start, earlier_seconds = state["step"], state["seconds"]
    begin = time.time()

    def seconds() -> float:
        return earlier_seconds + time.time() - begin

    def save(step: int) -> None:
        state: dict[str, Any] = {name: module.state_dict() for name, module in modules.items()}
        state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": seconds()}
        torch.save(state, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", checkpoint)

    loader = DataLoader(_Steps(make_batch, steps), sampler=range(start, stop), batch_size=None, num_workers=settings.workers)
    metrics: dict[str, list[float]] = {}
    with (out / "log.jsonl").open("a") as log:

        def write(line: dict) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()

        bar = tqdm(loader, initial=start, total=steps, desc=out.name, disable=not sys.stderr.isatty())
        for step, batch in enumerate(bar, start + 1):
            # 2) Forward and backward.
            batch = {k: v.to(settings.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with autocast(settings.device):
                loss, parts = loss_of(batch, step - 1)
            loss.backward()

            # 3) Set the learning rates: linear warm-up, then a cosine to the floor. Frozen groups lose their gradients.
            cosine = settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
            rate = min(1.0, step / settings.warmup) * cosine
            for parameters, group in zip(optimizer.param_groups, groups, strict=True):
                parameters["lr"] = group.lr * rate
                if step <= group.frozen_for:
                    for p in group.parameters:
                        p.grad = None

            # 4) Update.
            moving = [p for g in groups for p in g.parameters if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(moving, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # 5) Log means since the last line; evaluate and save in longer intervals, and both after the last step.
            for name, value in {"loss": loss.item(), **parts}.items():
                metrics.setdefault(name, []).append(value)
            if step % settings.log_every == 0 or step == stop:
                means = {k: round(sum(v) / len(v), 4) for k, v in metrics.items()}
                write({"step": step, "seconds": round(seconds()), **means})
                bar.set_postfix(loss=means["loss"])
                metrics.clear()
            if step % settings.evaluate_every == 0 or step == stop:
                for module in modules.values():
                    module.eval()
                write({"step": step, "seconds": round(seconds()), "evaluation": evaluate(step)})
                for module in modules.values():
                    module.train()
                save(step)
