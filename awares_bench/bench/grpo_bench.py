"""``awares-bench bench grpo``: a GRPO step of ours beside one of TRL's GRPOTrainer, on the same weights, prompts and budget.

Both sample two-turn AwaRes conversations on nano documents, reward them alike (TRL's side has no area term), score them under the
trained model and a frozen reference, and take one AdamW step on the decoder in float32; the tower is frozen. TRL runs in its own
environment (``trl_worker``), in the only public way it has for a second turn with new pictures. Its first-turn prompts must equal
ours to the token. The two sides take steps in turn; the first of each does not count. They sample different conversations, so
both call rates are printed.

Pushed tokens are rows times columns of every call of the decoder, padding included: prefill and decode of the rollout, the
reference, the loss, and once more the loss for the backward pass, which does about twice the work of a forward pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from transformers import TrainerCallback

from awares_bench.awares import CALL_BUDGET
from awares_bench.errors import AwaresError
from awares_bench.evaluation.provenance import provenance
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.models.packaged import resolve
from awares_bench.training import grpo
from awares_bench.training.curation.pipeline import nano_rows
from awares_bench.training.recipe import check

from .engine_bench import Ratio
from .trl_worker import Tokens

PUSHED = ("prefill", "decode", "reference", "loss", "backward")


class TRLError(AwaresError, RuntimeError):
    """TRL's side did not take its step. Its text holds what that process printed last."""


