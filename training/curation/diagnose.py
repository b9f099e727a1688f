"""When and where a model asks for crops, against what is known: call precision and recall, regions, shares, forced probes.

From the records of an evaluation, no model is needed: labels come from the nano suite's own columns. From a checkpoint and a
file of labels (``labels.parquet`` of a curation), the model answers the rows three ways: as it likes, with no call allowed,
and with the oracle's call put in its mouth. Definitions: paper Fig. 4-5, supplement Tables 3 and 5.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from awares_bench.awares import AwaRes
from awares_bench.evaluation.records import read_records
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import VLM
from awares_bench.methods.conversation import Failure, Sample, Trajectory
from awares_bench.methods.crop_grid import PAPER_GRID

from .. import examples
from ..packing import Features
from ..rewards import union_area
from ..rollouts import InStep, Sampler
from .crop_oracles import answers_with, hull, iou
from .judges import judge


@dataclass(frozen=True)
class Decision:
    """What a model asked for on a question, and what it should have. crops, oracle: names, empty for a direct answer.

    label: LR, HR, or None where nobody knows. malformed: the reply began as a call and was none.
    """

    crops: tuple[str, ...]
    label: str | None
    oracle: tuple[str, ...] = ()
    malformed: bool = False


def figures(decisions: list[Decision]) -> dict:
    """Decisions -> figures. None where nothing could be counted, such as a precision without calls.

    exact_region: of the calls on HR questions, those for exactly the oracle's crops; iou_25: those whose hull overlaps the
    oracle's with an IoU of 0.25 or more. false_call_rate: calls among LR questions. mean_area: of the calls, overlaps once.
    """
    known = [d for d in decisions if d.label]
    calls = [d for d in known if d.crops]
    hard = [d for d in known if d.label == "HR"]
    hit = [d for d in calls if d.label == "HR"]
    placed = [d for d in hit if d.oracle]
    precision, recall = _ratio(len(hit), len(calls)), _ratio(len(hit), len(hard))
    asked = [d for d in decisions if d.crops]
    return {
        "questions": len(decisions),
        "labelled": len(known),
        "call_rate": _ratio(len(asked), len(decisions)),
        "share_HR": _ratio(len(hard), len(known)),
        "call_precision": precision,
        "call_recall": recall,
        "call_f1": None if not (precision and recall) else 2 * precision * recall / (precision + recall),
        "false_call_rate": _ratio(len(calls) - len(hit), len(known) - len(hard)),
        "exact_region": _ratio(sum(set(d.crops) == set(d.oracle) for d in placed), len(placed)),
        "iou_25": _ratio(sum(_overlap(d.crops, d.oracle) >= 0.25 for d in placed), len(placed)),
        "mean_area": sum(union_area(d.crops) for d in asked) / len(asked) if asked else None,
        "valid_parse": 1 - sum(d.malformed for d in decisions) / len(decisions) if decisions else None,
        "shares": shares([d.crops for d in decisions]),
        "oracle_shares": shares([d.oracle if d.label == "HR" else () for d in known]),
    }


def shares(chosen: list[tuple[str, ...]]) -> dict[str, float]:
    """Share of the questions answered directly and with each crop (two crops count as ``several``), as paper Fig. 4-5."""
    count = Counter("direct" if not c else c[0] if len(c) == 1 else "several" for c in chosen)
    return {n: count[n] / len(chosen) for n in ("direct", *PAPER_GRID.names, "all", "several") if chosen and count[n]}


def _ratio(a: int, b: int) -> float | None:
    return a / b if b else None


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    return iou(hull(PAPER_GRID.boxes(400, 400, a)), hull(PAPER_GRID.boxes(400, 400, b)))


def from_records(run: Path, suite: Path) -> dict[str, dict]:
    """Records of an evaluation on a nano suite -> figures per task and over all. Raises ValueError when nothing matches."""
    import pandas

    known, decisions = {}, {}
    for path in sorted(Path(suite).glob("*.parquet")):
        columns = pandas.read_parquet(path, columns=["low_is_enough", "evidence"])
        known[path.stem] = [
            ("LR", ()) if low else ("HR", PAPER_GRID.cheapest_cover([tuple(b) for b in evidence], 224, 224))
            for low, evidence in zip(columns.low_is_enough, columns.evidence, strict=True)
        ]
    for r in read_records(run):
        task = next((t for t in known if r.task == t or r.task.endswith(t)), None)
        if task and r.error is None:
            bad = any(e["kind"] in ("malformed_call", "call_in_answer") for e in r.events)
            decisions.setdefault(task, []).append(Decision(tuple(r.crops), *known[task][r.doc_id], malformed=bad))
    if not decisions:
        raise ValueError(f"no record in {run} belongs to a task of {suite} ({', '.join(known) or 'no parquet files'})")
    return {t: figures(d) for t, d in decisions.items()} | {"all": figures([x for d in decisions.values() for x in d])}


def probe(vlm: VLM, labels: str, limit: int | None = None, rule: str = "anls", max_new_tokens: int = 32, batch: int = 16) -> dict:
    """A checkpoint on labelled rows -> figures, and its scores as it likes, without calls, and with the oracle's call.

    The scores of the two forced ways are over the questions whose label is HR and whose oracle names crops, where looking
    should pay, and (direct) over those whose label is LR.
    """
    table, policy, score = examples.rows(labels, ("image", "question", "answers", "label")), AwaRes(), judge(rule)
    rows = [table[i] for i in range(min(limit or len(table), len(table)))]
    samples = [examples.sample(r, i, 2000) for i, r in enumerate(rows)]
    free: dict[int, Trajectory | Failure] = dict(Engine(vlm, policy, batch).run(Job(s, max_new_tokens) for s in samples))
    features = Features(vlm, 256)
    scores: dict[str, list[float]] = {k: [] for k in ("free", "free_HR", "direct_HR", "oracle_HR", "free_LR", "direct_LR")}
    decisions = []
    for i, (row, sample) in enumerate(tqdm(list(zip(rows, samples, strict=True)), desc="probes", disable=None)):
        outcome, accepted = free[i], examples.answers(row)
        if isinstance(outcome, Failure):
            continue
        oracle = tuple(row.get("crops") or ())
        bad = any(e.kind in ("malformed_call", "call_in_answer") for e in outcome.events)
        decisions.append(Decision(outcome.crops, row["label"], oracle, bad))
        right = score(sample.question, accepted, outcome.answer)
        scores["free"].append(right)
        if row["label"] in ("LR", "HR"):
            scores[f"free_{row['label']}"].append(right)
            scores[f"direct_{row['label']}"].append(
                score(sample.question, accepted, direct(vlm, sample, features, max_new_tokens))
            )
        if row["label"] == "HR" and oracle:
            (reply,) = answers_with(vlm, policy, sample, [oracle], features, max_new_tokens)
            scores["oracle_HR"].append(score(sample.question, accepted, reply.text))
    means = {k: sum(v) / len(v) if v else None for k, v in scores.items()}
    return figures(decisions) | {"score": means}


def direct(vlm: VLM, sample: Sample, features: Features, max_new_tokens: int) -> str:
    """The greedy answer to the first turn when it may not begin as a call."""
    sampler = Sampler(vlm, features, 0.0)
    starts = {vlm.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in ("GET_CROPS:", " GET_CROPS:")}
    sampler.never_first = sorted(starts)
    ((_, outcome),) = InStep(sampler, AwaRes(on_malformed="answer")).run([Job(sample, max_new_tokens)])
    return outcome.answer


def show(found: dict, indent: str = "") -> str:
    """Figures as lines; null stays null."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", show(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{name:<18}{'null' if value is None else f'{value:.3f}' if isinstance(value, float) else value}"
            )
    return "\n".join(lines)
