"""Checkpoints from disk or the hub: loaded whole, or refused in a sentence that says what is wrong and what to do."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils.quantization_config import QuantizationMethod

from awares_bench.methods.conversation import Turn, chat_messages

from .packaged import resolve

DTYPES = ("float32", "bfloat16", "float16")
"""What ``dtype`` may name beside ``auto``."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer.json", "vocab.json")
_PICTURES = ("preprocessor_config.json", "processor_config.json")
_READ = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
_READ += ("chat_template.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", *_PICTURES)
_SHARDED = ("pytorch_model_fsdp_*", "global_step*", "zero_to_fp32.py", "*.distcp", "mp_rank_*", "*_optim_states.pt")
_HARMLESS = re.compile(r"rotary_(pos_)?emb\.inv_freq$|(^|\.)position_ids$")  # buffers of old releases, computed anew
_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".jinja")
_BASE = "the checkpoint that this one was trained from"


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used, and what to do about it."""


def load(
    pretrained: str, dtype: str = "auto", device: str = "auto", attn_implementation: str = "sdpa"
) -> tuple[Qwen2_5_VLForConditionalGeneration, object]:
    """A checkpoint folder or hub name, or one of LoRA adapters, merged into the base that they name -> model, processor.

    dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. Every tensor of the model comes from the files, every tensor of the
    files is used, and all are finite. Raises CheckpointError, or ValueError for a dtype or device that cannot be.
    """
    where = _device(device)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    return _load(pretrained, getattr(torch, dtype), where, attn_implementation)


def open_processor(pretrained: str):
    """The processor of a checkpoint, without its weights; that of adapters is their base's unless they bring one. Raises CheckpointError."""
    folder = find(pretrained)
    _check_texts(folder, pretrained)
    if not (folder / "adapter_config.json").exists():
        return _processor(folder, pretrained)
    base, revision = _base(folder, pretrained)
    return _own_processor(folder, pretrained) or _processor(_find_base(base, revision, pretrained), base)


