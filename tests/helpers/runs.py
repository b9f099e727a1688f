"""Run folders as demo and run write them, made of numbers that a test can follow by hand."""

import json
from pathlib import Path

from awares_bench.evaluation.records import Record, RunFolder
from awares_bench.methods.usage import Usage

METRIC = {"nano_doc": "anls", "nano_chart": "relaxed_overall", "nano_pope": "pope_accuracy", "docvqa_val": "anls"}

DOCUMENTS = [(1.0, [16], []), (0.5, [16, 16], ["top-left"]), (0.0, [16, 64], ["all"]), (1.0, [16], [])]
"""(score, visual tokens per turn, crops), each with 64 tokens at full resolution."""


def write_run(
    out: Path,
    name: str,
    tasks: dict[str, list],
    identity: dict | None = None,
    status: str = "complete",
    limit: int | None = None,
    question: str = "question {}?",
    machine: str = "cpu A",
    batch_size: int = 1,
    lmms_eval: str = "0.7.3",
) -> Path:
    """``out/runs/name`` and ``out/lmms/name``; returns ``out``. Turn i takes 0.01 s to encode and 0.02 s to prefill."""
    known = {
        "method": name,
        "fields": {},
        "pretrained": "nano",
        "weights": "w1",
        "dtype": "float32",
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
    run = RunFolder(out / "runs" / name, known | (identity or {}))
    samples = out / "lmms" / name / "model"
    samples.mkdir(parents=True)
    for task, documents in tasks.items():
        lines = []
        for i, (score, spent, crops) in enumerate(documents):
            usage = [
                Usage(encoded=t, prefill=float(t), text=10, output=2, encode_seconds=0.01, prefill_seconds=0.02).as_dict()
                for t in spent
            ]
            replies = ["GET_CROPS: ['3']"] * (len(spent) - 1) + ["a"]
            asked = question.format(i)
            sizes = [[[112, 112]]] + [[[224, 224]]] * (len(spent) - 1)
            run.add(Record(task, i, "test", asked, "a", replies, crops, sum(spent) / 64, 64, usage, sizes, batch_size=batch_size))
            value = {"score": score} if task == "nano_pope" else score
            lines.append(json.dumps({"doc_id": i, METRIC[task]: value, "target": "a", "filtered_resps": "a", "input": asked}))
        (samples / f"20260101_samples_{task}.jsonl").write_text("\n".join(lines) + "\n")
    results = {"config": {"limit": limit, "model": name}, "versions": {t: 1.0 for t in tasks}, "model_name": "nano"}
    (samples / "20260101_results.json").write_text(json.dumps(results))
    run.close()
    told = json.loads((run.folder / "run.json").read_text())
    told |= {
        "status": status,
        "machine": {"cpu": machine},
        "versions": {"lmms-eval": lmms_eval},
        "commit": {"head": "c" * 40, "dirty": False},
    }
    (run.folder / "run.json").write_text(json.dumps(told))
    return out


def full(n: int = 4) -> list:
    return [(1.0, [64], [])] * n


def low(n: int = 4) -> list:
    return [(float(i % 2), [16], []) for i in range(n)]
