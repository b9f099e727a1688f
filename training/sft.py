"""Supervised fine-tuning on trajectories: loss on the model's own tokens, more of it on the tool call (paper Sec. 3.3)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from awares_bench.inference.local_model import VLM

from . import examples
from .export import finish
from .packing import Conversation, pack, render
from .recipe import TrainingRecipe, acquire_run_folder, option
from .trainer import ResumableTrainer, describe, per_process, policy_of, prepare, training_arguments


@dataclass(frozen=True)
class SFT(TrainingRecipe):
    """A recipe of supervised fine-tuning.

    batch, micro_batch: conversations a step over all processes, and a forward pass. The loss is the same for any micro_batch.
    packed:       conversations in one row, the system message that they begin with once; the loss is the same. Pays where that is long
    call_weight:  loss weight of a tool call's tokens; 5 in paper Sec. 4.3 and Table 3
    normalise:    ``weight`` divides a step's loss by the sum of the weights, ``tokens`` by their number (unprinted in the paper)
    max_length:   tokens of a conversation; a longer one is an error (paper supplement, Table 7: 8192)
    """

    lr: float = option(1e-4, above=0, high=1)
    batch: int = option(128, low=1)
    micro_batch: int = option(4, low=1)
    packed: int = option(1, low=1)
    epochs: float = option(2.0, above=0)
    weight_decay: float = option(0.001, low=0, high=1)
    lora_dropout: float = option(0.05, low=0, high=0.9)
    call_weight: float = option(5.0, above=0)
    normalise: str = option("weight", one_of=("weight", "tokens"))
    max_length: int = option(8192, low=16)


RECIPE = SFT


class Trajectories(torch.utils.data.Dataset):
    """Rows with ``replies`` as conversations, rendered as they are read."""

    def __init__(self, table, vlm: VLM, policy, recipe: SFT):
        self.table, self.vlm, self.policy, self.recipe = table, vlm, policy, recipe

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Conversation:
        row, r = self.table[index], self.recipe
        sample = examples.sample(row, index, r.largest_side)
        try:
            return render(self.vlm, self.policy, sample, list(row["replies"]), r.call_weight, r.max_length)
        except ValueError as error:
            raise examples.DataError(f"{r.data!r}, row {index}: {error}") from error


class SFTTrainer(ResumableTrainer):
    """Weighted cross-entropy, equal for every split of a step into micro-batches and processes (tests/test_sft.py)."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self.next_microbatches(epoch_iterator, num_batches)
        counted = [w for batch in batches for c in batch for w in c.weights if w]
        total = self.sum_over_ranks(sum(counted) if self.recipe.normalise == "weight" else len(counted))
        return batches, torch.tensor(total, device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        n = self.recipe.packed
        packed = pack([inputs[i : i + n] for i in range(0, len(inputs), n)], self.vlm, self.args.device)
        scores, _ = self.score(model, packed)
        called = packed.weight != 1
        for name, on in (("nll_call", called), ("nll_answer", ~called)):
            if on.any():
                self.record_metrics(**{name: -scores[on].mean().item()})
        return -(scores * packed.weight).sum() / num_items_in_batch * self.args.world_size


def build(recipe: SFT, dry: bool = False) -> SFTTrainer:
    """Check the data and claim the run's folder, then load the model -> a trainer ready to go."""
    accumulate = per_process(recipe.batch, recipe.micro_batch, "batch")
    table = examples.rows(recipe.data, needs=("image", "question", "replies"))
    policy = policy_of(recipe)
    if not dry:
        acquire_run_folder(recipe, "sft")
    scorer, vlm = prepare(recipe, recipe.lora_dropout)
    examples.check_texts(table, vlm.check, recipe.data)
    args = training_arguments(recipe, recipe.micro_batch, accumulate)
    return SFTTrainer(scorer, vlm, recipe, args=args, train_dataset=Trajectories(table, vlm, policy, recipe))


def run(recipe: SFT) -> None:
    """Train, resuming where the folder stopped; the result is ``out/checkpoint``, which evaluation loads."""
    trainer = build(recipe)
    trainer.run()
    result = trainer.result()
    if trainer.args.should_save:
        finish(*result, Path(trainer.args.output_dir), "sft", recipe)


def dry_run(recipe: SFT, say=print) -> None:
    """Everything but a step: one batch rendered and scored, its masks, its tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(replace(recipe, out=scratch), dry=True)
    data, vlm = trainer.train_dataset, trainer.vlm
    some = [data[i] for i in range(min(recipe.micro_batch, len(data)))]
    for c in some[:2]:
        marker = f"<|image_pad|>x{len([i for i in c.ids if i == vlm.image_token])}"
        words = [vlm.tokenizer.decode(c.ids[s:e]) for s, e in c.replies]
        prompt = vlm.tokenizer.decode([i for i in c.ids[: c.prompt] if i != vlm.image_token])
        say(f"--- {marker}\n{prompt}")
        for (s, _), text in zip(c.replies, words, strict=True):
            say(f"    weight {c.weights[s]:g}: {text!r}")
    describe(trainer.scorer, some, vlm, say)
    packed = pack([[c] for c in some], vlm, trainer.args.device)
    with torch.no_grad():
        scores, _ = trainer.scorer(packed, trainer.features(packed.views))
    loss = -(scores * packed.weight).sum() / packed.weight.sum()
    steps = recipe.steps if recipe.steps > 0 else int(len(data) * recipe.epochs / recipe.batch)
    say(f"weighted loss of this batch {loss:.4f}; {len(data)} conversations, {steps} steps of {recipe.batch}; no step was taken")
