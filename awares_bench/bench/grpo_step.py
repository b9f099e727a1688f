"""A GRPO step on a model of a published size with random weights, beside its floor: LoRA, forced replies, pages of noise.

Replies are forced, half of a group's call for a quadrant, so that the step has the shape of a real one; the sampler still samples, and is
overruled. The floor is the operations of the tokens that must be pushed over a matrix product's measured rate, and for decoding the bytes of
the weights over the memory's, once a step of the longest reply. Counted as needed: every prompt once and what follows it once, for the
rollout, for the reference, and for the loss with its backward pass; the frozen weights want no gradients of their own, so a backward pass
is as much as a forward pass.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from statistics import median

import torch
from transformers import TrainerCallback

from awares_bench.awares import CALL_BUDGET
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request
from awares_bench.methods.conversation import Sample
from awares_bench.models.flops import decoder_flops, vision_flops
from awares_bench.training import grpo, rewards
from awares_bench.training.curation.judges import judge
from awares_bench.training.recipe import check
from awares_bench.training.rollouts import banned_tokens
from awares_bench.training.trainer import policy_of, prepare, training_arguments

from .contestants import Pages, load


class Forced(LocalModel):
    """Answers with what it is told to: every second conversation calls, and answers after it."""

    call: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    def reply(self, requests: list[Request], *args, **kwargs):
        made = []
        for r in requests:
            calls = not r.session.replies and r.conversation % 2 == 0
            # answers differ in length, so that a group's rewards and replies do
            answer = self.answer[: 1 + r.conversation % len(self.answer)]
            made.append(replace(r, forced_tokens=self.call if calls else answer))
        return super().reply(made, *args, **kwargs)


class Steps(TrainerCallback):
    """Seconds, metrics and peak memory of each step. Nothing hooks onto the model, whose decoding steps would then not be recorded."""

    def __init__(self, trainer: grpo.GRPOTrainer):
        self.trainer = trainer
        self.steps: list[dict] = []

    def on_train_begin(self, *_, **__):
        self._start()

    def _start(self) -> None:
        self.counted = self.trainer.vlm.restart_peak()
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        vlm = self.trainer.vlm
        vlm.synchronise()
        seconds = time.perf_counter() - self.start
        # what the sampler gave the tokens says nothing of those that were forced in their place
        metrics = {name: values[-1] for name, values in self.trainer.step_metrics.items() if name != "sampler_dlogp"}
        peak = vlm.peak_since_restart() if self.counted else None
        recipe = self.trainer.recipe
        scored = metrics["scored_tokens"] * recipe.prompts / recipe.micro_batch
        tokens = {"prefill": metrics["prefilled_tokens"], "decode": metrics["reply_tokens"] * recipe.prompts * recipe.group}
        tokens |= {"reference": scored, "loss": scored, "backward": scored}
        self.steps.append({"seconds": seconds, "tokens": tokens, "peak_memory_bytes": peak, "metrics": metrics})
        self._start()


def step(
    size: str, layers: int | None, device: str, prompts: int, group: int, tokens: int, answer: int, steps: int,
    flops_rate: float, memory_rate: float,
) -> dict:  # fmt: skip
    """Take ``steps`` steps that count -> seconds, tokens, floor, peak memory.

    prompts, group: of a step; tokens: visual tokens of a page; answer: tokens of the longest answer. flops_rate: of a matrix product,
    memory_rate: bytes per second, both measured on this device.
    """
    vlm = load(None, size, layers, "auto", device)
    pages = Pages(vlm, tokens, prompts, 0.5, answer)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "start": size, "data": "noise", "out": scratch, "device": device.split(":")[0], "prompts": prompts, "group": group,
            "steps": steps + 1, "max_new_tokens": max(CALL_BUDGET, answer + 1), "answer": "exact", "log_every": 10**6, "save_every": 10**6,
        }  # fmt: skip
        recipe = check(grpo.GRPO, settings)
        forced = Forced(vlm.host)
        forced.call, forced.answer = pages.call, pages.answer
        scorer, _ = prepare(recipe, vlm=forced)
        scorer.banned, scorer.temperature = list(banned_tokens(vlm.host)), recipe.temperature
        truth = vlm.text(pages.answer[:1])
        asked = [
            grpo.Prompt(Sample(t.images, t.text, str(i)), rewards.GroundTruth(t.text, (truth,), "HR"))
            for i, t in enumerate(pages.full_turns)
        ]
        data = asked * (steps + 1)
        trainer = grpo.GRPOTrainer(
            scorer, forced, recipe, policy_of(recipe), judge("exact"),
            args=training_arguments(recipe, recipe.micro_batch, prompts // recipe.micro_batch, dataloader_drop_last=True),
            train_dataset=data,
        )  # fmt: skip
        measured = Steps(trainer)
        trainer.add_callback(measured)
        trainer.train()
    rows = measured.steps[1:]
    floor = _floor(vlm, pages, prompts, group, rows[-1], flops_rate, memory_rate)
    seconds = median(row["seconds"] for row in rows)
    return {
        "prompts": prompts,
        "group": group,
        "visual_tokens": tokens,
        "seconds": seconds,
        "rounds": [row["seconds"] for row in rows],
        "tokens": rows[-1]["tokens"],
        "metrics": rows[-1]["metrics"],
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in rows if r["peak_memory_bytes"]), default=None),
        "floor": floor,
        "over_floor": seconds / floor["seconds"],
        "trained_parameters": sum(p.numel() for p in scorer.parameters() if p.requires_grad),
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }


def _floor(vlm: LocalModel, pages: Pages, prompts: int, group: int, row: dict, flops_rate: float, memory_rate: float) -> dict:
    """Seconds that nobody can do it under, by part; ``row``: a measured step."""
    config = vlm.host.model.config.to_dict()
    text, tower = config["text_config"], config["vision_config"]
    low, crop = pages.first[0].images[0], pages.second[0].images[0]
    prompt = len(vlm.host.render([pages.first[0]], [], [vlm.host.image_input(low)]))
    # a group is one row: its prompt once, the crops of one call once, and what each rollout said
    row_tokens = row["metrics"]["scored_tokens"]
    loss = prompts * decoder_flops(row_tokens, text, scored=group * len(pages.answer))
    prefill = prompts * (decoder_flops(prompt, text) + decoder_flops(vlm.visual_tokens(crop), text, prompt))
    encode = prompts * sum(vision_flops(vlm.visual_tokens(image), tower) for image in (low, crop))
    decode = row["tokens"]["decode"] * decoder_flops(1, text, prompt)
    weights = sum(p.numel() * p.element_size() for p in vlm.host.decoder.layers.parameters())
    passes = max(len(pages.call), len(pages.answer)) + len(pages.answer)  # of the longest reply of each turn
    parts = {
        "encode": encode / flops_rate,
        "prefill": prefill / flops_rate,
        "decode": max(decode / flops_rate, passes * weights / memory_rate),
        "reference": loss / flops_rate,
        "loss": 2 * loss / flops_rate,
    }
    return {"seconds": float(sum(parts.values())), "parts": {k: float(v) for k, v in parts.items()}}
