"""One resumable training loop for every stage: stateless batches, JSON-lines log, checkpoint, cosine schedule.

A batch is a pure function of (stage seed, step), so a run that is cut and resumed sees the batches it would have seen.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate of their own. frozen_for: steps at the start during which they do not move."""

    parameters: list[torch.nn.Parameter]
    lr: float
    frozen_for: int = 0


class _Steps(Dataset):
    def __init__(self, make_batch: Callable[[int], dict], steps: int):
        self.make_batch, self.steps = make_batch, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        return self.make_batch(step)


def autocast(device: str) -> torch.autocast:
    """bf16 autocast where the device multiplies bf16 in hardware; elsewhere off, since an emulated bf16 is 3 times slower than fp32."""
    fast = True
    if device == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))  # bf16: ARM's name
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=fast)


def train(
    modules: dict[str, torch.nn.Module],
    groups: list[Group],
    make_batch: Callable[[int], dict],
    loss_of: Callable[[dict], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[int], dict],
    out: Path,
    steps: int,
    *,
    stop: int | None = None,
    warmup: int = 100,
    floor: float = 0.05,
    weight_decay: float = 0.05,
    clip: float = 1.0,
    log_every: int = 50,
    evaluate_every: int = 500,
    workers: int = 1,
    device: str = "cpu",
) -> None:
    """Minimise ``loss_of(batch)`` for ``steps`` steps of AdamW, resuming from ``out/checkpoint.pt`` when it is there.

    stop: end after this step although the schedule goes on to ``steps``.

    make_batch: step -> tensors, run in a worker process. loss_of: batch -> (scalar loss, figures to log).
    Learning rate: linear warm-up over ``warmup`` steps, cosine to ``floor`` of the group's rate. Precision: see ``autocast``.
    Writes ``out/log.jsonl`` (one line per ``log_every`` steps and per evaluation) and ``out/checkpoint.pt``.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr} for g in groups], betas=(0.9, 0.95), weight_decay=weight_decay
    )
    checkpoint, start, spent = out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]

    def save(step: int) -> None:
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": spent + time.time() - began}
        torch.save(state, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", checkpoint)

    loader = DataLoader(_Steps(make_batch, steps), sampler=range(start, stop or steps), batch_size=None, num_workers=workers)
    figures: dict[str, list[float]] = {}
    began = time.time()
    with (out / "log.jsonl").open("a") as log:

        def write(line: dict) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()

        bar = tqdm(loader, initial=start, total=steps, desc=out.name, disable=not sys.stderr.isatty())
        for step, batch in enumerate(bar, start + 1):
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            with autocast(device):
                loss, parts = loss_of(batch)
            loss.backward()
            rate = min(1.0, step / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group, spec in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = spec.lr * rate
                if step <= spec.frozen_for:
                    for p in spec.parameters:
                        p.grad = None
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g.parameters if p.grad is not None], clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for name, value in {"loss": loss.item(), **parts}.items():
                figures.setdefault(name, []).append(value)
            if step % log_every == 0 or step == (stop or steps):
                means = {k: round(sum(v) / len(v), 4) for k, v in figures.items()}
                write({"step": step, "seconds": round(spent + time.time() - began), **means})
                bar.set_postfix(loss=means["loss"])
                figures.clear()
            if step % evaluate_every == 0 or step == (stop or steps):
                for module in modules.values():
                    module.eval()
                write({"step": step, "seconds": round(spent + time.time() - began), "evaluation": evaluate(step)})
                for module in modules.values():
                    module.train()
                save(step)
