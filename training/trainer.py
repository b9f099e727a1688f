"""What both trainers share: loading with adapters or not, exact resume, whole checkpoints, logs, and the final checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from awares_bench.inference.local_model import VLM
from awares_bench.methods.options import options, unknown_option
from awares_bench.methods.registry import method_class
from awares_bench.models.checkpoint import check_told
from awares_bench.models.packaged import resolve

from .auxiliary.cropper import Part
from .packing import Conversation, Features, Packed, Scorer
from .recipe import RecipeError, TrainingRecipe

DECODER_LINEAR = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
COMPLETE_MARKER = "whole"  # written last into a checkpoint: a run killed while saving leaves one without it


def device_of(recipe) -> str:
    """``cpu``, or the GPU of this process: were all to load on the first one, it would hold as many models as there are GPUs."""
    if recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def policy_of(recipe):
    """The recipe's policy with its options. Raises ValueError naming the known methods, or RecipeError the known options."""
    cls = method_class(recipe.policy)
    for name in recipe.policy_options:
        if name not in options(cls):
            raise RecipeError(f"policy_options of {recipe.policy}: {unknown_option(str(name), list(options(cls)))}")
    policy = cls(**recipe.policy_options)
    if not recipe.role:
        return policy
    if recipe.role not in policy.models:
        known = ", ".join(policy.models) or "none but the model under test"
        raise RecipeError(f"role is {recipe.role!r}; models of {recipe.policy}: {known}")
    return Part(policy, recipe.role)


def open_vlm(recipe, dtype: str = "auto") -> VLM:
    """The recipe's start with its processor limits. Raises CheckpointError."""
    return VLM.load(
        resolve(recipe.start),
        dtype=dtype,
        device=device_of(recipe),
        attn_implementation=getattr(recipe, "attention", "sdpa"),
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
        repetition_penalty=getattr(recipe, "repetition_penalty", None),
    )


def prepare(recipe: TrainingRecipe, dropout: float = 0.0) -> tuple[Scorer, VLM]:
    """Load the start, freeze the tower, add adapters or free the decoder -> (what trains, what answers); one set of weights."""
    dtype = "float32" if recipe.tuning == "full" else recipe.dtype
    vlm = open_vlm(recipe, dtype)
    model = vlm.model.requires_grad_(False)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.tuning == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        more = {}
        if recipe.embeddings:
            tied = model.config.tie_word_embeddings
            more = {"modules_to_save": ["embed_tokens"] if tied else ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
        torch.manual_seed(recipe.seed)
        rank, alpha = recipe.lora_rank, recipe.lora_alpha
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=DECODER_LINEAR, **more)
        )
    return Scorer(model), vlm


def training_arguments(recipe: TrainingRecipe, per_device: int, accumulate: int, **more) -> TrainingArguments:
    """Trainer's arguments for a recipe."""
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
        save_total_limit=None,  # ours: only checkpoints that are whole count
        report_to=recipe.report_to,
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
        **more,
    )