def find(pretrained: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint; one that is named by hub name is fetched, or found among what was fetched before."""
    folder = Path(pretrained)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{pretrained!r} is a file; pass the folder that holds it")
    if pretrained.startswith((".", "/", "~")):
        raise CheckpointError(f"no checkpoint folder at {pretrained!r}; pass a folder, a hub name, or pretrained=nano")
    with _saying(f"no folder {pretrained!r} is here, and no checkpoint of that name could be fetched from the hub"):
        fetch = {"revision": revision, "ignore_patterns": ["*/*"]}  # of the top folder only
        found = Path(snapshot_download(pretrained, allow_patterns=[f"*{s}" for s in _SUFFIXES if s != ".bin"], **fetch))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(pretrained, allow_patterns=["*.bin"], **fetch))
    return found


# ---------------------------------------------------------------------- whole checkpoints


def _load(
    pretrained: str, dtype: torch.dtype, device: torch.device, attention: str, revision: str | None = None, above: tuple = ()
):
    """-> model on ``device``, processor. above: the adapter folders whose base this is."""
    folder = find(pretrained, revision)
    _check_files(folder, pretrained)
    if (folder / "adapter_config.json").exists():
        if folder.resolve() in above:
            raise CheckpointError(f"the adapters in {pretrained!r} are their own base; name another in adapter_config.json")
        base, revision = _base(folder, pretrained)
        processor = _own_processor(folder, pretrained)
        try:
            model, theirs = _load(base, dtype, device, attention, revision, (*above, folder.resolve()))
        except CheckpointError as error:
            raise CheckpointError(f"the base of the adapters in {pretrained!r}: {error}") from error
        model = merge_adapters(model, folder)
        if processor is not None:
            _check_match(model, processor, pretrained)
        return model, processor or theirs
    config = _config(folder, pretrained)
    processor = _processor(folder, pretrained)
    _check_weight_files(folder, pretrained)
    quantised = _quantised(config)
    if quantised and quantised not in {method.value for method in QuantizationMethod}:
        raise CheckpointError(
            f"{pretrained!r} is quantised by {quantised!r}, which transformers {transformers.__version__} does not know; "
            "pass the checkpoint that was not quantised"
        )
    kind = f", which is quantised ({quantised})" if quantised else ""
    with _saying(f"cannot load {pretrained!r}{kind}"):
        model, told = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all are named; none is ignored
            **({"device_map": {"": device}} if quantised else {}),
        )
    if quantised and not _quantised(model.config):
        raise CheckpointError(
            f"{pretrained!r} is quantised ({quantised}), and this device can only run it unpacked to bfloat16, which answers otherwise; "
            "use a GPU that has this format, or pass the checkpoint that was not quantised"
        )
    check_told(model, told, pretrained)
    _check_match(model, processor, pretrained)
    if not quantised:
        model = model.to(device)
    model.name_or_path = model.config.name_or_path = pretrained
    _check_finite(dict(model.named_parameters()), pretrained)
    return model, processor


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:0 and so on") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and PyTorch finds no CUDA GPU here; pass device=cpu, or leave device out")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, and PyTorch finds {torch.cuda.device_count()} GPUs here, counted from cuda:0")
    return where


def _check_files(folder: Path, shown: str) -> None:
    """Refuse a folder whose files are not what their names say, or that holds no Qwen2.5-VL and no adapters."""
    names = _check_texts(folder, shown)
    if "adapter_config.json" in names:
        return
    if "config.json" not in names:
        raise CheckpointError(f"cannot read a model config from {shown!r}: it has no config.json{_hint(folder, shown)}")
    kind = _json(folder / "config.json", shown).get("model_type")
    if kind != "qwen2_5_vl":
        raise CheckpointError(f"{shown!r} is a {kind} checkpoint; this release runs qwen2_5_vl (Qwen2.5-VL) only")
    if not names & set(_WEIGHTS):
        raise CheckpointError(f"{shown!r} has a config.json and no weights ({', '.join(_WEIGHTS[:3])}){_hint(folder, shown)}")


def _check_texts(folder: Path, shown: str) -> set[str]:
    """-> the names in a folder. Refuses one that is empty, git-LFS pointers, JSON that is none, adapters cut in two."""
    with _saying(f"cannot read {shown!r}"):
        names = {p.name for p in folder.iterdir()}
        small = [p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file() and p.stat().st_size < 1024]
        pointers = sorted(p.name for p in small if p.read_bytes().startswith(b"version https://git-lfs"))
    if not names:
        raise CheckpointError(f"cannot read a model config from {shown!r}: the folder is empty")
    if pointers:
        raise CheckpointError(
            f"{shown!r} holds git-LFS pointers in place of {_some(pointers)}; run git lfs pull there, or download the files anew"
        )
    for name in sorted(names & set(_READ)):
        _json(folder / name, shown)
    if "adapter_config.json" in names:
        _check_adapter_files(names, shown)
    return names


def _check_adapter_files(names: set[str], shown: str) -> None:
    whole = sorted(names & set(_WEIGHTS))
    if not names & set(_ADAPTERS):
        raise CheckpointError(
            f"{shown!r} has an adapter_config.json and no {' or '.join(_ADAPTERS)}; "
            + ("remove adapter_config.json if the adapters are in the weights already" if whole else "copy it there")
        )
    if whole:
        raise CheckpointError(
            f"{shown!r} holds adapters and the weights of a whole model ({', '.join(whole)}), and cannot say whether the adapters are in "
            "them already; pass a folder that holds one of the two"
        )


def _hint(folder: Path, shown: str) -> str:
    """What else a folder without a model may be, and what to pass instead."""
    inside = [p for p in folder.iterdir() if p.is_dir() and any((p / f).exists() for f in ("config.json", "adapter_config.json"))]
    order = {"checkpoint": 0, "adapter": 1}
    inside.sort(key=lambda p: (order.get(p.name, 2), [-int(n) for n in re.findall(r"\d+$", p.name)], p.name))
    if inside:
        kinds = "subfolder" if len(inside) == 1 else "subfolders"
        which = ", ".join(f"{shown.rstrip('/')}/{p.name}" for p in inside[:4]) + (", ..." if len(inside) > 4 else "")
        return f"; its {kinds} {'has' if len(inside) == 1 else 'have'} a checkpoint: pass {which}"
    if any(any(folder.glob(pattern)) for pattern in _SHARDED):
        return (
            "; it holds the shards of a training state (FSDP or DeepSpeed): put them together first (accelerate merge-weights, or "
            "python zero_to_fp32.py), or pass the folder checkpoint that awares-bench train writes at the end of a run"
        )
    if any(folder.glob("*.gguf")):
        return "; it holds a GGUF file: pass the safetensors checkpoint that it was made from"
    return f"; pass the folder that holds config.json and the weights, or copy what is missing from {_BASE}"


def _config(folder: Path, shown: str) -> Qwen2_5_VLConfig:
    with _saying(f"cannot read a model config from {shown!r}"):
        return AutoConfig.from_pretrained(str(folder))


def _quantised(config: Qwen2_5_VLConfig) -> str | None:
    """The method of a quantised checkpoint."""
    found = getattr(config, "quantization_config", None) or getattr(config.text_config, "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if any(found.get(f) for f in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(found.get("quant_method"), "value", found.get("quant_method")))


def _check_weight_files(folder: Path, shown: str) -> None:
    """Refuse shards that are not there or cut short, and two sets of weights. Reads the headers only."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.exists() else []
    if index.exists():
        with _saying(f"cannot read {index.name} of {shown!r}"):
            where = _json(index, shown)["weight_map"]
            named = sorted(set(where.values()))
        if files and named != [single.name]:
            raise CheckpointError(
                f"{shown!r} holds two sets of weights, {single.name} and the {len(named)} files of {index.name}; remove the one that is not meant"
            )
        lost = [name for name in named if not (folder / name).exists()]
        if lost:
            raise CheckpointError(
                f"{shown!r} lacks {len(lost)} of the {len(named)} weight files that {index.name} names: {_some(lost)}; copy them there"
            )
        files = [folder / name for name in named]
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} of {shown!r} is cut short or damaged ({first_line(error)}); download or copy it again"
            ) from error


