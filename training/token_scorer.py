"""Trains VisionSelector's scorer of visual tokens, for a host of any family: the model is frozen, and only the scorer learns.

Every visual token gets a weight between 0 and 1: a sigmoid of its score and of a threshold at which the weights of a picture sum to the
tokens that are kept. The loss is the cross-entropy of the answer with the tokens so weighted, and beside it how far the weights are from
keeping the highest scores and dropping the rest, whose share grows over the run. The result is a file for ``visionselector`` (``scorer=``).

Paper: Zhu et al., 2025, https://arxiv.org/abs/2510.16598; numbers from the code (https://github.com/JulietChoo/VisionSelector, 800a70f6,
its script for 7B). Differs: a budget for each picture (there: one for all of a packed row).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.pruner import Pruner
from awares_bench.models import scorer as weights
from awares_bench.models.base import HostModel, ImageInput, every_run

from . import examples, recipe
from .packing import Packed, Scorer, pack
from .recipe import RecipeError, TrainerRecipe, acquire_run_folder, option
from .rendering import Conversation, render
from .trainer import ResumableTrainer, describe, open_vlm, per_process, policy_of, training_arguments

FILE = "scorer.safetensors"
"""What a run's folder holds in the end, and each of its checkpoints."""

LEAST = -60.0
"""Smallest logarithm of a token's weight in the attention: as good as absent, and a number still."""


@dataclass(frozen=True)
class ScorerRecipe(TrainerRecipe):
    """A recipe of a scorer's training. Defaults are those of the released script for 7B, otherwise ours."""

    policy: str = option("full")
    retention: float = option(0.2, above=0, high=0.99)
    """Share of a picture's tokens that training keeps; the scorer then serves any other."""
    hidden: int | None = option(None, low=1)
    """Height of the two maps; null: half the width of a token."""
    spread: float = option(1e-4, above=0)
    """Standard deviation of the first weights; all scores are close to equal then."""
    constraint_start: float = option(0.1, low=0)
    """Weight of the distance from a hard choice at the first step; it grows linearly to ``constraint_end``."""
    constraint_end: float = option(2.0, low=0)
    weighs: str = option("features", one_of=("features", "attention"))
    """What a token's weight multiplies: its ``features``, as released; or how much ``attention`` others pay it (ours), which at 0 is what
    dropping it does. A decoder that norms its input sees scaled features as large as others at first."""
    noise: float = option(0.0, low=0)
    """Scale of logistic noise on the scores in training (ours; a concrete distribution, arXiv 1611.00712): other tokens are close to dropped at
    every step, so that the answer's loss says which matter. A host that answers as well with all tokens at equal weights learns nothing without."""
    stored: str = option("float32", one_of=("float32", "bfloat16"))
    """Precision of the file."""
    lr: float = option(5e-5, above=0, high=1)
    warmup: float = option(0.03, low=0, high=1)
    batch: int = option(512, low=1)
    """Rows a step, over all processes."""
    micro_batch: int = option(4, low=1)
    """Rows a forward pass. The loss is the same for every value."""
    max_length: int = option(8192, low=16)
    """Largest number of tokens of a conversation; a longer one is an error."""


RECIPE = ScorerRecipe


