"""GRPO over whole exchanges (paper Sec. 3.4 and 4.3). Rollouts come from the methods and the engine of evaluation.

Strictly on-policy: there is one optimiser step per rollout, so the probability ratio is always 1 and clipping never acts. The
ratio carries the gradient; the clip is in the loss in case a later version takes several steps per rollout.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import Sample

from . import examples, recipe, rewards
from .auxiliary.crop_reader import CropReader
from .auxiliary.cropper import FrozenTargetReward
from .curation.crop_oracles import check_boxes
from .curation.judges import judge
from .export import finish
from .health_checks import HealthChecks
from .packing import Packed, Scorer, pack
from .recipe import RecipeError, TrainingRecipe, acquire_run_folder, option
from .rollouts import Rollout, banned_tokens, rollouts
from .trainer import (
    ResumableTrainer,
    describe,
    device_of,
    open_vlm,
    per_process,
    policy_of,
    prepare,
    training_arguments,
    unsharded,
)


@dataclass(frozen=True)
class GRPO(TrainingRecipe):
    """A recipe of GRPO. Defaults are those of paper Sec. 4.3 and supplement Table 7, where they print a value."""

    lr: float = option(1e-5, above=0, high=1)
    schedule: str = option("linear", one_of=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup: float = option(0.0, low=0, high=1)
    prompts: int = option(8, low=1)
    """Questions a step, over all processes."""
    group: int = option(8, low=2)
    """Rollouts of each question (paper: 64 completions a step, 8 a question)."""
    micro_batch: int = option(1, low=1)
    """Groups a forward pass. The loss is the same for every value."""
    temperature: float = option(1.0, above=0, high=10)
    repetition_penalty: float | None = option(None, above=0)
    """Of rollouts and of their scores. Null takes it from the start's ``generation_config.json``, as evaluation does."""
    max_new_tokens: int = option(512, low=1)
    """Of a reply. Crops do not count against it."""
    scaling: str = option("group_std", one_of=("group_std", "dr_grpo", "none"))
    """``group_std`` divides advantages by the group's deviation (paper); ``none`` does not; ``dr_grpo`` does not, and divides a
    rollout's loss by ``max_new_tokens`` in place of its length."""
    clip: float = option(0.2, above=0, high=1)
    beta: float = option(0.05, low=0)
    """Weight of the KL divergence from the start, which is the SFT model."""
    answer: str = option("embedding", one_of=("embedding", "anls", "exact", "relaxed", "local", "endpoint"))
    """What scores an answer: ``embedding`` (paper), a rule, or a judge, ``local`` or at an ``endpoint`` (see ``judges``)."""
    judge_model: str = option("")
    judge_url: str = option("")
    scheme: str = option("awares", one_of=(*rewards.SCHEMES, *rewards.CROP_SCHEMES, "likelihood"))
    """How the reward is composed: see ``rewards``. ``likelihood`` is CropVLM's, for role ``cropper``: the likelihood of the first
    accepted answer under ``target`` (see ``cropper``)."""
    target: str = option("")
    """Frozen checkpoint of scheme ``likelihood``, and of ``crop_judge: target``."""
    crop_judge: str = option("", one_of=("", "evidence", "target"))
    """Of schemes ``adaptvision`` and ``ergo``: a crop is accepted that covers the row's ``boxes``, or from which ``target`` answers rightly
    (ERGO; a stand-in for AdaptVision's GPT-4o)."""
    tool_advantage: float = option(0.3, low=0)
    """Of scheme ``adaptvision``: the share of the tool's advantage in the first turn (its lambda)."""
    token_mean: str = option("rollout", one_of=("rollout", "parts"))
    """``rollout``: a mean over a rollout's tokens, then over rollouts. ``parts``: a mean over all tokens of calls, times ``tool_tokens``, and
    one over all tokens of answers, so that long answers do not drown short calls (AdaptVision)."""
    tool_tokens: float = option(0.5, low=0)
    """Weight of the calls' mean in ``token_mean: parts`` (AdaptVision's code; the paper: 1)."""
    w_ans: float = option(1.0, low=0)
    """This and the five below: see ``rewards.RewardWeights``."""
    miss: float = option(2.0, low=0)
    use: float = option(0.25, low=0)
    area: float = option(0.01, low=0)
    area_of: str = option("union", one_of=("union", "sum"))
    missed: str = option("label", one_of=("label", "wrong"))
    crop: float = option(0.1, low=0)
    """This and the four below: of schemes ``adaptvision`` and ``ergo``, see ``rewards.RewardWeights``."""
    crop_area: float = option(0.2, low=0)
    region: float = option(1.0, low=0)
    small: float = option(0.5, low=0)
    largest_region: float = option(0.6, above=0, high=1)

    def __post_init__(self):
        super().__post_init__()
        if (self.scheme == "likelihood") != bool(self.role) or (self.role and not self.target):
            raise RecipeError(
                "scheme: likelihood, a role and a target go together: a frozen target scores what the role shows it"
            )
        if (self.scheme in rewards.CROP_SCHEMES) != bool(self.crop_judge):
            raise RecipeError(f"scheme: {' or '.join(rewards.CROP_SCHEMES)} and a crop_judge go together: evidence or target")
        if bool(self.target) != (bool(self.role) or self.crop_judge == "target"):
            raise RecipeError("a target and crop_judge: target (or scheme: likelihood) go together")
        if self.token_mean == "parts" and self.scaling == "dr_grpo":
            raise RecipeError("token_mean: parts has its own counts, scaling: dr_grpo another; set one of them")


