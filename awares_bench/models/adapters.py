"""LoRA adapters, merged into the base that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from awares_bench.errors import CheckpointError

from .checkpoint import check_finite, quantisation, saying, some_of


def merge_adapters(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the LoRA adapters of ``folder`` added into its weights, every one of them.

    Names from before transformers 4.52 are taken for today's. Embeddings that the base ties are no longer tied where the
    adapters tell them apart. Raises CheckpointError for adapters that do not fit.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    shown = str(folder)
    if quantised := quantisation(model.config):
        raise CheckpointError(
            f"the adapters in {shown!r} are for a base that is quantised ({quantised}), into which they cannot be merged exactly; name the base that was not quantised in adapter_config.json"
        )
    with saying(f"cannot read the adapters in {shown!r}"):
        config, saved = PeftConfig.from_pretrained(shown), load_peft_weights(shown, device="cpu")
    if not isinstance(config, LoraConfig):
        raise CheckpointError(
            f"the adapters in {shown!r} are {config.peft_type.value}; this release merges LoRA: merge them with peft, and pass the merged model"
        )
    check_finite(saved, shown)
    with saying(f"the adapters in {shown!r} do not fit their base"):
        state = {_key(name): tensor for name, tensor in saved.items()}
        if len(state) < len(saved):
            raise CheckpointError(f"the adapters in {shown!r} name the same part of the model twice")
        if any("base_model.model." + _bare(name) not in state for name in saved):
            _modernise(config, model, state)
        config.inference_mode, tied = True, model.config.tie_word_embeddings  # peft may change the latter
        adapted = PeftModel(model, config)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = sorted(wanted.keys() - state.keys())
        _refuse(missing, "are missing", shown)
        told: Any = set_peft_model_state_dict(adapted, state)
        _refuse(sorted(told.unexpected_keys), "belong to no part of the base", shown)
        _untie(adapted)
        model = adapted.merge_and_unload(safe_merge=True)
    if tied:
        table, head, text = model.get_input_embeddings(), model.lm_head, model.config.text_config
        same = config.ensure_weight_tying or torch.equal(table.weight, head.weight)
        if same:
            head.weight = table.weight
        else:
            model.all_tied_weights_keys = {}
        model.config.tie_word_embeddings = text.tie_word_embeddings = same
    return model.eval()


def _refuse(keys: list[str], what: str, shown: str) -> None:
    if keys:
        raise CheckpointError(
            f"{len(keys)} tensors of the adapters in {shown!r} {what}: {some_of(keys)}; pass adapters that were saved whole, for this base"
        )


def _untie(adapted) -> None:
    """Give the head weights of its own where adapters touch it or the table it shares, so that none is added to both."""
    ends = adapted.get_input_embeddings(), adapted.base_model.model.lm_head
    table, head = (m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in ends)
    if (table, head) != ends and table.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _bare(key: str) -> str:
    """An adapter key without what wrappers write before, into and after module names."""
    key = re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", key)
    key = re.sub(r"^(?:base_model\.model\.)+", "", key)
    return re.sub(r"\.(lora_[A-Za-z_]+)\.default(?=\.|$)", r".\1", key)


def _key(key: str) -> str:
    return "base_model.model." + _today(_bare(key))


def _today(name: str) -> str:
    """A module's name from before transformers 4.52 -> today's; today's -> itself."""
    name = re.sub(r"^visual(?=\.|$)", "model.visual", name)
    return re.sub(r"^model\.(?!(?:language_model|visual)(?:\.|$))", "model.language_model.", name)


def _before(name: str) -> str:
    """A module's name today -> its name before transformers 4.52."""
    return re.sub(r"^model\.visual(?=\.|$)", "visual", re.sub(r"^model\.language_model(?=\.|$)", "model", name))


def _modernise(config, model, keys) -> None:
    """Write an old LoRA config's choice of modules, ranks and alphas out in today's names.

    Its patterns are read against the old names and today's; the reading whose choice the adapters' ``keys`` bear out counts.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules is not None and config.target_modules != "all-linear":
        held = {re.sub(r"\.lora_.*", "", key.removeprefix("base_model.model.")) for key in keys if ".lora_" in key}
        names = [name for name, _ in model.named_modules() if name]
        readings = [{n for n in names if check_target_module_exists(config, said(n))} for said in (_before, str)]
        chosen = min(readings, key=lambda some: (not some, len(some ^ held)))
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, field) or {}
            fits = {
                n: [p for p in patterns if any(re.match(rf"(.*\.)?({p})$", said) for said in (_before(n), n))] for n in chosen
            }
            setattr(config, field, {re.escape(n): patterns[found[0]] for n, found in fits.items() if found})
        config.target_modules = chosen
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = config.modules_to_save and [_today(name) for name in config.modules_to_save]
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {_today(name): ids for name, ids in config.trainable_token_indices.items()}
