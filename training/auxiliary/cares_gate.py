"""CARES' gate: documents labelled with the smallest size that is enough, and a linear layer fitted on a proxy's hidden state.

    python -m awares_bench.training.auxiliary.cares_gate --out gate.safetensors                             (the nano world)
    python -m awares_bench.training.auxiliary.cares_gate --data train.jsonl --pretrained TARGET --proxy PROXY \\
        --sizes 384 768 1024 --view 384 --out gate.safetensors

A line of ``--data`` is {"image": path, "question": text, "answers": [text, ...]}. Labels are kept beside the gate, in
``gate.labels.jsonl``; a second call answers only what is missing there.

Paper: Kimhi et al., 2026, https://arxiv.org/abs/2510.19496: tau .85, delta .1, label smoothing .05, 6 epochs, batch 32,
learning rate 1e-3, the last token after half of the layers. Ours: standardised features (folded into the weights), Adam.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import VLM
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Sample, Turn
from awares_bench.methods.images import within
from awares_bench.methods.policy import Look, Policy
from awares_bench.methods.resolution_gate import Gate
from awares_bench.models.packaged import resolve
from awares_bench.tasks.nano import world

NANO_SEEDS = 12 << 36
"""First document seed of the gate's training, far from those of the stages of nano."""


@dataclass(frozen=True)
class AtSize(Policy):
    """Show every image with its longer side at most ``longest`` pixels."""

    longest: int = 0

    def look(self, sample: Sample) -> Look:
        return (yield sample.ask(tuple(within(image, self.longest) for image in sample.images)))


def anls(answer: str, references: Iterable[str], threshold: float = 0.5) -> float:
    """1 - edit distance / longer length, to the nearest reference, case and outer space aside; 0 below the threshold."""

    def similarity(a: str, b: str) -> float:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        return 1 - row[-1] / max(len(a), len(b), 1)

    best = max(similarity(answer.strip().lower(), r.strip().lower()) for r in references)
    return best if best >= threshold else 0.0


def label(utility: np.ndarray, tau: float = 0.85, delta: float = 0.1) -> np.ndarray:
    """Scores (N, K) at ascending sizes -> (N,) the first that reaches tau and is not beaten by more than delta; else the last."""
    later = np.maximum.accumulate(utility[:, ::-1], axis=1)[:, ::-1]  # best at this size or a larger one
    enough = (utility >= tau) & (later - utility <= delta)
    enough[:, -1] = True
    return enough.argmax(1)


