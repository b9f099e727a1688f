"""What SFT and GRPO share: loading the model, with adapters or without; exact resume; checkpoints; logs."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from awares_bench.inference.image_features import FeatureStore
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.options import options, unknown_option
from awares_bench.methods.registry import method_class
from awares_bench.models.checkpoint import check_told
from awares_bench.models.packaged import resolve

from .auxiliary.cropper import AuxiliaryTurn
from .packing import Packed, Scorer
from .recipe import RecipeError, TrainerRecipe, TrainingRecipe
from .rendering import Conversation

COMPLETE_MARKER = "whole"
"""File written last into a checkpoint: a run that was killed while saving leaves a checkpoint without it."""


def device_of(recipe) -> str:
    """``cpu``, or the GPU of this process. If every process loaded onto the first GPU, it would hold all of their models."""
    if recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def policy_of(recipe):
    """The recipe's method with its options; with a role, the turn of that auxiliary model alone.

    Raises ValueError for an unknown method and RecipeError for an unknown option or role; both list the known ones.
    """
    cls = method_class(recipe.policy)
    for name in recipe.policy_options:
        if name not in options(cls):
            raise RecipeError(f"policy_options of {recipe.policy}: {unknown_option(str(name), list(options(cls)))}")
    policy = cls(**recipe.policy_options)
    if not getattr(recipe, "role", ""):
        return policy
    if recipe.role not in policy.models:
        known = ", ".join(policy.models) or "none but the model under test"
        raise RecipeError(f"role is {recipe.role!r}; models of {recipe.policy}: {known}")
    return AuxiliaryTurn(policy, recipe.role)


def open_vlm(recipe, dtype: str = "auto") -> LocalModel:
    """The recipe's start with its processor limits. Raises CheckpointError."""
    return LocalModel.load(
        resolve(recipe.start),
        dtype=dtype,
        device=device_of(recipe),
        attn_implementation=getattr(recipe, "attention", "sdpa"),
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
        repetition_penalty=getattr(recipe, "repetition_penalty", None),
    )


def prepare(recipe: TrainingRecipe, dropout: float = 0.0, vlm: LocalModel | None = None) -> tuple[Scorer, LocalModel]:
    """Load the start, freeze the tower, and add adapters or unfreeze the decoder.

    vlm: the start, where it is loaded already. -> (what is trained, what answers); both hold the same weights.
    """
    dtype = "float32" if recipe.tuning == "full" else recipe.dtype
    vlm = vlm or open_vlm(recipe, dtype)
    model = vlm.host.model.requires_grad_(False)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.tuning == "full":
        vlm.host.decoder.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        embeddings = {}
        if recipe.embeddings:
            tied = model.config.tie_word_embeddings
            names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
            embeddings = {"modules_to_save": names, "ensure_weight_tying": tied}
        torch.manual_seed(recipe.seed)
        config = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=dropout,
            target_modules=vlm.host.lora_targets,
            **embeddings,
        )
        model = get_peft_model(model, config)
    return Scorer(vlm.host, model=model), vlm


def training_arguments(recipe: TrainerRecipe, per_device: int, accumulate: int, **others) -> TrainingArguments:
    """Trainer's arguments for a recipe. others: arguments of Trainer that no recipe decides."""
    on_gpu = device_of(recipe) != "cpu"
    return TrainingArguments(
        output_dir=str(Path(recipe.out).expanduser()),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulate,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # below 1: a share of the steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip_norm,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_first_step=False,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_every,
        save_total_limit=None,  # we delete old checkpoints ourselves, and count only complete ones
        report_to=recipe.report_to,
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
        **others,
    )


def describe(scorer: Scorer, conversations: list[Conversation], vlm: LocalModel, say=print) -> None:
    """Print token counts and an estimate of memory."""
    tokens = sum(len(c.ids) for c in conversations)
    visual = sum(i == vlm.host.image_token for c in conversations for i in c.ids)
    scored = sum(w > 0 for c in conversations for w in c.weights)
    say(f"{len(conversations)} conversations: {tokens} tokens, {visual} visual, {scored} scored")
    trained = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
    weight_bytes = sum(p.numel() * p.element_size() for p in scorer.parameters())
    config = scorer.host.model.config.text_config
    activation_bytes = tokens * config.num_hidden_layers * (10 * config.hidden_size + 3 * config.intermediate_size) * 2
    state_gib = (weight_bytes + trained * 12) / 2**30  # a float32 gradient and AdamW's two moments for each trained weight
    say(
        f"{trained:,} trained parameters; about {state_gib:.2f} GiB for weights, gradients and optimizer, "
        f"{activation_bytes / 2**30:.2f} GiB for activations of this batch without checkpointing"
    )