def soft_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores (V,) -> logits (V,) whose sigmoids sum to ``k``: the scores and one threshold, which moves with them in the gradient.

    Where all tokens are kept (k is V) the logits are infinite, and there is no gradient.
    """
    if k >= len(scores):
        return torch.full_like(scores, torch.inf)
    with torch.no_grad():  # bisection, as there; in double precision, without waiting for the device
        exact = scores.double()
        low, high = -exact.max() - 40, -exact.min() + 40
        for _ in range(64):
            middle = (low + high) / 2
            below = (exact + middle).sigmoid().sum() < k
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        threshold = ((low + high) / 2).to(scores.dtype)
    kept = (scores + threshold).sigmoid()
    slope = (kept * (1 - kept)).sum().detach().clamp(min=1e-12)
    return scores + threshold - (kept.sum() - kept.sum().detach()) / slope  # the last term is 0: it is there for its gradient


class SoftSelection(nn.Module):
    """The scorer in training; its parameters are the only ones. The host is beside it, frozen."""

    def __init__(self, host: HostModel, recipe: ScorerRecipe):
        super().__init__()
        self.host, self.recipe, self.log_probabilities = host, recipe, Scorer(host).forward
        self.width = width = host.decoder.config.hidden_size
        self.step = 0
        """Of the run: with a picture it decides the noise, whatever batch the picture is in."""
        torch.manual_seed(recipe.seed)
        for name in ("q_proj", "k_proj"):
            linear = nn.Linear(width, recipe.hidden or max(1, width // 2), device=host.device, dtype=torch.float32)
            nn.init.normal_(linear.weight, std=recipe.spread)
            nn.init.zeros_(linear.bias)
            setattr(self, name, linear)

    def train(self, mode: bool = True):
        if self.recipe.checkpointing:  # a decoder recomputes its activations only while it trains
            self.host.decoder.train(mode)
        return super().train(mode)

    @property
    def scorer(self) -> weights.Scorer:
        """What ``visionselector`` scores with."""
        return weights.Scorer(*(self.get_parameter(part) for part in weights.PARTS))

    def choose(self, features: Tensor, images: Sequence[ImageInput]) -> tuple[Tensor, Tensor]:
        """Features (V, D) of pictures -> logits (V,) of their weights, and the tokens that would be kept (V,), 1 or 0."""
        logits, kept, pruner = [], [], Pruner(self.recipe.retention)
        seeds = [image.seed + number for image in images for number in range(len(image.runs))]
        for run, seed in zip(features.split([rows * columns for rows, columns in every_run(images)]), seeds, strict=True):
            with torch.autocast(run.device.type, enabled=False):
                scores = self.scorer.scores(run.float())
            if self.recipe.noise and self.training:
                generator = torch.Generator().manual_seed(self.recipe.seed + self.step + 2**20 * seed)
                uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
                scores = scores + self.recipe.noise * uniform.logit().to(scores)
            k = pruner.tokens_to_keep(len(run), pruner.retention)
            logits.append(soft_top_k(scores, k))
            first = scores.detach().argsort(descending=True, stable=True)[:k]
            kept.append(torch.zeros_like(scores).index_fill_(0, first, 1.0))
        return torch.cat(logits), torch.cat(kept)

    def forward(self, packed: Packed, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features: of the packed pictures, ``joined`` -> log-probability (N,) of each scored token with the tokens weighted, and what ``choose``
        says."""
        logits, kept = self.choose(features[:, : self.width], packed.images)
        if self.recipe.weighs == "features":
            features = (features * logits.sigmoid()[:, None]).to(features.dtype)
        else:
            packed = replace(packed, mask=self.weighted(packed, logits, features.dtype))
        return self.log_probabilities(packed, features)[0], logits, kept

    def weighted(self, packed: Packed, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 1, L, L): what is added to the attention on each token, the logarithm of its weight, where it may be seen."""
        length = packed.ids.shape[1]
        columns = torch.zeros(packed.ids.shape, dtype=logits.dtype, device=logits.device)
        columns = columns.masked_scatter(packed.ids == self.host.image_token, logsigmoid(logits).clamp(min=LEAST))
        hidden = ~torch.ones(length, length, dtype=torch.bool, device=logits.device).tril()
        return columns[:, None, None].expand(-1, 1, length, length).masked_fill(hidden, torch.finfo(dtype).min).to(dtype)


class Answers(torch.utils.data.Dataset):
    """Rows with ``replies``, or else ``answers``, of which the first is learned; each rendered when it is read."""

    def __init__(self, table, vlm: LocalModel, policy, recipe: ScorerRecipe):
        self.table, self.vlm, self.policy, self.recipe = table, vlm, policy, recipe

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Conversation:
        row, recipe = self.table[index], self.recipe
        replies = list(row["replies"]) if row.get("replies") else [examples.answers(row)[0]]
        sample = examples.sample(row, index, recipe.largest_side)
        try:
            return render(self.vlm, self.policy, sample, replies, max_length=recipe.max_length)
        except ValueError as error:
            raise examples.DataError(f"{recipe.data!r}, row {index}: {error}") from error


class TokenScorerTrainer(ResumableTrainer):
    """Equal for every split of a step into micro-batches and processes."""

    recipe: ScorerRecipe

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self.next_microbatches(epoch_iterator, num_batches)
        talks = [talk for batch in batches for talk in batch]
        scored, visual = sum(w > 0 for c in talks for w in c.weights), sum(i.tokens for c in talks for i in c.images)
        return batches, torch.tensor([max(1.0, self.sum_over_ranks(n)) for n in (scored, visual)], device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Any = None):
        recipe, (scored, visual) = self.recipe, num_items_in_batch
        self.scorer.step = self.state.global_step
        scores, logits, kept = self.score(model, pack([[c] for c in inputs], self.vlm.host, self.args.device))
        learns = logits.isfinite()
        distance = binary_cross_entropy_with_logits(logits[learns], kept[learns], reduction="sum")
        share = self.state.global_step / max(1, self.state.max_steps)
        weight = recipe.constraint_start + (recipe.constraint_end - recipe.constraint_start) * share
        on_kept = (logits.detach().sigmoid() * kept).sum() / kept.sum()
        self.record_metrics(nll=-scores.mean().item(), weight_on_kept=on_kept.item(), constraint_weight=weight)
        return (-scores.sum() / scored + weight * distance / visual) * self.args.world_size

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:
            write(self.scorer, Path(output_dir or self.args.output_dir) / FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.scorer.load_state_dict(load_file(Path(resume_from_checkpoint) / FILE))


def write(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32, **said: str) -> None:
    """The four tensors of the scorer as a file. said: where it comes from, for its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, path, {"format": "pt", **said})


