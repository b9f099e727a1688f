"""GRPO over whole exchanges: rollouts by the policy and engine of evaluation, a packed score, a reward that prices looking.

Strictly on-policy: one optimiser step per rollout, so the ratio of new to old policy is 1 and clipping is idle; it stands in
the loss for the gradient's sake and guards against a future that takes several steps. Paper Sec. 3.4 and 4.3.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from awares_bench.inference.local_model import VLM
from awares_bench.methods.conversation import Sample
from awares_bench.methods.crop_grid import PAPER_GRID

from . import examples, rewards
from .auxiliary.cropper import Target
from .curation.judges import judge
from .export import finish
from .health_checks import Watch
from .packing import Scorer, pack
from .recipe import RecipeError, Tuning, claim, key
from .rollouts import Rollout, banned, rollouts
from .trainer import ExactTrainer, arguments, describe, device_of, open_vlm, per_process, policy_of, prepare, whole


@dataclass(frozen=True)
class GRPO(Tuning):
    """A recipe of GRPO. Defaults: paper Sec. 4.3 and supplement Table 7, where they print a value.

    prompts, group: questions a step over all processes, and rollouts of each (64 completions a step, 8 a question)
    micro_batch:    groups a forward pass; the loss is the same for any
    scaling:        ``group_std`` (paper), ``dr_grpo`` (no deviation, constant length), ``none`` (no deviation)
    beta:           weight of the KL divergence from the start, which is the SFT model
    answer:         ``embedding`` (paper), ``anls``, ``exact``, ``relaxed``, ``local`` or ``endpoint`` (a judge; see judges.py)
    scheme:         how rewards are put together: ``awares``, ``visionthink``, or ``likelihood`` of the first answer under ``target``
                    (CropVLM's, for role ``cropper``; see ``cropper.Target``)
    target:         frozen checkpoint of scheme ``likelihood``
    w_ans, miss, use, area, area_of, missed: see ``rewards.Costs``
    max_new_tokens: of a reply; crops do not count against it
    repetition_penalty: of rollouts and their scores; null: the one of the start's ``generation_config.json``, with which it is evaluated
    """

    lr: float = key(1e-5, above=0, high=1)
    schedule: str = key("linear", one_of=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup: float = key(0.0, low=0, high=1)
    prompts: int = key(8, low=1)
    group: int = key(8, low=2)
    micro_batch: int = key(1, low=1)
    temperature: float = key(1.0, above=0, high=10)
    repetition_penalty: float | None = key(None, above=0)
    max_new_tokens: int = key(512, low=1)
    scaling: str = key("group_std", one_of=("group_std", "dr_grpo", "none"))
    clip: float = key(0.2, above=0, high=1)
    beta: float = key(0.05, low=0)
    answer: str = key("embedding", one_of=("embedding", "anls", "exact", "relaxed", "local", "endpoint"))
    judge_model: str = key("")
    judge_url: str = key("")
    scheme: str = key("awares", one_of=(*rewards.SCHEMES, "likelihood"))
    target: str = key("")
    w_ans: float = key(1.0, low=0)
    miss: float = key(2.0, low=0)
    use: float = key(0.25, low=0)
    area: float = key(0.01, low=0)
    area_of: str = key("union", one_of=("union", "sum"))
    missed: str = key("label", one_of=("label", "wrong"))

    def __post_init__(self):
        super().__post_init__()
        if (self.scheme == "likelihood") != bool(self.role) or bool(self.role) != bool(self.target):
            raise RecipeError(
                "scheme: likelihood, a role and a target go together: a frozen target scores what the role shows it"
            )


RECIPE = GRPO


@dataclass(frozen=True)
class Prompt:
    sample: Sample
    truth: rewards.Truth


class Prompts(torch.utils.data.Dataset):
    """Rows with ``answers`` and perhaps ``label`` as prompts."""

    def __init__(self, table, recipe: GRPO):
        self.table, self.recipe = table, recipe

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Prompt:
        row = self.table[index]
        truth = rewards.Truth(row["question"], examples.answers(row), row.get("label"))
        return Prompt(examples.sample(row, index, self.recipe.largest_side), truth)


@dataclass
class Group:
    """Rollouts of one prompt, what each is worth, and the reference's log-probabilities of their tokens."""

    rollouts: list[Rollout]
    parts: list[dict[str, float]]
    advantages: list[float]
    reference: Tensor | None = None


class GRPOTrainer(ExactTrainer):
    """One rollout, one step. Every number is a function of (recipe, step): a resumed run says what an uncut one says."""

    def __init__(self, scorer: Scorer, vlm: VLM, recipe: GRPO, policy, judge, **more):
        super().__init__(scorer, vlm, recipe, **more)
        self.policy, self.judge, self.costs = policy, judge, _costs(recipe)
        self.target = Target(open_vlm(replace(recipe, start=recipe.target)), policy) if recipe.target else None
        self.reference = None
        if recipe.beta and recipe.tuning == "full":
            frozen = copy.deepcopy(scorer.model).requires_grad_(False).eval()
            self.reference = Scorer(frozen, tuple(scorer.banned), scorer.temperature, scorer.penalty)
        self.watch = Watch(calls=not recipe.role)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self.take(epoch_iterator, num_batches)
        prompts, r, step = [p for batch in batches for p in batch], self.recipe, self.state.global_step
        self.scorer.eval()
        with torch.no_grad(), self.accelerator.autocast(), whole(self.scorer):
            seed = f"{r.seed}/{step}"
            samples = [p.sample for p in prompts]
            made, sampler = rollouts(
                self.vlm, self.policy, samples, r.group, self.features, r.max_new_tokens, r.temperature, seed
            )
            groups = [self._worth(p, g) for p, g in zip(prompts, made, strict=True)]
            for start in range(0, len(groups), r.micro_batch) if r.beta else ():
                self._refer(groups[start : start + r.micro_batch])
        self._figures(groups, sampler)
        if (step + 1) % r.log_every == 0:
            self._table(prompts, groups, step + 1)
        total = self.total(sum(len(g.rollouts) for g in groups))
        micro = [groups[i : i + r.micro_batch] for i in range(0, len(groups), r.micro_batch)]
        return micro, torch.tensor(total, device=device)

    def _worth(self, prompt: Prompt, group: list[Rollout]) -> Group:
        if self.target:
            parts = self.target(prompt.sample, prompt.truth.answers[0], group)
        else:
            parts = rewards.SCHEMES[self.recipe.scheme](group, prompt.truth, self.judge, self.costs)
        return Group(group, parts, rewards.advantages([p["reward"] for p in parts], self.recipe.scaling))

    def _refer(self, groups: list[Group]) -> None:
        packed = pack(
            [[r.conversation for r in g.rollouts] for g in groups], self.vlm, self.args.device, self.scorer.penalty != 1
        )
        without = self.scorer.model.disable_adapter() if self.reference is None else nullcontext()
        with without:
            scores, _ = (self.reference or self.scorer)(packed, self.features(packed.views))
        sizes = [sum(r.written for r in g.rollouts) for g in groups]
        for group, part in zip(groups, scores.split(sizes), strict=True):
            group.reference = part

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        r, groups = self.recipe, inputs
        packed = pack(
            [[x.conversation for x in g.rollouts] for g in groups], self.vlm, self.args.device, self.scorer.penalty != 1
        )
        scores, entropy = self.score(model, packed)
        some, device = [x for g in groups for x in g.rollouts], scores.device
        advantage = torch.tensor([a for g in groups for a in g.advantages], device=device)[packed.owner]  # (N,)
        length = torch.tensor([x.written for x in some], device=device, dtype=scores.dtype)[packed.owner]
        ratio = (scores - scores.detach()).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - r.clip, 1 + r.clip) * advantage)
        divergence = torch.zeros_like(scores)
        if r.beta:
            apart = torch.cat([g.reference for g in groups]) - scores
            divergence = apart.exp() - apart - 1  # k3: unbiased, never negative
        share = 1 / length if r.scaling != "dr_grpo" else 1 / r.max_new_tokens
        sampled = torch.tensor([x for one in some for x in one.logps], device=device)
        with torch.no_grad():
            apart = (scores - sampled).abs()
            self.note(kl=divergence.mean(), entropy=entropy.mean(), sampler_dlogp=apart.mean(), scored_tokens=packed.tokens)
        return -((gain - r.beta * divergence) * share).sum() / num_items_in_batch * self.args.world_size

    # ------------------------------------------------------------------ what a reader watches

    def _figures(self, groups: list[Group], sampler) -> None:
        some = [(r, p) for g in groups for r, p in zip(g.rollouts, g.parts, strict=True)]
        count, alike = self.total(len(some)), self.total(sum(len({p["reward"] for p in g.parts}) == 1 for g in groups))
        sums = {
            "reward": sum(p["reward"] for _, p in some),
            "answer_score": sum(p["answer"] for _, p in some),
            "call_rate": sum(rewards.called(r) for r, _ in some),
            "area": sum(PAPER_GRID.union_area(r.trajectory.crops) for r, _ in some),
            "rtr": sum(r.trajectory.rtr or 0.0 for r, _ in some),
            "parse_fail": sum(rewards.malformed(r) for r, _ in some),
            "truncated": sum(not r.complete for r, _ in some),
            "reply_tokens": sum(r.written for r, _ in some),
        }
        for name in ("miss", "use", "area"):
            sums[f"cost_{name}"] = sum(p.get(name, 0.0) for _, p in some)
        figures = {name: self.total(value) / count for name, value in sums.items()}
        figures["frac_zero_std"] = alike / self.total(len(groups))
        self.note(**figures, prefilled_tokens=sampler.prefilled, shared_tokens=sampler.shared)

    def log(self, logs: dict, *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if "reward" in logs and self.args.should_save:
            for warning in self.watch(logs):
                print(f"warning, step {self.state.global_step}: {warning}", file=sys.stderr)
                with (Path(self.args.output_dir) / "warnings.jsonl").open("a") as f:
                    f.write(json.dumps({"step": self.state.global_step, "warning": warning}) + "\n")

    def _table(self, prompts: list[Prompt], groups: list[Group], step: int) -> None:
        """``completions/STEP.parquet``: every rollout of a step with its replies, crops and reward parts."""
        import pandas

        rows = []
        for prompt, group in zip(prompts, groups, strict=True):
            for r, parts, advantage in zip(group.rollouts, group.parts, group.advantages, strict=True):
                t = prompt.truth
                known = {
                    "step": step,
                    "id": prompt.sample.key,
                    "question": t.question,
                    "answers": list(t.answers),
                    "label": t.label,
                }
                said = {
                    "replies": [x.text for x in r.trajectory.replies],
                    "crops": list(r.trajectory.crops),
                    "rtr": r.trajectory.rtr,
                }
                rows.append(known | said | parts | {"advantage": advantage})
        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(exist_ok=True)
        rank = f"-{self.args.process_index}" if self.args.process_index else ""
        pandas.DataFrame(rows).to_parquet(folder / f"{step:06d}{rank}.parquet")


def _costs(recipe: GRPO) -> rewards.Costs:
    return rewards.Costs(recipe.w_ans, recipe.miss, recipe.use, recipe.area, recipe.area_of, recipe.missed)


def build(recipe: GRPO, dry: bool = False) -> GRPOTrainer:
    """Check the data and the judge and claim the run's folder, then load the model -> a trainer ready to go."""
    accumulate = per_process(recipe.prompts, recipe.micro_batch, "prompts")
    table = examples.rows(recipe.data, needs=("image", "question", "answers"))
    labels = set(table["label"]) if "label" in table.column_names else {None}
    if labels - {"LR", "HR", None}:
        raise examples.DataError(f"{recipe.data!r}: label is {sorted(map(str, labels))}; allowed: LR, HR, null")
    if recipe.scheme == "awares" and recipe.miss and recipe.missed == "label" and labels == {None}:
        raise RecipeError(
            "miss is above 0 and no row has a label, so that nobody could ever be charged; run curate, or set miss: 0 or missed: wrong"
        )
    if len(table) < recipe.prompts:
        raise examples.DataError(f"{recipe.data!r} has {len(table)} rows, a step takes {recipe.prompts}")
    policy = policy_of(recipe)
    grader = judge(recipe.answer, recipe.judge_model, recipe.judge_url, device_of(recipe))
    if not dry:
        claim(recipe, "grpo")
    scorer, vlm = prepare(recipe)
    examples.check_texts(table, vlm.check, recipe.data)
    scorer.banned, scorer.temperature, scorer.penalty = list(banned(vlm)), recipe.temperature, vlm.repetition_penalty
    args = arguments(recipe, recipe.micro_batch, accumulate, dataloader_drop_last=True)
    return GRPOTrainer(scorer, vlm, recipe, policy, grader, args=args, train_dataset=Prompts(table, recipe))


def run(recipe: GRPO) -> None:
    """Train, resuming where the folder stopped; the result is ``out/checkpoint``, which evaluation loads."""
    trainer = build(recipe)
    trainer.go()
    result = trainer.result()
    if trainer.args.should_save:
        finish(*result, Path(trainer.args.output_dir), "grpo", recipe)


def dry_run(recipe: GRPO, say=print) -> None:
    """One rollout of one batch, its rewards, its packed tokens; no step."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(replace(recipe, out=scratch), dry=True)
    data = trainer.train_dataset
    prompts = [data[i] for i in range(recipe.micro_batch)]
    samples = [p.sample for p in prompts]
    made, sampler = rollouts(
        trainer.vlm, trainer.policy, samples, recipe.group, trainer.features, recipe.max_new_tokens, recipe.temperature
    )
    for prompt, group in zip(prompts, made, strict=True):
        worth = trainer._worth(prompt, group)
        say(f"--- {prompt.truth.question!r} -> {prompt.truth.answers}, label {prompt.truth.label}")
        for r, parts, advantage in zip(group, worth.parts, worth.advantages, strict=True):
            said = " | ".join(x.text for x in r.trajectory.replies)
            say(f"    {said!r}: " + ", ".join(f"{k} {v:.3g}" for k, v in parts.items()) + f", advantage {advantage:+.2f}")
    some = [r.conversation for g in made for r in g]
    describe(trainer.scorer, some, trainer.vlm, say)
    packed, alone = pack([[r.conversation for r in g] for g in made], trainer.vlm).tokens, sum(len(c.ids) for c in some)
    say(
        f"packed into {packed} tokens, {alone} one by one; {sampler.prefilled} prefilled, {sampler.shared} shared; no step was taken"
    )
