"""Rewards of rollouts: the score of the answer less the cost of looking. Each part is kept beside the sum, for logs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from awares_bench.methods.conversation import EventKind
from awares_bench.methods.crop_grid import PAPER_GRID, Box

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
    evidence: tuple[Box, ...] | None = None
    """Boxes that hold the answer, in pixels of the only image; None where the data does not say."""
    size: tuple[int, int] | None = None
    """Width and height of the only image; None where there is none, or several."""


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
    crop: float = 0.1
    """Of a crop that its judge accepts, in AdaptVision's tool reward (its code; the paper: 1)."""
    crop_area: float = 0.2
    """Of a crop's area beyond the mean of its group, in AdaptVision's tool reward (its code; the paper's alpha: 2)."""
    region: float = 1.0
    """Of a region from which alone the answer can be read, in ERGO's reward (the paper's alpha)."""
    small: float = 0.5
    """Of a region of at most ``largest_region``, in ERGO's reward (the paper's beta)."""
    largest_region: float = 0.6
    """Share of the image that a region may have to earn ``small`` (the paper's gamma)."""


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


def area_share(box: Box, size: tuple[int, int]) -> float:
    """The share of a (width, height) picture that a box covers, what lies outside left out."""
    width = max(0, min(box[2], size[0]) - max(box[0], 0))
    height = max(0, min(box[3], size[1]) - max(box[1], 0))
    return width * height / (size[0] * size[1])


def crop_area(rollout: Rollout, truth: GroundTruth) -> float | None:
    """The share of the image in the box that the model called for; None without a box that could be used."""
    boxes = rollout.trajectory.boxes
    return area_share(boxes[0], truth.size) if boxes and truth.size and not malformed(rollout) else None


def covered(rollout: Rollout, truth: GroundTruth) -> float:
    """The share of the image that the regions or the box which the model called for cover; 0 without a call that could be used."""
    crops = rollout.trajectory.crops
    return PAPER_GRID.union_area(crops) if crops else crop_area(rollout, truth) or 0.0


ANSWER = r"<think>(?:(?!</think>).)*</think>\s*<answer>(?:(?!</answer>).)*</answer>"
CALL = r"<think>(?:(?!</think>).)*</think>\s*<tool_call>(?:(?!</tool_call>).)*</tool_call>"


def in_form(replies: Sequence[str]) -> bool:
    """Whether replies are a thought and an answer, or a thought and a call and then those (AdaptVision's ``general_qa_bbox.py``)."""
    forms = {1: (ANSWER,), 2: (CALL, ANSWER)}.get(len(replies), ())
    return bool(forms) and all(re.fullmatch(f, reply, re.DOTALL) for f, reply in zip(forms, replies, strict=True))


def adaptvision(
    group: list[Rollout], truth: GroundTruth, judge: Judge, weights: RewardWeights, accepted: Sequence[float]
) -> list[dict[str, float]]:
    """AdaptVision's two rewards (arXiv 2512.03794 Sec. 3.2, values of its code): ``reward`` for the outcome, ``tool`` for the crop.

    accepted: of each rollout, 1 where its crop holds what the question needs. Outcome: 1 for a right answer, 0.5 for the form, less 0.1
    for a right answer that called, and for a right direct one where these are some and fewer than a fifth of the group's right answers.
    """
    scores = [float(judge(truth.question, truth.answers, r.trajectory.answer) >= 0.5) for r in group]
    shares = [crop_area(r, truth) for r in group]
    taken = [float(a >= 0.5) if share is not None else 0.0 for a, share in zip(accepted, shares, strict=True)]
    direct = sum(s for r, s in zip(group, scores, strict=True) if not called(r))
    share_direct = direct / sum(scores) if sum(scores) else 0.0
    counted = [share for share, s, t in zip(shares, scores, taken, strict=True) if share is not None and s and t]
    mean = sum(counted) / len(counted) if counted else 0.0
    out = []
    for r, score, share, crop in zip(group, scores, shares, taken, strict=True):
        charged = called(r) or 0 < share_direct < 0.2
        beyond = min(max(share / mean - 1, 0.0), 1.0) if share and mean and score and crop else 0.0
        form = in_form([reply.text for reply in r.trajectory.replies]) and not malformed(r) and r.complete
        parts = {"answer": score, "format": 0.5 * form, "use": 0.1 if score and charged else 0.0, "crop": crop, "area": beyond}
        parts["tool"] = weights.crop * crop - weights.crop_area * beyond
        out.append(parts | {"reward": parts["answer"] + parts["format"] - parts["use"]})
    return out


def ergo(
    group: list[Rollout], truth: GroundTruth, judge: Judge, weights: RewardWeights, accepted: Sequence[float]
) -> list[dict[str, float]]:
    """ERGO's reward (arXiv 2509.21991): a right answer, the form, a region that suffices alone, and one that is not the whole image.

    accepted: of each rollout, 1 where a frozen model answers from the crop alone. The weight of the form is not published; 1 is ours.
    """
    out = []
    for r, alone in zip(group, accepted, strict=True):
        share = crop_area(r, truth)
        replies = [reply.text for reply in r.trajectory.replies]
        form = not malformed(r) and r.complete and bool(re.search(r"<answer>.*</answer>", replies[-1], re.DOTALL))
        parts = {"answer": float(judge(truth.question, truth.answers, r.trajectory.answer) >= 0.5), "format": float(form)}
        parts["region"] = float(alone >= 0.5) if share is not None else 0.0
        parts["small"] = float(share is not None and 0 < share <= weights.largest_region)
        regions = weights.region * parts["region"] + weights.small * parts["small"]
        out.append(parts | {"reward": parts["answer"] + parts["format"] + regions})
    return out


def covers(boxes: Sequence[Box], evidence: Sequence[Box]) -> bool:
    """Whether the first box holds all of the evidence."""
    if not boxes:
        return False
    left, top, right, bottom = boxes[0]
    return all(left <= e[0] and top <= e[1] and right >= e[2] and bottom >= e[3] for e in evidence)


SCHEMES = {"awares": awares, "visionthink": visionthink}

CROP_SCHEMES = {"adaptvision": adaptvision, "ergo": ergo}
"""Schemes that are also told whether each crop is accepted."""


def turn_advantages(
    outcome: list[float], tool: list[float], turns: list[int], scaling: str, share: float, epsilon: float = 1e-6
) -> list[tuple[float, ...]]:
    """Of each rollout, the advantage of each of its turns (AdaptVision's decoupled turns, arXiv 2512.03794 Sec. 3.3).

    Both rewards are compared with the group apart; the first turn has the outcome's advantage and ``share`` of the tool's, later turns
    the outcome's alone. turns: how many each rollout has.
    """
    whole, looked = advantages(outcome, scaling, epsilon), advantages(tool, scaling, epsilon)
    return [(a + share * b, *[a] * (n - 1)) for a, b, n in zip(whole, looked, turns, strict=True)]


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