RECIPE = GRPO


@dataclass(frozen=True)
class Prompt:
    """A question with its pictures, and what is known about it."""

    sample: Sample
    truth: rewards.GroundTruth


class Prompts(torch.utils.data.Dataset):
    """Rows with ``answers``, and ``label`` where there is one, as prompts."""

    def __init__(self, table, recipe: GRPO):
        self.table, self.recipe = table, recipe

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Prompt:
        row = self.table[index]
        sample = examples.sample(row, index, self.recipe.largest_side)
        evidence, size = None, sample.images[0].size if len(sample.images) == 1 else None
        if self.recipe.crop_judge == "evidence" and size:
            whole = examples.pictures(row, 10**9, index)[0].size  # boxes are in pixels of the picture before it was shrunk
            scale = (size[0] / whole[0], size[1] / whole[1]) * 2
            boxes = check_boxes(row["boxes"], *whole)
            evidence = tuple(
                (int(x1 * a), int(y1 * b), int(x2 * c), int(y2 * d)) for x1, y1, x2, y2 in boxes for a, b, c, d in [scale]
            )
        return Prompt(sample, rewards.GroundTruth(row["question"], examples.answers(row), row.get("label"), evidence, size))


@dataclass
class RolloutGroup:
    """The rollouts of one prompt with their rewards."""

    rollouts: list[Rollout]
    parts: list[dict[str, float]]
    """The parts of each rollout's reward, and their sum ``reward``."""
    advantages: list[float]
    """Of each rollout, its first turn's where turns differ."""
    turns: list[tuple[float, ...]] | None = None
    """Of each rollout, the advantage of each turn, where they differ; None where all of a rollout's are the same."""
    reference: Tensor | None = None
    """The reference's log-probability of each sampled token, all rollouts in one row; None where ``beta`` is 0."""


