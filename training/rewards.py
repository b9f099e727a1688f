"""What a rollout is worth: the answer, less what looking cost. Every part is kept, so that a report can take it apart."""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench.methods.conversation import EventKind
from awares_bench.methods.crop_grid import PAPER_GRID

from .curation.judges import Judge
from .rollouts import Rollout

MALFORMED = (EventKind.MALFORMED_CALL, EventKind.CALL_IN_ANSWER, EventKind.MALFORMED_BOX)
"""Events of replies in a form that their method cannot use."""


@dataclass(frozen=True)
class Truth:
    """What is known about a question. label: ``LR``, ``HR``, or None when nobody knows."""

    question: str
    answers: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class Costs:
    """Weights of the composite reward ``w_ans * R_ans - C_tool`` (paper Eq. 4-6, Sec. 4.3).

    w_ans:   of the answer's score; 1 as in Eq. 5, 10 in the supplement's Table 7
    miss:    for answering directly when the label is HR
    missed:  what a miss is: ``label`` as the paper says, ``wrong`` a direct answer that scores below 0.5, which needs no label
    use:     for any call
    area:    per unit of image area that the crops cover
    area_of: ``union`` counts overlaps once, as "covered" says; ``sum`` as their tokens do
    """

    w_ans: float = 1.0
    miss: float = 2.0
    use: float = 0.25
    area: float = 0.01
    area_of: str = "union"
    missed: str = "label"


def called(rollout: Rollout) -> bool:
    return len(rollout.trajectory.turns) > 1


def malformed(rollout: Rollout) -> bool:
    return any(e.kind in MALFORMED for e in rollout.trajectory.events)


def awares(group: list[Rollout], truth: Truth, judge: Judge, costs: Costs) -> list[dict[str, float]]:
    """Parts and ``reward`` of each rollout. Where misses go by labels, nobody is charged without one."""
    out = []
    for r in group:
        names = r.trajectory.crops
        score = judge(truth.question, truth.answers, r.trajectory.answer)
        area = PAPER_GRID.union_area(names) if costs.area_of == "union" else PAPER_GRID.area(names)
        missed = truth.label == "HR" if costs.missed == "label" else score < 0.5
        parts = {
            "answer": score,
            "miss": costs.miss if missed and not called(r) else 0.0,
            "use": costs.use if called(r) else 0.0,
            "area": costs.area * area if called(r) else 0.0,
        }
        out.append(parts | {"reward": costs.w_ans * score - parts["miss"] - parts["use"] - parts["area"]})
    return out


def visionthink(group: list[Rollout], truth: Truth, judge: Judge, costs: Costs) -> list[dict[str, float]]:
    """VisionThink's reward (arXiv 2507.13348 Sec. 3.3): right 1, well-formed 0.5, and 0.1 against whichever of direct and
    high-resolution answers is too frequent among the group's right ones (direct below a share of 0.2: direct pays)."""
    scores = [float(judge(truth.question, truth.answers, r.trajectory.answer) >= 0.5) for r in group]
    direct = sum(s for r, s in zip(group, scores, strict=True) if not called(r))
    share = direct / sum(scores) if sum(scores) else 0.0
    out = []
    for r, score in zip(group, scores, strict=True):
        pays = called(r) if share >= 0.2 else not called(r)
        parts = {"answer": score, "format": 0.0 if malformed(r) or not r.complete else 0.5, "use": 0.1 if pays else 0.0}
        out.append(parts | {"reward": parts["answer"] + parts["format"] - parts["use"]})
    return out


SCHEMES = {"awares": awares, "visionthink": visionthink}


def advantages(rewards: list[float], scaling: str, epsilon: float = 1e-4) -> list[float]:
    """Rewards of a group -> advantages. ``group_std`` divides by the group's deviation (without it the paper's area weight is
    too small to matter); ``dr_grpo`` and ``none`` do not (arXiv 2503.20783)."""
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if scaling != "group_std":
        return centred
    deviation = (sum(c * c for c in centred) / max(1, len(rewards) - 1)) ** 0.5
    return [c / (deviation + epsilon) for c in centred]