def per_process(total: int, micro: int, what: str) -> int:
    """Micro-batches each process accumulates for a step of ``total``. Raises RecipeError when they do not divide."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if total % (micro * world):
        raise RecipeError(f"{what} is {total}; it must be a multiple of {micro} a forward pass times {world} processes")
    return total // (micro * world)


class ResumableTrainer(Trainer):
    """Trainer whose loss is normalised over the whole global batch and whose resumed run equals one that was not cut.

    transformers' own resume of a fully tuned Qwen2.5-VL loads nothing (the names it saves are not the names it loads with
    ``strict=False``; 5.17 and 5.23), so weights are read back with ``from_pretrained``.
    """

    scorer: Any
    """A ``Scorer``, or another module that scores packed conversations."""
    recipe: Any
    """A ``TrainerRecipe``, of the trainer's own class."""

    def __init__(self, scorer: nn.Module, vlm: LocalModel, recipe: TrainerRecipe, **arguments):
        super().__init__(model=scorer, data_collator=list, callbacks=[_Log(Path(recipe.out).expanduser())], **arguments)
        if _zero3(self.accelerator):
            raise RecipeError("ZeRO-3 is not supported: launch with DDP, ZeRO-2 or FSDP2 (training/launch)")
        for name, started in (("FSDP", self.is_fsdp_enabled), ("DEEPSPEED", self.is_deepspeed_enabled)):
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" and not started:
                raise RecipeError(f"{name} was asked for, and accelerate starts it on GPUs only; on CPUs use torchrun alone")
        if self.is_fsdp_enabled:
            _shard_decoder_only(self.accelerator.state.fsdp_plugin, vlm)
        self.scorer, self.vlm, self.recipe = scorer, vlm, recipe
        vlm.features = FeatureStore(recipe.feature_mb * 2**20) if recipe.feature_mb else None
        self.model_accepts_loss_kwargs = True  # our losses are normalised already: Trainer must not divide them again
        self.step_metrics: dict[str, list[float]] = {}

    def score(self, model, packed: Packed) -> tuple[Tensor, ...]:
        """What ``model`` says of packed conversations, under autocast: of a ``Scorer`` log-probabilities and entropies (N,) of the scored tokens.

        Accelerate itself autocasts neither the tower nor a sharded decoder.
        """
        with self.accelerator.autocast():
            return model(packed, self.vlm.encode(packed.images))

    # ------------------------------------------------------------------ metrics

    def sum_over_ranks(self, value: float) -> float:
        """Sum over the processes, in double precision."""
        if self.args.world_size == 1:
            return float(value)
        return self.accelerator.reduce(torch.tensor(float(value), device=self.args.device, dtype=torch.float64), "sum").item()

    def record_metrics(self, **metrics: float) -> None:
        """Metrics of a step; the next log line holds their means since the last one."""
        for name, value in metrics.items():
            self.step_metrics.setdefault(name, []).append(float(value))

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= {name: sum(v) / len(v) for name, v in self.step_metrics.items()}
            self.step_metrics.clear()
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ what Trainer calls

    def next_microbatches(self, iterator, count: int) -> list:
        """The micro-batches of the next step, fewer at the end of an epoch. Empties the feature cache, as a resume does."""
        if self.vlm.features:
            self.vlm.features.clear()
        return list(islice(iterator, count))

    def _prepare_inputs(self, inputs):
        return inputs

    def floating_point_ops(self, inputs) -> int:
        return 0

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:  # since transformers 5.23 every process comes here
            self.scorer.model.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes its own random state, and its shards
        if self.args.should_save:
            out = Path(self.args.output_dir)
            (out / f"checkpoint-{self.state.global_step}" / COMPLETE_MARKER).touch()
            for old in complete_checkpoints(out)[: -self.recipe.keep]:
                shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        tuned = self.scorer.model
        # 1) Sharded weights: each process reads its own shards, which Trainer can do.
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # 2) Adapters: read the file, and refuse one that lacks a tensor or belongs to another model.
        elif hasattr(tuned, "peft_config"):
            from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

            saved = load_peft_weights(resume_from_checkpoint, device="cpu")
            missing = sorted(get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - saved.keys())
            if missing:
                raise RecipeError(
                    f"{resume_from_checkpoint} lacks {len(missing)} tensors of the adapters: {missing[:2]}; delete that folder"
                )
            report: Any = set_peft_model_state_dict(tuned, saved)
            if report.unexpected_keys:
                raise RecipeError(f"{resume_from_checkpoint} holds adapters of another model: {report.unexpected_keys[:2]}")
        # 3) All weights: load them as a model of their own, whose names are right, and copy the values.
        else:
            saved, report = type(tuned).from_pretrained(
                resume_from_checkpoint,
                dtype=tuned.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_told names them and refuses, as at every load
            )
            check_told(saved, report, resume_from_checkpoint)
            tuned.load_state_dict(saved.state_dict(), strict=True)

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train from the newest complete checkpoint in the run's folder, or from the start."""
        out = Path(self.args.output_dir)
        # Delete what a killed save left; the other processes wait, so that all of them resume from the same checkpoint.
        if self.args.should_save:
            for incomplete in set(out.glob("checkpoint-*")) - set(complete_checkpoints(out)):
                shutil.rmtree(incomplete)
        self.accelerator.wait_for_everyone()
        checkpoints = complete_checkpoints(out)
        self.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)

    def result(self) -> tuple[Scorer, LocalModel]:
        """The trained scorer and model; all processes must call this. Sharded weights are gathered on the first one's CPU."""
        if not self.is_fsdp_enabled:
            return self.scorer, self.vlm
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(self.scorer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.args.should_save:
            self.scorer, self.vlm = prepare(replace(self.recipe, device="cpu"))
            self.scorer.load_state_dict(state)
        return self.scorer, self.vlm


@contextmanager
def unsharded(scorer: Scorer):
    """Gather the weights that FSDP2 shards for as long as the context lasts; does nothing for a model that is not sharded.

    Ranks decode different numbers of steps, so an all-gather inside a rollout would deadlock. Therefore all shards are
    gathered first and freed afterwards.
    """
    sharded: list[Any] = [m for m in scorer.modules() if hasattr(m, "unshard")]
    if sharded:  # FSDP2 takes the first module that runs for the root, and a rollout runs a layer first. No public API sets it
        root: Any = scorer
        root._get_fsdp_state()._lazy_init()
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not scorer, recurse=False)
            module.reshard()


