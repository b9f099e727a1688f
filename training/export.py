"""Writes the checkpoint of a trained run, with its processor and model card, for evaluation and for stock transformers."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from awares_bench.inference.local_model import LocalModel

from .packing import Scorer
from .recipe import Recipe


def finish(scorer: Scorer, vlm: LocalModel, out: Path, stage: str, recipe: Recipe) -> Path:
    """Write ``out/checkpoint`` in bfloat16, adapters merged, with its card; adapters also alone, as ``out/adapter``.

    The scorer's model is changed and must not be used afterwards. -> the checkpoint's folder.
    """
    model = scorer.model
    if hasattr(model, "merge_and_unload"):
        for config in model.peft_config.values():
            config.base_model_name_or_path = recipe.start
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    model.to(torch.bfloat16).requires_grad_(True)
    draft, folder = out / "checkpoint.tmp", out / "checkpoint"
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    vlm.host.processor.save_pretrained(draft)
    (draft / "README.md").write_text(card(out, stage, recipe))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    return folder


def card(out: Path, stage: str, recipe: Recipe) -> str:
    """The model card: what the checkpoint is, how to run it, its recipe, and the last line of its log."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    metrics = "\n".join(f"| {k} | {v:.4g} |" for k, v in last.items() if isinstance(v, (int, float)))
    start = Path(recipe.start).name if recipe.start.startswith((".", "/", "~")) else recipe.start
    settings = {k: v for k, v in asdict(recipe).items() if k not in ("out", "start", "data", "device")}
    policy, role = getattr(recipe, "policy", "awares"), getattr(recipe, "role", "") or "pretrained"
    arguments = ",".join([f"{role}=FOLDER", *(f"{k}={v}" for k, v in getattr(recipe, "policy_options", {}).items())])
    about = (
        " It first sees a half-size view and may ask for\nhigh-resolution crops (arXiv 2603.16932)." if policy == "awares" else ""
    )
    packages = ", ".join(f"{p} {version(p)}" for p in ("awares-bench", "torch", "transformers", "peft"))
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [awares, visual-token-efficiency, {stage}]
---
# {start}, {stage} for policy `{policy}`

Trained from `{start}` on `{Path(recipe.data).name}` by awares-bench.{about}

    lmms-eval --model {policy} --model_args {arguments} --tasks awares_paper

Or `AutoModelForImageTextToText.from_pretrained(FOLDER)` in plain transformers.

## Last log line
| metric | value |
|---|---|
{metrics}

## Recipe
```yaml
{yaml.safe_dump(settings, sort_keys=False).strip()}
```
Made with {packages}.
"""