def build(recipe: ScorerRecipe, dry: bool = False) -> TokenScorerTrainer:
    """Check the data and acquire the run's folder, then load the model -> a trainer.

    dry: acquire no folder. Raises RecipeError, DataError, CheckpointError.
    """
    accumulate = per_process(recipe.batch, recipe.micro_batch, "batch")
    if recipe.data.startswith("nano:"):
        from .curation.pipeline import asked_nano_rows

        table = asked_nano_rows(recipe.data, recipe.seed)
    else:
        table = examples.rows(recipe.data, needs=("image", "question"))
        if not {"replies", "answers", "answer"} & set(table.column_names):
            raise examples.DataError(f"{recipe.data!r} has neither replies nor answers; it has: {', '.join(table.column_names)}")
    policy = policy_of(recipe)
    if not dry:
        acquire_run_folder(recipe, "scorer")
    vlm = open_vlm(recipe, recipe.dtype)
    vlm.host.model.requires_grad_(False)
    if recipe.checkpointing:
        vlm.host.model.gradient_checkpointing_enable({"use_reentrant": False})
    examples.check_texts(table, vlm.check, recipe.data)
    arguments = training_arguments(recipe, recipe.micro_batch, accumulate)
    rows = Answers(table, vlm, policy, recipe)
    trainer = TokenScorerTrainer(SoftSelection(vlm.host, recipe), vlm, recipe, args=arguments, train_dataset=rows)
    if trainer.is_fsdp_enabled:
        raise RecipeError("a scorer is too small to be sharded: launch with DDP (training/launch/ddp.yaml)")
    return trainer


def run(recipe: ScorerRecipe) -> Path:
    """Train, continuing where the run's folder stopped -> the file, which ``visionselector`` loads."""
    trainer = build(recipe)
    trainer.run()
    path = Path(trainer.args.output_dir) / FILE
    if trainer.args.should_save:
        start = Path(recipe.start).name if recipe.start.startswith((".", "/", "~")) else recipe.start
        said = {"start": start, "data": Path(recipe.data).name, "retention": f"{recipe.retention:g}"}
        write(trainer.scorer, path, getattr(torch, recipe.stored), **said)
        print(f"{path}: for scorer=, fingerprint {weights.load_scorer(str(path)).fingerprint}")
    return path


def dry_run(recipe: ScorerRecipe, say=print) -> None:
    """Render and score one batch, and print its counts, memory and loss. Takes no step."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(replace(recipe, out=scratch), dry=True)
    batch = [trainer.train_dataset[i] for i in range(min(recipe.micro_batch, len(trainer.train_dataset)))]
    describe(trainer.scorer, batch, trainer.vlm, say)
    with torch.no_grad():
        scores, _, kept = trainer.score(trainer.scorer, pack([[c] for c in batch], trainer.vlm.host, trainer.args.device))
    say(f"{int(kept.sum())} of {len(kept)} visual tokens kept; answer's loss {-scores.mean():.4f}; no step was taken")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe.add_arguments(parser, "nano_scorer")
    parser.add_argument("--dry-run", action="store_true", help="render and score one batch, print counts, take no step")


def main(args: argparse.Namespace) -> int:
    """``awares-bench train scorer``."""
    (dry_run if args.dry_run else run)(recipe.load(RECIPE, args.recipe, args.set))
    return 0