def describe(scorer: Scorer, some: list[Conversation], vlm: VLM, say=print) -> None:
    """Print token counts and an estimate of memory."""
    scored = sum(w > 0 for c in some for w in c.weights)
    visual = sum(i == vlm.image_token for c in some for i in c.ids)
    total = sum(len(c.ids) for c in some)
    say(f"{len(some)} conversations: {total} tokens, {visual} visual, {scored} scored")
    trained = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
    held = sum(p.numel() * p.element_size() for p in scorer.parameters())
    config = scorer.core.config.text_config
    kept = total * config.num_hidden_layers * (10 * config.hidden_size + 3 * config.intermediate_size) * 2
    say(
        f"{trained:,} trained parameters; about {(held + trained * 12) / 2**30:.2f} GiB for weights, gradients and optimizer, "
        f"{kept / 2**30:.2f} GiB for activations of this batch without checkpointing"
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

    def __init__(self, scorer: Scorer, vlm: VLM, recipe: TrainingRecipe, **more):
        super().__init__(model=scorer, data_collator=list, callbacks=[_Log(Path(recipe.out).expanduser())], **more)
        if _zero3(self.accelerator):
            raise RecipeError("ZeRO-3 is not supported: launch with DDP, ZeRO-2 or FSDP2 (training/launch)")
        for name, started in (("FSDP", self.is_fsdp_enabled), ("DEEPSPEED", self.is_deepspeed_enabled)):
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" and not started:
                raise RecipeError(f"{name} was asked for, and accelerate starts it on GPUs only; on CPUs use torchrun alone")
        if self.is_fsdp_enabled:
            _shard_decoder_only(self.accelerator.state.fsdp_plugin, vlm)
        self.scorer, self.vlm, self.recipe = scorer, vlm, recipe
        self.features = Features(vlm, recipe.feature_mb)
        self.model_accepts_loss_kwargs = True  # our losses are normalised already: Trainer must not divide once more
        self.step_metrics: dict[str, list[float]] = {}

    def score(self, model, packed: Packed) -> tuple[Tensor, Tensor]:
        """Tower and decoder in the precision of training; Accelerate autocasts neither the tower nor a sharded decoder."""
        with self.accelerator.autocast():
            return model(packed, self.features(packed.views))

    # ------------------------------------------------------------------ sums over processes

    def sum_over_ranks(self, value: float) -> float:
        """Sum over the processes, in double precision where the device has it."""
        if self.args.world_size == 1:
            return float(value)
        return self.accelerator.reduce(torch.tensor(float(value), device=self.args.device, dtype=torch.float64), "sum").item()

    def record_metrics(self, **figures: float) -> None:
        """Figures of a step, averaged until the next log line."""
        for name, value in figures.items():
            self.step_metrics.setdefault(name, []).append(float(value))

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= {name: sum(v) / len(v) for name, v in self.step_metrics.items()}
            self.step_metrics.clear()
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ Trainer's seams

    def next_microbatches(self, iterator, count: int) -> list:
        """The micro-batches of a step, which begins with no features held."""
        self.features.forget()
        out = []
        for _ in range(count):
            try:
                out.append(next(iterator))
            except StopIteration:
                break
        return out

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
            done = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (done / COMPLETE_MARKER).touch()
            for old in complete_checkpoints(Path(self.args.output_dir))[: -self.recipe.keep]:
                shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        tuned = self.scorer.model
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif hasattr(tuned, "peft_config"):
            from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

            saved = load_peft_weights(resume_from_checkpoint, device="cpu")
            lost = sorted(get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - saved.keys())
            if lost:
                raise RecipeError(
                    f"{resume_from_checkpoint} lacks {len(lost)} tensors of the adapters: {lost[:2]}; delete that folder"
                )
            told = set_peft_model_state_dict(tuned, saved)
            if told.unexpected_keys:
                raise RecipeError(f"{resume_from_checkpoint} holds adapters of another model: {told.unexpected_keys[:2]}")
        else:
            more = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # named and refused, as at every load
            saved, told = type(tuned).from_pretrained(resume_from_checkpoint, dtype=tuned.dtype, **more)
            check_told(saved, told, resume_from_checkpoint)
            tuned.load_state_dict(saved.state_dict(), strict=True)

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train from the newest whole checkpoint of the run's folder, or from the start."""
        out = Path(self.args.output_dir)
        if self.args.should_save:
            for cut in set(out.glob("checkpoint-*")) - set(complete_checkpoints(out)):
                shutil.rmtree(cut)
        self.accelerator.wait_for_everyone()
        found = complete_checkpoints(out)
        self.train(resume_from_checkpoint=str(found[-1]) if found else None)

    def result(self) -> tuple[Scorer, VLM]:
        """What was trained. Sharded weights are put together on the CPU of the first process; every process must call this."""
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
    """Weights that FSDP2 shards, whole on every process; nothing to do for others.

    Rollouts use parts of the model, and each process for its own number of steps: a gather inside would wait for one that
    never comes. So all is gathered before and given back after.
    """
    parts = [m for m in scorer.modules() if hasattr(m, "unshard")]
    if parts:  # whoever runs first is taken for the root; rollouts run a layer first. PyTorch has no public word for this
        scorer._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not scorer, recurse=False)
            part.reshard()


def _shard_decoder_only(plugin, vlm: VLM) -> None:
    """Settle what training/launch/fsdp2.yaml leaves open, and refuse what would go wrong silently."""
    known = plugin.fsdp_version == 2 and plugin.reshard_after_forward and "SHARDED" in str(plugin.state_dict_type)
    if not known or plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "FSDP is supported with fsdp_version 2, fsdp_reshard_after_forward true, fsdp_state_dict_type SHARDED_STATE_DICT "
            "and fsdp_cpu_ram_efficient_loading false: see training/launch/fsdp2.yaml"
        )
    plugin.ignored_modules = [vlm.model.model.visual]  # frozen, and used outside of a forward pass of the whole model
    plugin.mixed_precision_policy = None  # autocast, as with DDP: gradients are summed in float32


def _zero3(accelerator) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def complete_checkpoints(out: Path) -> list[Path]:
    """Checkpoints that were saved to the end, oldest first."""
    return sorted((p.parent for p in out.glob(f"checkpoint-*/{WHOLE}")), key=lambda p: int(p.name.split("-")[1]))


class _Log(TrainerCallback):
    """``log.jsonl``: one line per log step; a resumed run drops the lines after its checkpoint first."""

    def __init__(self, out: Path):
        self.path = out / "log.jsonl"

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            before = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [x for x in before if x.endswith("}") and json.loads(x)["step"] <= state.global_step]
            self.path.write_text("".join(x + "\n" for x in kept))

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in (logs or {}):
            with self.path.open("a") as f:
                f.write(json.dumps({"step": state.global_step, **logs}) + "\n")