class Worker:
    """A process in TRL's environment that takes a step on request.

    python: interpreter of that environment; job: see ``_job``; folder: for its files.
    """

    def __init__(self, python: str, job: dict, folder: Path):
        (folder / "job.json").write_text(json.dumps(job))
        self.errors = folder / "trl.txt"
        script = Path(__file__).with_name("trl_worker.py")
        with self.errors.open("w") as file:
            self.process = subprocess.Popen(
                [python, "-I", str(script), str(folder / "job.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None  # pipes, as asked for above
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.version = self.read()["trl"]

    def read(self) -> dict:
        line = self.stdout.readline()
        if not line:
            self.process.wait()
            raise TRLError("TRL's side ended without an answer:\n" + "\n".join(self.errors.read_text().splitlines()[-12:]))
        return json.loads(line)

    def step(self) -> dict:
        self.stdin.write("step\n")
        self.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.stdin.close()
        self.process.wait()


class Alternate(TrainerCallback):
    """Lets the worker take a step after each of ours. ours, theirs: seconds, tokens and call rate of each step."""

    def __init__(self, trainer: grpo.GRPOTrainer, worker: Worker | None):
        reference = trainer.reference.host.model if trainer.reference else None
        self.trainer, self.worker, self.tokens = trainer, worker, Tokens(trainer.scorer.host.model, reference)
        self.ours: list[dict] = []
        self.theirs: list[dict] = []

    def on_train_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.trainer.vlm.synchronise()
        seconds, call_rate = time.perf_counter() - self.start, self.trainer.step_metrics["call_rate"][-1]
        self.ours.append({"seconds": seconds, "tokens": self.tokens.take(), "call_rate": call_rate})
        if self.worker:
            self.theirs.append(self.worker.step())
        self.start = time.perf_counter()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", default="nano", help="checkpoint folder, hub name, nano or nano-base (default: nano)")
    parser.add_argument("--trl-python", metavar="PYTHON", help="interpreter of an environment that has trl")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result there")


def main(args: argparse.Namespace) -> int:
    run(args.pretrained, args.trl_python, args.prompts, args.group, args.repeats, args.device, args.json)
    return 0


def run(
    pretrained: str = "nano",
    trl_python: str | None = None,
    prompts: int = 8,
    group: int = 8,
    repeats: int = 5,
    device: str = "auto",
    json_file: Path | None = None,
) -> dict:
    """Take ``repeats`` steps that count on each side -> what is printed, as a dictionary.

    pretrained: checkpoint; trl_python: interpreter of an environment that has TRL, without which our side runs alone;
    prompts, group: of a step; json_file: also write the result there. Raises ValueError, TRLError, and what ``grpo.build`` does.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        nano_rows(prompts, labelled=True).to_parquet(folder / "rows.parquet")
        settings = {
            "start": pretrained,
            "data": str(folder / "rows.parquet"),
            "out": str(folder / "ours"),
            "device": device,
            "prompts": prompts,
            "group": group,
            "micro_batch": prompts,
            "tuning": "full",
            "lr": 5e-5,
            "beta": 0.05,
            "steps": repeats + 1,
            "max_new_tokens": CALL_BUDGET,
            "answer": "exact",
            "log_every": 10**6,
            "save_every": 10**6,
        }
        recipe = check(grpo.GRPO, settings)
        trainer = grpo.build(recipe)
        worker = Worker(trl_python, _job(trainer, recipe, folder), folder) if trl_python else None
        steps = Alternate(trainer, worker)
        trainer.add_callback(steps)
        trainer.run()
        if worker:
            worker.close()
            _check_prompts(trainer, steps.theirs[0]["prompts"])
        result = _result(steps, recipe, trainer, worker.version if worker else None)
    _print(result)
    if json_file:
        Path(json_file).write_text(json.dumps(result | {"provenance": provenance()}, indent=1))
    return result


def _job(trainer: grpo.GRPOTrainer, recipe: grpo.GRPO, folder: Path) -> dict:
    """What ``trl_worker`` reads: rows as files, the regions as boxes, the recipe's settings."""
    rows = []
    for i, prompt in enumerate(trainer.train_dataset):
        (turn, image) = next(trainer.policy.turns(prompt.sample)), prompt.sample.images[0]
        view, full = folder / f"{i}-view.png", folder / f"{i}-full.png"
        turn.images[0].save(view)
        image.save(full)
        ids = PAPER_GRID.ids
        row = {"question": turn.text, "answer": prompt.truth.answers[0], "label": prompt.truth.label}
        row |= {"view": str(view), "full": str(full)}
        row["boxes"] = dict(zip(ids, PAPER_GRID.boxes(image.width, image.height, tuple(ids.values())), strict=True))
        rows.append(row)
    image_tokens = max(trainer.vlm.visual_tokens(p.sample.images[0]) for p in trainer.train_dataset)
    return {
        "start": resolve(recipe.start),
        "out": str(folder / "theirs"),
        "system": turn.system,
        "rows": rows,
        "group": recipe.group,
        "steps": recipe.steps,
        "max_new_tokens": recipe.max_new_tokens,
        "max_completion": 2 * recipe.max_new_tokens + 4 * image_tokens + 64,  # two replies, all regions, their marks
        "costs": {"use": recipe.use, "miss": recipe.miss},
        "lr": recipe.lr,
        "beta": recipe.beta,
        "clip": recipe.clip,
        "seed": recipe.seed,
        "device": str(trainer.vlm.device.type),
        "threads": torch.get_num_threads(),
        "size": trainer.vlm.host.limits,
    }


def _check_prompts(trainer: grpo.GRPOTrainer, theirs: list[list[int]]) -> None:
    """Raises TRLError when the token ids of TRL's first turns are not ours."""
    ours = set()
    for prompt in trainer.train_dataset:
        turn = next(trainer.policy.turns(prompt.sample))
        images = [trainer.vlm.image_input(image) for image in turn.images]
        ours.add(tuple(trainer.vlm.host.render([turn], [], images)))
    if ours != set(map(tuple, theirs)):
        raise TRLError("TRL's prompts are not ours to the token, so the comparison would be of different work")


def _result(steps: Alternate, recipe: grpo.GRPO, trainer: grpo.GRPOTrainer, version: str | None) -> dict:
    rows = {name: _row(side[1:]) for name, side in (("ours", steps.ours), ("TRL", steps.theirs)) if side}
    about = {
        "model": recipe.start,
        "device": torch.cuda.get_device_name() if trainer.vlm.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "prompts": recipe.prompts,
        "group": recipe.group,
        "steps": recipe.steps - 1,
        "trl": version,
    }
    ratios = []
    if version:
        ours, theirs = rows["ours"], rows["TRL"]
        clock, pushed = theirs["seconds"] / ours["seconds"], theirs["pushed"] / ours["pushed"]
        ratios.append(Ratio("a GRPO step, TRL over ours, seconds", clock, ">= 2", clock >= 2))
        ratios.append(Ratio("tokens pushed through the decoder, TRL over ours", pushed, ">= 3", pushed >= 3))
        for name in ("encoded", *PUSHED):
            share = theirs["tokens"][name] / max(1, ours["tokens"][name])
            ratios.append(Ratio(f"the same, {name}" if name in PUSHED else "tokens out of the tower", share, "", None))
    return {"about": about, "rows": rows, "figures": [asdict(f) for f in ratios], "notes": _notes(version)}


def _row(steps: list[dict]) -> dict:
    """Median, fastest and slowest seconds, mean tokens and mean call rate of steps."""
    sums = sum((Counter(s["tokens"]) for s in steps), Counter())
    tokens = {name: sums[name] / len(steps) for name in ("encoded", *PUSHED)}
    seconds = sorted(s["seconds"] for s in steps)
    return {
        "seconds": median(seconds),
        "fastest_slowest": [seconds[0], seconds[-1]],
        "tokens": tokens,
        "pushed": sum(tokens[name] for name in PUSHED),
        "call_rate": sum(s["call_rate"] for s in steps) / len(steps),
    }


def _notes(version: str | None) -> list[str]:
    if version is None:
        return ["TRL's side was left out: pass --trl-python with the interpreter of an environment that has trl"]
    return [
        f"TRL {version}: GRPOTrainer on transformers with environment_factory, whose tool returns the crops as images; the stock "
        "chat template is refused for tools, so a template and a response template of ours render and read AwaRes' conversation "
        "(first-turn prompts equal to the token). loss_type=grpo, no checkpointing, no vLLM, tower frozen, float32",
        "TRL's side has no area term in its reward and takes a malformed call for an answer; neither changes the work much. "
        "Padding counts as pushed on both sides; the backward pass counts the loss' tokens once",
    ]


def _print(result: dict) -> None:
    print("\n".join(f"{k:<10} {v}" for k, v in result["about"].items()))
    print(
        f"\n{'':<8}{'seconds':>9}{'from - to':>18}{'calls':>7}{'pushed':>9}" + "".join(f"{n:>11}" for n in ("encoded", *PUSHED))
    )
    for name, r in result["rows"].items():
        low, high = r["fastest_slowest"]
        print(
            f"{name:<8}{r['seconds']:>9.2f}{f'{low:.2f} - {high:.2f}':>18}{r['call_rate']:>7.2f}{r['pushed']:>9.0f}"
            + "".join(f"{v:>11.0f}" for v in r["tokens"].values())
        )
    print()
    for f in result["figures"]:
        met = {True: "met", False: "NOT met", None: ""}[f["met"]]
        print(f"{f['value']:>10.3g}  {f['name']}  {f['aim']} {met}")
    for note in result["notes"]:
        print(note, file=sys.stderr)
