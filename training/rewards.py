"""Rewards of rollouts: the score of the answer less the cost of looking. Each part is kept beside the sum, for logs."""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench.methods.conversation import EventKind
from awares_bench.methods.crop_grid import PAPER_GRID

from .curation.judges import Judge
from .rollouts import Rollout

MALFORMED = (EventKind.MALFORMED_CALL, EventKind.CALL_IN_ANSWER, EventKind.MALFORMED_BOX)
"""Events of replies in a form that their method cannot use."""


@dataclass(frozen=True)
class GroundTruth:
    """What is known about a question."""

    question: str
    answers: tuple[str, ...]
    """The accepted answers."""
    label: str | None = None
    """``LR`` (low resolution is enough), ``HR``, or None where nobody knows."""


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the composite reward ``w_ans * R_ans - C_tool`` (paper Eq. 4-6, Sec. 4.3)."""

    w_ans: float = 1.0
    """Of the answer's score: 1 in Eq. 5, 10 in the supplement's Table 7."""
    miss: float = 2.0
    """Cost of a miss, see ``missed``."""
    use: float = 0.25
    """Cost of any call."""
    area: float = 0.01
    """Cost per unit of image area that the crops cover."""
    area_of: str = "union"
    """``union`` counts overlaps once, as the paper's "covered" says; ``sum`` counts them as often as their tokens."""
    missed: str = "label"
    """What a miss is: ``label``, a direct answer where the label is HR (paper); ``wrong``, one that scores below 0.5."""


def called(rollout: Rollout) -> bool:
    """Whether the model looked again."""
    return len(rollout.trajectory.turns) > 1


def malformed(rollout: Rollout) -> bool:
    """Whether a reply has a form that its method cannot use."""
    return any(e.kind in MALFORMED for e in rollout.trajectory.events)


def awares(group: list[Rollout], truth: GroundTruth, judge: Judge, weights: RewardWeights) -> list[dict[str, float]]:
    """The parts of each rollout's reward, and their sum ``reward``.

    Where a miss is decided by the label, a question without a label has none.
    """
    out = []
    for r in group:
        names = r.trajectory.crops
        score = judge(truth.question, truth.answers, r.trajectory.answer)
        area = PAPER_GRID.union_area(names) if weights.area_of == "union" else PAPER_GRID.area(names)
        needs_crops = truth.label == "HR" if weights.missed == "label" else score < 0.5
        parts = {
            "answer": score,
            "miss": weights.miss if needs_crops and not called(r) else 0.0,
            "use": weights.use if called(r) else 0.0,
            "area": weights.area * area if called(r) else 0.0,
        }
        out.append(parts | {"reward": weights.w_ans * score - parts["miss"] - parts["use"] - parts["area"]})
    return out


def visionthink(group: list[Rollout], truth: GroundTruth, judge: Judge, weights: RewardWeights) -> list[dict[str, float]]:
    """VisionThink's reward (arXiv 2507.13348 Sec. 3.3): 1 for a right answer, 0.5 for the form, less 0.1 for a direct answer if
    fewer than a fifth of the group's right answers are direct, else for a call."""
    scores = [float(judge(truth.question, truth.answers, r.trajectory.answer) >= 0.5) for r in group]
    direct = sum(s for r, s in zip(group, scores, strict=True) if not called(r))
    share = direct / sum(scores) if sum(scores) else 0.0
    out = []
    for r, score in zip(group, scores, strict=True):
        is_charged = called(r) if share >= 0.2 else not called(r)
        parts = {"answer": score, "format": 0.0 if malformed(r) or not r.complete else 0.5, "use": 0.1 if is_charged else 0.0}
        out.append(parts | {"reward": parts["answer"] + parts["format"] - parts["use"]})
    return out


SCHEMES = {"awares": awares, "visionthink": visionthink}


def advantages(rewards: list[float], scaling: str, epsilon: float = 1e-4) -> list[float]:
    """Rewards of a group -> advantages: rewards less their mean.

    ``group_std`` divides by the group's standard deviation, without which the paper's area weight is too small to matter;
    ``dr_grpo`` and ``none`` do not (arXiv 2503.20783).
    """
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if scaling != "group_std":
        return centred
    deviation = (sum(c * c for c in centred) / max(1, len(rewards) - 1)) ** 0.5
    return [c / (deviation + epsilon) for c in centred]
