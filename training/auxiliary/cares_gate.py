"""Trains CARES' gate: labels documents with the smallest size that is enough, and fits a linear layer on a proxy's hidden state.

    awares-bench train gate --out gate.safetensors                             (the nano world)
    awares-bench train gate --data train.jsonl --pretrained TARGET --proxy PROXY \\
        --sizes 384 768 1024 --view 384 --out gate.safetensors

A line of ``--data`` is {"image": path, "question": text, "answers": [text, ...]}. Labels are kept beside the gate, in
``gate.labels.jsonl``; a second run answers only the documents that are missing there.

Paper: Kimhi et al., 2026, https://arxiv.org/abs/2510.19496: tau .85, delta .1, label smoothing .05, 6 epochs, batch 32,
learning rate 1e-3, the last token after half of the layers. Ours: standardised features (folded into the weights), Adam.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Sample, Turn
from awares_bench.methods.images import share_of, within
from awares_bench.methods.policy import Policy, TurnGenerator
from awares_bench.methods.resolution_gate import Gate
from awares_bench.models.packaged import resolve
from awares_bench.tasks.nano import world

from .. import script
from ..curation.judges import anls

NANO_SEEDS = 12 << 36
"""First document seed of the gate's training, far from those of the stages of nano."""


@dataclass(frozen=True)
class AtSize(Policy):
    """Show every image with its longer side at most ``longest`` pixels."""

    longest: int = 0

    def turns(self, sample: Sample) -> TurnGenerator:
        views = tuple(within(image, self.longest) for image in sample.images)
        shares = tuple(share_of(view, image) for view, image in zip(views, sample.images, strict=True))
        return (yield sample.ask(views, shares=shares))


def label(utility: np.ndarray, tau: float = 0.85, delta: float = 0.1) -> np.ndarray:
    """Scores (N, K) at ascending sizes -> index (N,) of the smallest size that is enough, else of the largest.

    Enough: its score is at least tau, and no larger size is better by more than delta.
    """
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
    """Hidden states (N, D) and labels (N,) -> weight (K, D), bias (K,) of a linear classifier.

    It is fitted on standardised states; mean and deviation are folded into weight and bias.
    """
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
    vlm: LocalModel, samples: Sequence[tuple[Sample, list[str]]], sizes: Sequence[int], batch_size: int, tokens: int
) -> Iterator[tuple[int, list[float]]]:
    """Samples with their answers -> (index, ANLS of the target's answer at each size).

    tokens: most of an answer. A sample that cannot be answered at some size is left out.
    """
    scores: dict[int, list[float | None]] = {n: [] for n in range(len(samples))}
    for size in sizes:
        engine = Engine(vlm, AtSize(longest=size), batch_size)
        jobs = (Job(sample, tokens) for sample, _ in samples)
        for n, outcome in tqdm(engine.run(jobs), total=len(samples), desc=f"size {size}"):
            sample, answers = samples[n]
            failed = isinstance(outcome, Failure)
            scores[n].append(None if failed else anls(sample.question, tuple(answers), outcome.answer))
    for n, of_sizes in scores.items():
        known = [score for score in of_sizes if score is not None]
        if len(known) == len(of_sizes):
            yield n, known


def hidden_states(vlm: LocalModel, samples: Sequence[Sample], view: int, depth: float) -> np.ndarray:
    """(N, D): the state that the gate reads, of each sample's first image at ``view`` pixels, after a ``depth`` of the layers."""
    states = []
    for sample in tqdm(samples, desc="proxy"):
        thumbnail = within(sample.images[0], view)
        share = share_of(thumbnail, sample.images[0])
        turn = Turn((thumbnail,), sample.question, shares=(share,), model="proxy", hidden_state_depth=depth)
        states.append(vlm.hidden_states([Request(Session(), turn, 1)])[0].hidden)
    return np.array(states)


def documents(data: Path | None, count: int) -> list[tuple[Sample, list[str]]]:
    """At most ``count`` samples with their answers: of a JSON-lines file, or of the nano world, which no suite has."""
    if data is None:
        families = world.FAMILIES
        nano = [world.document(families[i % len(families)], NANO_SEEDS + i) for i in range(count)]
        return [(Sample((d.image,), world.prompt(d.family, d.question, d.options), str(d.seed)), [d.answer]) for d in nano]
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:count] if line.strip()]
    images = [Image.open(data.parent / row["image"]).convert("RGB") for row in rows]
    return [
        (Sample((image,), row["question"], str(i)), list(row["answers"]))
        for i, (row, image) in enumerate(zip(rows, images, strict=True))
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the gate, a safetensors file")
    parser.add_argument("--data", type=Path, help="JSON lines (default: documents of the nano world)")
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--pretrained", default="nano", help="the model under test, which decides the labels")
    parser.add_argument("--proxy", help="the model whose hidden state the gate reads (default: the model under test)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 168, 224], help="longer sides to choose from, ascending")
    parser.add_argument("--view", type=int, default=112, help="longer side of the thumbnail that the proxy sees")
    parser.add_argument("--depth", type=float, default=0.5, help="share of the proxy's layers")
    parser.add_argument("--tau", type=float, default=0.85)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)


def main(args: argparse.Namespace) -> int:
    target = LocalModel.load(resolve(args.pretrained))
    proxy = LocalModel.load(resolve(args.proxy)) if args.proxy else target
    samples = documents(args.data, args.documents)

    # 1) Score the target's answers at every size, except those that an earlier run of the same settings has stored.
    store = args.out.with_suffix(".labels.jsonl")
    settings = {"pretrained": args.pretrained, "data": str(args.data), "sizes": args.sizes}
    rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    if other := next((r for r in rows if any(r[k] != v for k, v in settings.items())), None):
        theirs = {k: other[k] for k in settings}
        raise ValueError(f"{store} holds labels of another run ({theirs}); delete it, or pass another --out")
    scores = {r["document"]: r["scores"] for r in rows}
    missing = [i for i in range(len(samples)) if i not in scores]
    with store.open("a") as file:
        new = [samples[i] for i in missing]
        for n, of_sizes in utilities(target, new, args.sizes, args.batch_size, args.max_new_tokens):
            scores[missing[n]] = of_sizes
            file.write(json.dumps({"document": missing[n], **settings, "scores": of_sizes}) + "\n")

    # 2) Label the documents, and read the proxy's states of them.
    usable = sorted(scores)
    labels = label(np.array([scores[i] for i in usable]), args.tau, args.delta)
    hidden = hidden_states(proxy, [samples[i][0] for i in usable], args.view, args.depth)

    # 3) Fit the gate on all but the last tenth, and compare it there with the commonest label.
    test = max(1, len(usable) // 10)
    weight, bias = fit(hidden[:-test], labels[:-test], len(args.sizes))
    accuracy = ((hidden[-test:] @ weight.T + bias).argmax(1) == labels[-test:]).mean()
    baseline = (labels[-test:] == np.bincount(labels[:-test]).argmax()).mean()
    Gate(weight, bias, tuple(args.sizes), args.view, args.depth, args.proxy or args.pretrained).save(args.out)
    shares = ", ".join(f"{s}: {(labels == k).mean():.2f}" for k, s in enumerate(args.sizes))
    print(f"{args.out}: {accuracy:.3f} of {test} held-out labels right (always the commonest: {baseline:.3f}); labels {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(script.run(__doc__, add_arguments, main))
