"""When and where a model asks for crops, compared with labels and the oracle (paper Fig. 4-5, supplement Tables 3 and 5).

From the records of an evaluation, which needs no model: the labels are columns of the nano suite. Or from a checkpoint and a file
of labels (``labels.parquet`` of a curation): the model answers each row freely, with calls forbidden, and with the oracle's call
forced.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from awares_bench.awares import AwaRes
from awares_bench.evaluation.records import read_records
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.image_features import FeatureStore
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import EventKind, Failure, Sample, Trajectory
from awares_bench.methods.crop_grid import PAPER_GRID, hull, iou
from awares_bench.models.packaged import resolve

from .. import examples
from ..rollouts import SamplingModel
from .crop_oracles import answers_with
from .judges import judge


@dataclass(frozen=True)
class Decision:
    """What a model asked for on a question, and what it needs."""

    crops: tuple[str, ...]
    """Names of the crops it asked for; empty for a direct answer."""
    label: str | None
    """``LR``, ``HR``, or None where nobody knows."""
    oracle: tuple[str, ...] = ()
    """Names of the crops that the oracle would ask for."""
    malformed: bool = False
    """Whether the reply began as a call and was none."""


def decision_metrics(decisions: list[Decision]) -> dict:
    """Rates over decisions; None where there is nothing to count, such as a precision without calls.

    false_call_rate: calls among LR questions. Of the calls on HR questions, exact_region: those for exactly the oracle's crops;
    iou_25: those whose hull has an IoU of at least 0.25 with the oracle's. mean_area: of the calls, overlaps counted once.
    """
    labelled = [d for d in decisions if d.label]
    hard = [d for d in labelled if d.label == "HR"]
    calls = [d for d in labelled if d.crops]
    hits = [d for d in calls if d.label == "HR"]
    comparable = [d for d in hits if d.oracle]
    callers = [d for d in decisions if d.crops]  # those without a label too
    precision, recall = _ratio(len(hits), len(calls)), _ratio(len(hits), len(hard))
    return {
        "questions": len(decisions),
        "labelled": len(labelled),
        "call_rate": _ratio(len(callers), len(decisions)),
        "share_HR": _ratio(len(hard), len(labelled)),
        "call_precision": precision,
        "call_recall": recall,
        "call_f1": None if not (precision and recall) else 2 * precision * recall / (precision + recall),
        "false_call_rate": _ratio(len(calls) - len(hits), len(labelled) - len(hard)),
        "exact_region": _ratio(sum(set(d.crops) == set(d.oracle) for d in comparable), len(comparable)),
        "iou_25": _ratio(sum(_overlap(d.crops, d.oracle) >= 0.25 for d in comparable), len(comparable)),
        "mean_area": _ratio(sum(PAPER_GRID.union_area(d.crops) for d in callers), len(callers)),
        "valid_parse": 1 - sum(d.malformed for d in decisions) / len(decisions) if decisions else None,
        "shares": shares([d.crops for d in decisions]),
        "oracle_shares": shares([d.oracle if d.label == "HR" else () for d in labelled]),
    }


def shares(choices: list[tuple[str, ...]]) -> dict[str, float]:
    """Share of the questions answered directly and with each crop (two crops count as ``several``), as in paper Fig. 4-5."""
    count = Counter("direct" if not c else c[0] if len(c) == 1 else "several" for c in choices)
    return {n: count[n] / len(choices) for n in ("direct", *PAPER_GRID.names, "all", "several") if choices and count[n]}


def _ratio(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    return iou(hull(PAPER_GRID.boxes(400, 400, a)), hull(PAPER_GRID.boxes(400, 400, b)))


def from_records(run: Path, suite: Path) -> dict[str, dict]:
    """Records of an evaluation on a nano suite -> metrics per task and over all. Raises ValueError when no record matches."""
    import pandas

    labels: dict[str, list] = {}
    decisions: dict[str, list[Decision]] = {}
    for path in sorted(Path(suite).glob("*.parquet")):
        columns = pandas.read_parquet(path, columns=["low_is_enough", "evidence"])
        labels[path.stem] = [
            ("LR", ()) if low else ("HR", PAPER_GRID.cheapest_cover([tuple(b) for b in evidence], 224, 224))
            for low, evidence in zip(columns.low_is_enough, columns.evidence, strict=True)
        ]
    for r in read_records(run):
        task = next((t for t in labels if r.task == t or r.task.endswith(t)), None)
        if task and r.error is None:
            malformed = r.malformed_call is not None or any(e["kind"] == EventKind.CALL_IN_ANSWER for e in r.events)
            label, oracle = labels[task][r.doc_id]
            decisions.setdefault(task, []).append(Decision(tuple(r.crops), label, oracle, malformed))
    if not decisions:
        raise ValueError(f"no record in {run} belongs to a task of {suite} ({', '.join(labels) or 'no parquet files'})")
    return {t: decision_metrics(d) for t, d in decisions.items()} | {
        "all": decision_metrics([x for d in decisions.values() for x in d])
    }


def probe(
    vlm: LocalModel, labels: str, limit: int | None = None, rule: str = "anls", max_new_tokens: int = 32, batch: int = 16
) -> dict:
    """A checkpoint on labelled rows -> the metrics of its calls, and its mean scores.

    free: as it decides by itself; direct: with calls forbidden; oracle: with the oracle's call forced, over the HR questions
    whose oracle names crops. _HR, _LR: over the questions with that label. None where there are none.
    """
    table, policy, score = examples.rows(labels, ("image", "question", "answers", "label")), AwaRes(), judge(rule)
    rows = [table[i] for i in range(min(limit or len(table), len(table)))]
    samples = [examples.sample(r, i, 2000) for i, r in enumerate(rows)]
    free: dict[int, Trajectory | Failure] = dict(Engine(vlm, policy, batch).run(Job(s, max_new_tokens) for s in samples))
    vlm.features = vlm.features or FeatureStore(256 * 2**20)
    scores: dict[str, list[float]] = {k: [] for k in ("free", "free_HR", "direct_HR", "oracle_HR", "free_LR", "direct_LR")}
    decisions = []
    for i, (row, sample) in enumerate(tqdm(list(zip(rows, samples, strict=True)), desc="forced replies", disable=None)):
        outcome, accepted = free[i], examples.answers(row)
        if isinstance(outcome, Failure):
            continue
        oracle = tuple(row.get("crops") or ())
        malformed = outcome.malformed_call is not None or any(e.kind == EventKind.CALL_IN_ANSWER for e in outcome.events)
        decisions.append(Decision(outcome.crops, row["label"], oracle, malformed))
        right = score(sample.question, accepted, outcome.answer)
        scores["free"].append(right)
        if row["label"] in ("LR", "HR"):
            scores[f"free_{row['label']}"].append(right)
            scores[f"direct_{row['label']}"].append(score(sample.question, accepted, direct(vlm, sample, max_new_tokens)))
        if row["label"] == "HR" and oracle:
            (reply,) = answers_with(vlm, policy, sample, [oracle], max_new_tokens)
            scores["oracle_HR"].append(score(sample.question, accepted, reply.text))
    means = {k: sum(v) / len(v) if v else None for k, v in scores.items()}
    return decision_metrics(decisions) | {"score": means}


def direct(vlm: LocalModel, sample: Sample, max_new_tokens: int) -> str:
    """The greedy answer to the first turn when the reply must not begin as a call."""
    starts = {vlm.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in ("GET_CROPS:", " GET_CROPS:")}
    sampling = SamplingModel(vlm, 0.0, banned_first=tuple(sorted(starts)))
    ((_, outcome),) = Engine(sampling, AwaRes(on_malformed="answer")).run([Job(sample, max_new_tokens)])
    if isinstance(outcome, Failure):
        raise ValueError(f"sample {sample.key!r} cannot be answered: {outcome.error}")
    return outcome.answer


def show(metrics: dict, indent: str = "") -> str:
    """Metrics as lines of text; None is shown as null."""
    lines = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", show(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{name:<18}{'null' if value is None else f'{value:.3f}' if isinstance(value, float) else value}"
            )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run folder of an evaluation on a nano suite, or a checkpoint (with --labels)")
    parser.add_argument("--labels", help="labels.parquet of a curation: the checkpoint answers its rows, probes included")
    parser.add_argument("--suite", type=Path, help="folder of the nano suite the run was on (default: the one in the package)")
    parser.add_argument("--limit", type=int, help="rows of the labels (default: all)")
    parser.add_argument("--judge", default="anls", choices=("exact", "relaxed", "anls"))
    parser.add_argument("--out", type=Path, help="also write the figures there as JSON")


def main(args: argparse.Namespace) -> int:
    """``awares-bench diagnose``."""
    if args.labels:
        metrics = probe(LocalModel.load(resolve(args.run)), args.labels, args.limit, args.judge)
    else:
        suite = args.suite or Path(str(files("awares_bench.tasks.nano") / "awares_nano.yaml")).parent
        metrics = from_records(Path(args.run), suite)
    print(show(metrics))
    if args.out:
        args.out.write_text(json.dumps(metrics, indent=1))
    return 0