def check_told(model, told: dict, shown: str) -> None:
    """Refuse what transformers only warns of: tensors made up at random, of the wrong shape, or left unused."""
    missing, unexpected = sorted(told["missing_keys"]), sorted(k for k in told["unexpected_keys"] if not _HARMLESS.search(k))
    mismatched = [f"{k} ({_shape(a)} in the file, {_shape(b)} by config.json)" for k, a, b in sorted(told["mismatched_keys"])]
    failed = sorted([*(told.get("conversion_errors") or {}), *(told.get("error_msgs") or [])])
    for some, what in (
        (mismatched, "have other shapes than config.json says"),
        (missing, "are missing, and would be random numbers"),
        (unexpected, "belong to no part of the model, and would be left out"),
        (failed, "could not be read"),
    ):
        if some:
            raise CheckpointError(
                f"{len(some)} tensors of {shown!r} {what}: {_some(some)}; save the whole model again, or pass another checkpoint"
            )
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        raise CheckpointError(
            f"config.json of {shown!r} ties lm_head.weight to embed_tokens.weight, and the weights hold two different ones; "
            "set tie_word_embeddings to false there if both are meant, or save the model without lm_head.weight"
        )


def _check_finite(tensors: dict[str, Tensor], shown: str) -> None:
    """Refuse NaN and infinity. Smallest and largest show both, at 10 GB/s on one CPU core (1.4 s for 7B in bfloat16)."""
    names = [n for n, t in tensors.items() if t.numel() and t.dtype in (torch.float32, torch.bfloat16, torch.float16)]
    ends = [torch.stack(tensors[n].detach().aminmax()).float() for n in names]
    fine = torch.stack(ends).isfinite().all(1).tolist() if ends else []
    bad = [n for n, good in zip(names, fine, strict=True) if not good]
    if bad:
        dtype = tensors[bad[0]].dtype
        more = (
            "; float16 ends at 65504: pass dtype=bfloat16"
            if dtype == torch.float16
            else "; the file is damaged or its training diverged"
        )
        raise CheckpointError(f"{len(bad)} tensors of {shown!r} hold NaN or infinity: {_some(bad)}{more}")