def fit(
    hidden: np.ndarray,
    labels: np.ndarray,
    classes: int,
    smoothing: float = 0.05,
    epochs: int = 6,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states (N, D) and labels (N,) -> weight (K, D), bias (K,)."""
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = hidden.mean(0), hidden.std(0) + 1e-6
    x, y = torch.tensor((hidden - mean) / deviation, dtype=torch.float32), torch.tensor(labels)
    weight, bias = torch.zeros(classes, x.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            loss = cross_entropy(x[rows] @ weight.T + bias, y[rows], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    folded = weight.detach().numpy() / deviation
    return folded, bias.detach().numpy() - folded @ mean


def utilities(
    vlm: VLM, samples: Sequence[tuple[Sample, list[str]]], sizes: Sequence[int], batch_size: int, tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Samples with their answers -> (index, ANLS of the target's answer at each size); those that cannot be answered are left out."""
    found: dict[int, list[float | None]] = {}
    jobs = [(n, size) for n in range(len(samples)) for size in sizes]
    engines = {size: Engine(vlm, AtSize(longest=size), batch_size) for size in sizes}
    for size, engine in engines.items():
        mine = [n for n, s in jobs if s == size]
        for i, outcome in tqdm(engine.run(Job(samples[n][0], tokens) for n in mine), total=len(mine), desc=f"size {size}"):
            score = None if isinstance(outcome, Failure) else anls(outcome.answer, samples[mine[i]][1])
            found.setdefault(mine[i], []).append(score)
    known = ((n, [s for s in scores if s is not None]) for n, scores in sorted(found.items()))
    yield from ((n, scores) for n, scores in known if len(scores) == len(sizes))


def hidden_states(vlm: VLM, samples: Sequence[Sample], view: int, depth: float) -> np.ndarray:
    """(N, D): what the policy's probe will find for each sample's first image."""
    out = []
    for sample in tqdm(samples, desc="proxy"):
        turn = Turn((within(sample.images[0], view),), sample.question, model="proxy", probe=depth)
        out.append(vlm.probe([Request(Session(), turn, 1)])[0].hidden)
    return np.array(out)


def documents(data: Path | None, count: int) -> list[tuple[Sample, list[str]]]:
    """Lines of a JSON-lines file, or documents of the nano world that no suite has."""
    if data is None:
        families = world.FAMILIES
        made = [world.document(families[i % len(families)], NANO_SEEDS + i) for i in range(count)]
        asked = [world.prompt(d.family, d.question, d.options) for d in made]
        return [(Sample((d.image,), text, str(d.seed)), [d.answer]) for d, text in zip(made, asked, strict=True)]
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:count] if line.strip()]
    opened = lambda row: Image.open(data.parent / row["image"]).convert("RGB")  # noqa: E731
    return [(Sample((opened(r),), r["question"], str(i)), list(r["answers"])) for i, r in enumerate(rows)]


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="the gate, a safetensors file")
    p.add_argument("--data", type=Path, help="JSON lines (default: documents of the nano world)")
    p.add_argument("--documents", type=int, default=3000)
    p.add_argument("--pretrained", default="nano", help="the model under test, which decides the labels")
    p.add_argument("--proxy", help="the model whose hidden state the gate reads (default: the model under test)")
    p.add_argument("--sizes", type=int, nargs="+", default=[112, 168, 224], help="longer sides to choose from, ascending")
    p.add_argument("--view", type=int, default=112, help="longer side of the thumbnail that the proxy sees")
    p.add_argument("--depth", type=float, default=0.5, help="share of the proxy's layers")
    p.add_argument("--tau", type=float, default=0.85)
    p.add_argument("--delta", type=float, default=0.1)
    p.add_argument("--max-new-tokens", type=int, default=16)
    p.add_argument("--batch-size", type=int, default=16)
    args = p.parse_args(argv)

    target = VLM.load(resolve(args.pretrained))
    proxy = VLM.load(resolve(args.proxy)) if args.proxy else target
    samples = documents(args.data, args.documents)
    kept = args.out.with_suffix(".labels.jsonl")
    of = {"pretrained": args.pretrained, "data": str(args.data), "sizes": args.sizes}
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    other = next((r for r in rows if any(r[k] != v for k, v in of.items())), None)
    if other:
        raise SystemExit(f"{kept} holds labels of another run ({ {k: other[k] for k in of} }); delete it, or pass another --out")
    known = {r["document"]: r["scores"] for r in rows}
    missing = [i for i in range(len(samples)) if i not in known]
    with kept.open("a") as file:
        for n, scores in utilities(target, [samples[i] for i in missing], args.sizes, args.batch_size, args.max_new_tokens):
            known[missing[n]] = scores
            file.write(json.dumps({"document": missing[n], **of, "scores": scores}) + "\n")
    used = sorted(known)
    labels = label(np.array([known[i] for i in used]), args.tau, args.delta)
    hidden = hidden_states(proxy, [samples[i][0] for i in used], args.view, args.depth)
    held = max(1, len(used) // 10)  # the last tenth judges the gate
    weight, bias = fit(hidden[:-held], labels[:-held], len(args.sizes))
    right = ((hidden[-held:] @ weight.T + bias).argmax(1) == labels[-held:]).mean()
    common = (labels[-held:] == np.bincount(labels[:-held]).argmax()).mean()
    Gate(weight, bias, tuple(args.sizes), args.view, args.depth, args.proxy or args.pretrained).save(args.out)
    shares = ", ".join(f"{s}: {(labels == k).mean():.2f}" for k, s in enumerate(args.sizes))
    print(f"{args.out}: {right:.3f} of {held} held-out labels right (always the commonest: {common:.3f}); labels {shares}")


if __name__ == "__main__":
    main()
