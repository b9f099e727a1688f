"""Trains the checkpoints of ``awares-bench run nano_ablations`` (paper Tables 3 and 4).

They are GRPO of 75 steps without one of its parts, and SFT without the weight on calls.

    awares-bench nano ablations [NAME-SEED ...]

Needs runs/nano-curate and runs/nano-sft, which docs/nano.md makes. Checkpoints that exist are skipped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import grpo, recipe, script, sft

STEPS = 75
"""Steps of GRPO, about a tenth of the nano recipe's."""

CHANGES = {
    "grpo": [],
    "group_std": ["scaling=group_std"],
    "no_tool_cost": ["miss=0", "use=0", "area=0"],
    "area_weight_0": ["area=0"],
    "anls_reward": ["answer=anls"],
    "grpo_only": ["start=nano-base"],
}
"""Name -> what differs from the recipe nano_grpo; ``weight_1`` is SFT with call_weight=1."""


NAMES = [f"{name}-{seed}" for name in (*CHANGES, "weight_1") for seed in (0, 1)]
"""Every ablation, with either seed."""


def train(name: str) -> None:
    """Make the checkpoint of an ablation, such as ``grpo-0``, unless it exists."""
    out = f"runs/ablation/{name}"
    if (Path(out) / "checkpoint").exists():
        return
    change, seed = name.rsplit("-", 1)
    settings = [f"out={out}", f"seed={seed}"]
    if change == "weight_1":
        sft.run(recipe.load(sft.SFT, "nano_sft", [*settings, "call_weight=1"]))
    else:
        settings += [f"steps={STEPS}", f"save_every={STEPS}", f"log_every={STEPS // 15}"]
        grpo.run(recipe.load(grpo.GRPO, "nano_grpo", [*settings, *CHANGES[change]]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME-SEED", help=f"ablations to train (default: all): {', '.join(NAMES)}")


def main(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.names if name not in NAMES]:
        raise ValueError(f"no ablation {', '.join(unknown)}; known: {', '.join(NAMES)}")
    for name in args.names or NAMES:
        train(name)
    return 0


if __name__ == "__main__":
    sys.exit(script.run(__doc__, add_arguments, main))