# ---------------------------------------------------------------------- processors


def _processor(folder: Path, shown: str):
    """The tokenizer, picture processor and chat template of a folder, each of which must be there."""
    if not any((folder / name).exists() for name in _TOKENIZER):
        raise CheckpointError(f"{shown!r} has no tokenizer ({' or '.join(_TOKENIZER)}); copy the base model's beside the weights")
    if not (folder / _PICTURES[0]).exists() and "image_processor" not in _json(folder / _PICTURES[1], shown):
        raise CheckpointError(
            f"{shown!r} has a tokenizer and no picture processor (preprocessor_config.json, or processor_config.json with image_processor); "
            f"copy preprocessor_config.json from {_BASE}"
        )
    with _saying(f"cannot load the processor of {shown!r}"):
        processor = AutoProcessor.from_pretrained(str(folder))
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"the processor of {shown!r} is a {type(processor).__name__}; copy preprocessor_config.json and tokenizer_config.json of Qwen2.5-VL there"
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    _check_template(processor, shown)
    return processor


def _check_template(processor, shown: str) -> None:
    copy = f"copy chat_template.json or chat_template.jinja from {_BASE}"
    if not processor.chat_template:
        raise CheckpointError(
            f"{shown!r} has a tokenizer and no chat template (chat_template.jinja, chat_template.json, or in tokenizer_config.json); {copy}"
        )
    asked = chat_messages([Turn((Image.new("RGB", (56, 56)),), "question")], [])
    with _saying(f"the chat template of {shown!r} cannot show a picture and a question; {copy}"):
        text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    if text.count(processor.image_token) != 1 or "question" not in text:
        raise CheckpointError(
            f"the chat template of {shown!r} writes {text.count(processor.image_token)} {processor.image_token} for one picture; {copy}"
        )


def _own_processor(folder: Path, shown: str):
    """The processor that an adapter folder brings, or None. A tokenizer alone must be the base's, for it is not used."""
    has = [any((folder / name).exists() for name in names) for names in (_TOKENIZER, _PICTURES)]
    if all(has):
        return _processor(folder, shown)
    if has[0]:
        base, revision = _base(folder, shown)
        theirs = _find_base(base, revision, shown)
        with _saying(f"cannot compare the tokenizers of {shown!r} and its base"):
            mine, other = (AutoTokenizer.from_pretrained(str(f)) for f in (folder, theirs))
        if mine.get_vocab() != other.get_vocab() or mine.chat_template not in (
            None,
            other.chat_template,
            _processor(theirs, base).chat_template,
        ):
            raise CheckpointError(
                f"the adapters in {shown!r} bring a tokenizer or chat template that is not their base's, and no picture processor to use it with; "
                "copy the base's preprocessor_config.json there, or remove the tokenizer's files"
            )
    return None


def _check_match(model, processor, shown: str) -> None:
    """Refuse a processor whose ids or picture sizes are not the model's."""
    config, tokenizer, pictures = model.config, processor.tokenizer, processor.image_processor
    rows, last = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values())
    copy = f"copy the tokenizer's files from {_BASE}"
    if last >= rows:
        raise CheckpointError(f"the tokenizer of {shown!r} has ids up to {last}, and the model {rows} embeddings; {copy}")
    mark = tokenizer.convert_tokens_to_ids(processor.image_token)
    if mark != config.image_token_id:
        raise CheckpointError(
            f"image_token_id in config.json of {shown!r} is {config.image_token_id}, and the tokenizer's {processor.image_token} is {mark}; {copy}"
        )
    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    ends = [i for i in (*stop, tokenizer.eos_token_id) if i is not None]
    if not ends or any(not isinstance(i, int) or not 0 <= i < rows for i in ends):
        raise CheckpointError(
            f"{shown!r} ends a reply with {ends or 'no token at all'} (eos_token_id of generation_config.json and the tokenizer), and the model has "
            f"{rows} embeddings; copy generation_config.json and the tokenizer's files from {_BASE}"
        )
    vision = config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for name, size in sizes.items():
        if getattr(pictures, name, None) != size:
            raise CheckpointError(
                f"{name} of {shown!r} is {getattr(pictures, name, None)} in its picture processor and {size} in the model; "
                f"copy preprocessor_config.json from {_BASE}"
            )