def _shard_decoder_only(plugin, vlm: LocalModel) -> None:
    """Complete the settings of training/launch/fsdp2.yaml. Raises RecipeError for settings that would go wrong silently."""
    is_supported = plugin.fsdp_version == 2 and plugin.reshard_after_forward and "SHARDED" in str(plugin.state_dict_type)
    if not is_supported or plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "FSDP is supported with fsdp_version 2, fsdp_reshard_after_forward true, fsdp_state_dict_type SHARDED_STATE_DICT "
            "and fsdp_cpu_ram_efficient_loading false: see training/launch/fsdp2.yaml"
        )
    plugin.transformer_cls_names_to_wrap = [vlm.host.decoder_layer]
    plugin.ignored_modules = list(vlm.host.vision_parts)  # frozen, and called outside of the model's forward pass
    plugin.mixed_precision_policy = None  # autocast, as with DDP: gradients are summed in float32


def _zero3(accelerator) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def complete_checkpoints(out: Path) -> list[Path]:
    """Checkpoints that were saved completely, oldest first."""
    return sorted((p.parent for p in out.glob(f"checkpoint-*/{COMPLETE_MARKER}")), key=lambda p: int(p.name.split("-")[1]))


class _Log(TrainerCallback):
    """Writes ``log.jsonl``, one line per log step. A resumed run first drops the lines after its checkpoint."""

    def __init__(self, out: Path):
        self.path = out / "log.jsonl"

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            lines = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= state.global_step]
            self.path.write_text("".join(x + "\n" for x in lines))

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in (logs or {}):
            with self.path.open("a") as f:
                f.write(json.dumps({"step": state.global_step, **logs}) + "\n")