class GRPOTrainer(ResumableTrainer):
    """One rollout per step. Every number is a function of (recipe, step), so a resumed run equals one that was not cut."""

    recipe: GRPO

    def __init__(self, scorer: Scorer, vlm: LocalModel, recipe: GRPO, policy, judge, **arguments):
        super().__init__(scorer, vlm, recipe, **arguments)
        self.policy, self.judge, self.reward_weights = policy, judge, _reward_weights(recipe)
        frozen_vlm = open_vlm(replace(recipe, start=recipe.target)) if recipe.target else None
        self.target = FrozenTargetReward(frozen_vlm, policy) if frozen_vlm and recipe.role else None
        self.crop_reader = CropReader(frozen_vlm, judge) if frozen_vlm and recipe.crop_judge else None
        self.part_tokens = (0.0, 0.0)  # of the step, over all processes: tokens of calls, and of answers
        self.reference = None
        if recipe.beta and recipe.tuning == "full":
            frozen = copy.deepcopy(scorer.model).requires_grad_(False).eval()
            self.reference = Scorer(vlm.host.on(frozen), tuple(scorer.banned), scorer.temperature, scorer.penalty)
        self.health_checks = HealthChecks(has_calls=not recipe.role)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self.next_microbatches(epoch_iterator, num_batches)
        prompts = [prompt for batch in batches for prompt in batch]
        recipe, step = self.recipe, self.state.global_step
        self.scorer.eval()
        with torch.no_grad(), self.accelerator.autocast(), unsharded(self.scorer):
            # 1) Sample a group of exchanges for each prompt.
            sampled, sampler = rollouts(
                self.vlm,
                self.policy,
                [prompt.sample for prompt in prompts],
                recipe.group,
                recipe.max_new_tokens,
                recipe.temperature,
                f"{recipe.seed}/{step}",
            )
            # 2) Reward them, and compare each with its group.
            groups = [self.score_group(prompt, group) for prompt, group in zip(prompts, sampled, strict=True)]
            micro_batches = [groups[i : i + recipe.micro_batch] for i in range(0, len(groups), recipe.micro_batch)]
            # 3) Score them under the frozen reference, for the KL term.
            for micro_batch in micro_batches if recipe.beta else ():
                for group, logprobs in zip(micro_batch, self.reference_logprobs(micro_batch), strict=True):
                    group.reference = logprobs
        # 4) Report the step. The loss is divided by the number of rollouts over all processes.
        self.record_metrics(**self.rollout_metrics(groups), prefilled_tokens=sampler.prefilled, shared_tokens=sampler.shared)
        if (step + 1) % recipe.log_every == 0:
            self.save_rollouts(prompts, groups, step + 1)
        parts = [call_tokens(rollout) for g in groups for rollout in g.rollouts]
        calls = self.sum_over_ranks(float(sum(map(sum, parts))))
        self.part_tokens = calls, self.sum_over_ranks(float(sum(map(len, parts)))) - calls
        count = self.sum_over_ranks(sum(len(g.rollouts) for g in groups))
        return micro_batches, torch.tensor(count, device=device)

    def score_group(self, prompt: Prompt, group: list[Rollout]) -> RolloutGroup:
        """Rewards of a prompt's rollouts, and their advantages over each other."""
        recipe, truth = self.recipe, prompt.truth
        if self.target:
            parts = self.target(prompt.sample, truth.answers[0], group)
        elif recipe.scheme in rewards.CROP_SCHEMES:
            if self.crop_reader:
                accepted = self.crop_reader(truth.question, truth.answers, group)
            else:
                accepted = [float(rewards.covers(r.trajectory.boxes, truth.evidence or ())) for r in group]
            parts = rewards.CROP_SCHEMES[recipe.scheme](group, truth, self.judge, self.reward_weights, accepted)
        else:
            parts = rewards.SCHEMES[recipe.scheme](group, truth, self.judge, self.reward_weights)
        parts = [p | {"covered": rewards.covered(r, truth)} for r, p in zip(group, parts, strict=True)]
        if recipe.scheme == "adaptvision":
            turns = rewards.turn_advantages(
                [p["reward"] for p in parts],
                [p["tool"] for p in parts],
                [len(r.trajectory.replies) for r in group],
                recipe.scaling,
                recipe.tool_advantage,
            )
            return RolloutGroup(group, parts, [t[0] for t in turns], turns)
        return RolloutGroup(group, parts, rewards.advantages([p["reward"] for p in parts], self.recipe.scaling))

    def reference_logprobs(self, groups: list[RolloutGroup]) -> tuple[Tensor, ...]:
        """Log-probabilities of each group's sampled tokens under the start: a frozen copy, or the model without its adapters."""
        packed = self._pack(groups)
        without_adapters = self.scorer.model.disable_adapter() if self.reference is None else nullcontext()
        with without_adapters:
            scores, _ = (self.reference or self.scorer)(packed, self.vlm.encode(packed.images))
        return scores.split([sum(r.written for r in g.rollouts) for g in groups])

    def _pack(self, groups: list[RolloutGroup]) -> Packed:
        conversations = [[r.conversation for r in g.rollouts] for g in groups]
        return pack(conversations, self.vlm.host, self.args.device, self.scorer.penalty != 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        recipe, groups = self.recipe, inputs
        packed = self._pack(groups)
        scores, entropy = self.score(model, packed)  # (N,) each, over the sampled tokens
        sampled, device = [r for g in groups for r in g.rollouts], scores.device

        # 1) Spread each rollout's advantage, or those of its turns, and its length over its tokens.
        advantage = torch.tensor([a for g in groups for a in g.advantages], device=device)[packed.conversation_index]  # (N,)
        if any(g.turns for g in groups):
            spread = [
                x for g in groups for r, values in zip(g.rollouts, g.turns or (), strict=True) for x in per_token(r, values)
            ]
            advantage = torch.tensor(spread, device=device)
        length = torch.tensor([r.written for r in sampled], device=device, dtype=scores.dtype)[packed.conversation_index]

        # 2) The clipped objective. The ratio is 1; it carries the gradient.
        ratio = (scores - scores.detach()).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - recipe.clip, 1 + recipe.clip) * advantage)

        # 3) The KL divergence from the reference, by the estimator k3: unbiased, never negative.
        divergence = torch.zeros_like(scores)
        if recipe.beta:
            difference = torch.cat([g.reference for g in groups]) - scores
            divergence = difference.exp() - difference - 1

        # 4) Log, and compare what sampling and scoring say of the same tokens.
        with torch.no_grad():
            mismatch = (scores - torch.tensor([x for r in sampled for x in r.logprobs], device=device)).abs()
            self.record_metrics(
                kl=divergence.mean(), entropy=entropy.mean(), sampler_dlogp=mismatch.mean(), scored_tokens=packed.tokens
            )

        # 5) Mean over a rollout's tokens, then over rollouts; Trainer averages over processes, which the last factor undoes.
        if recipe.token_mean == "parts":
            is_call = torch.tensor([c for r in sampled for c in call_tokens(r)], device=device, dtype=torch.bool)
            share = part_shares(is_call, *self.part_tokens, recipe.tool_tokens)
            return -((gain - recipe.beta * divergence) * share).sum() * self.args.world_size
        share = 1 / length if recipe.scaling != "dr_grpo" else 1 / recipe.max_new_tokens
        return -((gain - recipe.beta * divergence) * share).sum() / num_items_in_batch * self.args.world_size

    # ------------------------------------------------------------------ reports

    def rollout_metrics(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """Means over the step's rollouts of all processes; ``frac_zero_std`` is over its groups."""
        scored = [(r, p) for g in groups for r, p in zip(g.rollouts, g.parts, strict=True)]
        sums = {
            "reward": sum(p["reward"] for _, p in scored),
            "answer_score": sum(p["answer"] for _, p in scored),
            "call_rate": sum(rewards.called(r) for r, _ in scored),
            "area": sum(p["covered"] for _, p in scored),
            "rtr": sum(r.trajectory.rtr or 0.0 for r, _ in scored),
            "parse_fail": sum(rewards.malformed(r) for r, _ in scored),
            "truncated": sum(not r.complete for r, _ in scored),
            "reply_tokens": sum(r.written for r, _ in scored),
        }
        for name in ("tool", "crop", "region", "small"):  # of the schemes that have them
            if any(name in p for _, p in scored):
                sums[f"{name}_score"] = sum(p.get(name, 0.0) for _, p in scored)
        for name in ("miss", "use", "area"):
            sums[f"cost_{name}"] = sum(p.get(name, 0.0) for _, p in scored)
        count = self.sum_over_ranks(len(scored))
        metrics = {name: self.sum_over_ranks(value) / count for name, value in sums.items()}
        without_signal = sum(len({p["reward"] for p in g.parts}) == 1 for g in groups)  # equal rewards teach nothing
        metrics["frac_zero_std"] = self.sum_over_ranks(without_signal) / self.sum_over_ranks(len(groups))
        return metrics

    def log(self, logs: dict, *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if "reward" in logs and self.args.should_save:
            for warning in self.health_checks(logs):
                print(f"warning, step {self.state.global_step}: {warning}", file=sys.stderr)
                with (Path(self.args.output_dir) / "warnings.jsonl").open("a") as f:
                    f.write(json.dumps({"step": self.state.global_step, "warning": warning}) + "\n")

    def save_rollouts(self, prompts: list[Prompt], groups: list[RolloutGroup], step: int) -> None:
        """Write ``completions/STEP.parquet``: every rollout of a step with its replies, crops and parts of the reward."""
        import pandas

        rows = [
            {
                "step": step,
                "id": prompt.sample.key,
                "question": prompt.truth.question,
                "answers": list(prompt.truth.answers),
                "label": prompt.truth.label,
                "replies": [reply.text for reply in rollout.trajectory.replies],
                "crops": list(rollout.trajectory.crops),
                "rtr": rollout.trajectory.rtr,
                **parts,
                "advantage": advantage,
            }
            for prompt, group in zip(prompts, groups, strict=True)
            for rollout, parts, advantage in zip(group.rollouts, group.parts, group.advantages, strict=True)
        ]
        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(exist_ok=True)
        rank = f"-{self.args.process_index}" if self.args.process_index else ""
        pandas.DataFrame(rows).to_parquet(folder / f"{step:06d}{rank}.parquet")


def per_token(rollout: Rollout, of_turns: Sequence[float]) -> list[float]:
    """A value of each turn -> the same for each token that was sampled, in order; replies put into the model's mouth have none."""
    spans, weights = rollout.conversation.replies, rollout.conversation.weights
    return [x for x, (start, end) in zip(of_turns, spans, strict=True) for weight in weights[start:end] if weight]


def call_tokens(rollout: Rollout) -> list[bool]:
    """Of each sampled token, whether it is of a call: of any reply but the last."""
    last = len(rollout.conversation.replies) - 1
    return [bool(x) for x in per_token(rollout, [float(i < last) for i in range(last + 1)])]


def part_shares(is_call: Tensor, calls: float, answers: float, tool_tokens: float) -> Tensor:
    """The weight of each token (N,) in a mean over all ``calls`` tokens of calls, times ``tool_tokens``, plus one over all of answers."""
    return torch.where(is_call, tool_tokens / max(calls, 1.0), 1 / max(answers, 1.0))


def _reward_weights(recipe: GRPO) -> rewards.RewardWeights:
    return rewards.RewardWeights(**{field.name: getattr(recipe, field.name) for field in fields(rewards.RewardWeights)})


def build(recipe: GRPO, dry: bool = False) -> GRPOTrainer:
    """Check the data and the judge and acquire the run's folder, then load the model -> a trainer.

    dry: acquire no folder. Raises RecipeError, DataError, JudgeError, CheckpointError.
    """
    accumulate = per_process(recipe.prompts, recipe.micro_batch, "prompts")
    table = examples.rows(
        recipe.data, needs=("image", "question", "answers", *(("boxes",) if recipe.crop_judge == "evidence" else ()))
    )
    labels = set(table["label"]) if "label" in table.column_names else {None}
    if labels - {"LR", "HR", None}:
        raise examples.DataError(f"{recipe.data!r}: label is {sorted(map(str, labels))}; allowed: LR, HR, null")
    if recipe.scheme == "awares" and recipe.miss and recipe.missed == "label" and labels == {None}:
        raise RecipeError(
            "miss is above 0 and no row has a label, so that nobody could ever be charged; "
            "run curate, or set miss: 0 or missed: wrong"
        )
    if len(table) < recipe.prompts:
        raise examples.DataError(f"{recipe.data!r} has {len(table)} rows, a step takes {recipe.prompts}")
    policy = policy_of(recipe)
    grader = judge(recipe.answer, recipe.judge_model, recipe.judge_url, device_of(recipe))
    if not dry:
        acquire_run_folder(recipe, "grpo")
    scorer, vlm = prepare(recipe)
    examples.check_texts(table, vlm.check, recipe.data)
    scorer.banned, scorer.temperature, scorer.penalty = list(banned_tokens(vlm.host)), recipe.temperature, vlm.repetition_penalty
    arguments = training_arguments(recipe, recipe.micro_batch, accumulate, dataloader_drop_last=True)
    return GRPOTrainer(scorer, vlm, recipe, policy, grader, args=arguments, train_dataset=Prompts(table, recipe))


def run(recipe: GRPO) -> None:
    """Train, continuing where the run's folder stopped. The result is ``out/checkpoint``, which evaluation loads."""
    trainer = build(recipe)
    trainer.run()
    result = trainer.result()
    if trainer.args.should_save:
        finish(*result, Path(trainer.args.output_dir), "grpo", recipe)


def dry_run(recipe: GRPO, say=print) -> None:
    """Roll out and reward one batch, and print replies, rewards and token counts. Takes no step."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(replace(recipe, out=scratch), dry=True)
    vlm, prompts = trainer.vlm, [trainer.train_dataset[i] for i in range(recipe.micro_batch)]
    sampled, sampler = rollouts(
        vlm,
        trainer.policy,
        [prompt.sample for prompt in prompts],
        recipe.group,
        recipe.max_new_tokens,
        recipe.temperature,
    )
    for prompt, rollouts_of_prompt in zip(prompts, sampled, strict=True):
        group = trainer.score_group(prompt, rollouts_of_prompt)
        say(f"--- {prompt.truth.question!r} -> {prompt.truth.answers}, label {prompt.truth.label}")
        for rollout, parts, advantage in zip(group.rollouts, group.parts, group.advantages, strict=True):
            text = " | ".join(reply.text for reply in rollout.trajectory.replies)
            say(f"    {text!r}: " + ", ".join(f"{k} {v:.3g}" for k, v in parts.items()) + f", advantage {advantage:+.2f}")
    conversations = [[r.conversation for r in group] for group in sampled]
    describe(trainer.scorer, [c for group in conversations for c in group], vlm, say)
    packed, alone = pack(conversations, vlm.host).tokens, sum(len(c.ids) for group in conversations for c in group)
    say(
        f"packed into {packed} tokens, {alone} one by one; "
        f"{sampler.prefilled} prefilled, {sampler.shared} shared; no step was taken"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe.add_arguments(parser, "nano_grpo")
    parser.add_argument("--dry-run", action="store_true", help="render and score one batch, print masks and counts, take no step")


def main(args: argparse.Namespace) -> int:
    """``awares-bench train grpo``."""
    (dry_run if args.dry_run else run)(recipe.load(RECIPE, args.recipe, args.set))
    return 0
