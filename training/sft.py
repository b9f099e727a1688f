"""Supervised fine-tuning on trajectories: the loss covers the model's own tokens, a call's with more weight (paper Sec. 3.3)."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from awares_bench.inference.local_model import LocalModel

from . import examples, recipe
from .export import finish
from .packing import pack
from .recipe import TrainingRecipe, acquire_run_folder, option
from .rendering import Conversation, render
from .trainer import ResumableTrainer, describe, per_process, policy_of, prepare, training_arguments


@dataclass(frozen=True)
class SFT(TrainingRecipe):
    """A recipe of supervised fine-tuning."""

    lr: float = option(1e-4, above=0, high=1)
    batch: int = option(128, low=1)
    """Conversations a step, over all processes."""
    micro_batch: int = option(4, low=1)
    """Conversations a forward pass. The loss is the same for every value."""
    packed: int = option(1, low=1)
    """Conversations in one row, which holds their common system message once. The loss is the same; pays where that is long."""
    epochs: float = option(2.0, above=0)
    weight_decay: float = option(0.001, low=0, high=1)
    lora_dropout: float = option(0.05, low=0, high=0.9)
    call_weight: float = option(5.0, above=0)
    """Loss weight of a call's tokens (paper Sec. 4.3 and Table 3: 5)."""
    normalise: str = option("weight", one_of=("weight", "tokens"))
    """What divides a step's loss: the sum of the ``weight``s, or the number of ``tokens`` (the paper does not say)."""
    max_length: int = option(8192, low=16)
    """Largest number of tokens of a conversation; a longer one is an error (paper supplement, Table 7: 8192)."""


RECIPE = SFT


class Trajectories(torch.utils.data.Dataset):
    """Rows with ``replies``, each rendered to a conversation when it is read."""

    def __init__(self, table, vlm: LocalModel, policy, recipe: SFT):
        self.table, self.vlm, self.policy, self.recipe = table, vlm, policy, recipe

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Conversation:
        row, recipe = self.table[index], self.recipe
        sample = examples.sample(row, index, recipe.largest_side)
        try:
            return render(self.vlm, self.policy, sample, list(row["replies"]), recipe.call_weight, recipe.max_length)
        except ValueError as error:
            raise examples.DataError(f"{recipe.data!r}, row {index}: {error}") from error


class SFTTrainer(ResumableTrainer):
    """Weighted cross-entropy, equal for every split of a step into micro-batches and processes (tests/training/test_sft.py)."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self.next_microbatches(epoch_iterator, num_batches)
        weights = [w for batch in batches for c in batch for w in c.weights if w]
        total = self.sum_over_ranks(sum(weights) if self.recipe.normalise == "weight" else len(weights))
        return batches, torch.tensor(total, device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        n = self.recipe.packed
        packed = pack([inputs[i : i + n] for i in range(0, len(inputs), n)], self.vlm.host, self.args.device)
        scores, _ = self.score(model, packed)
        is_call = packed.weight != 1
        for name, mask in (("nll_call", is_call), ("nll_answer", ~is_call)):
            if mask.any():
                self.record_metrics(**{name: -scores[mask].mean().item()})
        return -(scores * packed.weight).sum() / num_items_in_batch * self.args.world_size


def build(recipe: SFT, dry: bool = False) -> SFTTrainer:
    """Check the data and acquire the run's folder, then load the model -> a trainer.

    dry: acquire no folder. Raises RecipeError, DataError, CheckpointError.
    """
    accumulate = per_process(recipe.batch, recipe.micro_batch, "batch")
    table = examples.rows(recipe.data, needs=("image", "question", "replies"))
    policy = policy_of(recipe)
    if not dry:
        acquire_run_folder(recipe, "sft")
    scorer, vlm = prepare(recipe, recipe.lora_dropout)
    examples.check_texts(table, vlm.check, recipe.data)
    arguments = training_arguments(recipe, recipe.micro_batch, accumulate)
    return SFTTrainer(scorer, vlm, recipe, args=arguments, train_dataset=Trajectories(table, vlm, policy, recipe))


def run(recipe: SFT) -> None:
    """Train, continuing where the run's folder stopped. The result is ``out/checkpoint``, which evaluation loads."""
    trainer = build(recipe)
    trainer.run()
    result = trainer.result()
    if trainer.args.should_save:
        finish(*result, Path(trainer.args.output_dir), "sft", recipe)


def dry_run(recipe: SFT, say=print) -> None:
    """Render and score one batch, and print its prompts, weights and loss. Takes no step."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(replace(recipe, out=scratch), dry=True)
    data, vlm = trainer.train_dataset, trainer.vlm
    batch = [data[i] for i in range(min(recipe.micro_batch, len(data)))]
    # 1) Show what two conversations say, each reply with its weight; an image is one marker with its number of tokens.
    for c in batch[:2]:
        marker = f"{vlm.host.placeholder}x{c.ids.count(vlm.host.image_token)}"
        prompt = vlm.tokenizer.decode([i for i in c.ids[: c.prompt] if i != vlm.host.image_token])
        say(f"--- {marker}\n{prompt}")
        for start, end in c.replies:
            say(f"    weight {c.weights[start]:g}: {vlm.tokenizer.decode(c.ids[start:end])!r}")
    # 2) Estimate the memory, 3) score the batch as training would.
    describe(trainer.scorer, batch, vlm, say)
    packed = pack([[c] for c in batch], vlm.host, trainer.args.device)
    with torch.no_grad():
        scores, _ = trainer.scorer(packed, vlm.encode(packed.images))
    loss = -(scores * packed.weight).sum() / packed.weight.sum()
    steps = recipe.steps if recipe.steps > 0 else int(len(data) * recipe.epochs / recipe.batch)
    say(f"weighted loss of this batch {loss:.4f}; {len(data)} conversations, {steps} steps of {recipe.batch}; no step was taken")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe.add_arguments(parser, "nano_sft")
    parser.add_argument("--dry-run", action="store_true", help="render and score one batch, print masks and counts, take no step")


def main(args: argparse.Namespace) -> int:
    """``awares-bench train sft``."""
    (dry_run if args.dry_run else run)(recipe.load(RECIPE, args.recipe, args.set))
    return 0
