"""Checkpoints for ``awares-bench run nano_ablations``: GRPO of 75 steps without one of its parts, SFT without the weight on calls.

    python -m awares_bench.training.nano.ablations [NAME-SEED ...]

Needs runs/nano-curate and runs/nano-sft (README, "Train your own"). What is done is not done again. Paper Tables 3 and 4.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import grpo, recipe, sft

STEPS = 75
"""Of GRPO; about a seventh of the nano recipe's."""

CHANGES = {
    "grpo": [],
    "group_std": ["scaling=group_std"],
    "no_tool_cost": ["miss=0", "use=0", "area=0"],
    "area_weight_0": ["area=0"],
    "anls_reward": ["answer=anls"],
    "grpo_only": ["start=nano-base"],
}
"""Name -> what differs from the recipe nano_grpo; ``weight_1`` is SFT with call_weight=1."""


def main(wanted: list[str]) -> None:
    """Make the named checkpoints, such as ``grpo-0``; all of them by default."""
    known = [f"{name}-{seed}" for name in (*CHANGES, "weight_1") for seed in (0, 1)]
    if unknown := [w for w in wanted if w not in known]:
        raise SystemExit(f"no ablation {', '.join(unknown)}; known: {', '.join(known)}")
    for one in wanted or known:
        name, seed = one.rsplit("-", 1)
        out = f"runs/ablation/{one}"
        if (Path(out) / "checkpoint").exists():
            continue
        said = [f"out={out}", f"seed={seed}"]
        if name == "weight_1":
            sft.run(recipe.load(sft.SFT, "nano_sft", [*said, "call_weight=1"]))
        else:
            grpo.run(
                recipe.load(
                    grpo.GRPO,
                    "nano_grpo",
                    [*said, f"steps={STEPS}", f"save_every={STEPS}", f"log_every={STEPS // 15}", *CHANGES[name]],
                )
            )


if __name__ == "__main__":
    main(sys.argv[1:])