# ---------------------------------------------------------------------- adapters


def _base(folder: Path, shown: str) -> tuple[str, str | None]:
    """The base that adapters name, as a folder or hub name, and its revision. A relative folder counts from here or from theirs."""
    config = _json(folder / "adapter_config.json", shown)
    named, edit = config.get("base_model_name_or_path"), "base_model_name_or_path in their adapter_config.json"
    if not named:
        raise CheckpointError(f"the adapters in {shown!r} name no base; set {edit} to a folder or hub name")
    named = resolve(str(named))
    found = {p.resolve(): str(p) for p in (Path(named), folder / named) if p.is_dir()}
    if len(found) > 1:
        raise CheckpointError(
            f"the base {named!r} of the adapters in {shown!r} is found twice, {_some([*map(str, found)])}; write the whole path in {edit}"
        )
    if not found and named.startswith((".", "/", "~")):
        raise CheckpointError(
            f"the adapters in {shown!r} name the base {named!r}, and no such folder is here; set {edit} to where it is now"
        )
    return next(iter(found.values()), named), config.get("revision")


def _find_base(base: str, revision: str | None, shown: str) -> Path:
    """The folder of whole weights below adapters, which may be on adapters themselves."""
    for _ in range(8):
        folder = find(base, revision)
        _check_texts(folder, base)
        if not (folder / "adapter_config.json").exists():
            return folder
        base, revision = _base(folder, base)
    raise CheckpointError(
        f"the adapters in {shown!r} stand on adapters without end; name a base of whole weights in adapter_config.json"
    )


def merge_adapters(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The model with the LoRA adapters of ``folder`` added into its weights, every one of them.

    Names from before transformers 4.52 are taken for today's. Embeddings that the base ties are no longer tied where the
    adapters tell them apart. Raises CheckpointError for adapters that do not fit.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    shown = str(folder)
    if quantised := _quantised(model.config):
        raise CheckpointError(
            f"the adapters in {shown!r} are for a base that is quantised ({quantised}), into which they cannot be merged exactly; name the base that was not quantised in adapter_config.json"
        )
    with _saying(f"cannot read the adapters in {shown!r}"):
        config, saved = PeftConfig.from_pretrained(shown), load_peft_weights(shown, device="cpu")
    if not isinstance(config, LoraConfig):
        raise CheckpointError(
            f"the adapters in {shown!r} are {config.peft_type.value}; this release merges LoRA: merge them with peft, and pass the merged model"
        )
    _check_finite(saved, shown)
    with _saying(f"the adapters in {shown!r} do not fit their base"):
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
        told = set_peft_model_state_dict(adapted, state)
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
            f"{len(keys)} tensors of the adapters in {shown!r} {what}: {_some(keys)}; pass adapters that were saved whole, for this base"
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


# ---------------------------------------------------------------------- words


@contextmanager
def _saying(what: str):
    """Errors of the libraries become CheckpointErrors; those of memory stay what they are."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # foreign code and data
        raise CheckpointError(f"{what}: {first_line(error)}") from error


def _json(path: Path, shown: str) -> dict:
    """A JSON object, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} of {shown!r} cannot be read as JSON ({first_line(error)}); copy it anew from {_BASE}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path.name} of {shown!r} holds a JSON {type(found).__name__} where an object must be; copy it anew from {_BASE}"
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(shape) -> str:
    return "x".join(map(str, shape))


def first_line(error: Exception) -> str:
    """What an error says, in one line; the line after it too where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
