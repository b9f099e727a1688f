"""Checkpoint folders from disk or the hub: what is in them is checked, or refused in a sentence that says what is wrong and what to do."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2_5_VLConfig, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from awares_bench.errors import CheckpointError
from awares_bench.methods.conversation import Turn, chat_messages

from .base import HostModel, rendered
from .families import families
from .packaged import resolve

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer.json", "vocab.json")
_PICTURES = ("preprocessor_config.json", "processor_config.json")
_READ: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_READ += ("chat_template.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", *_PICTURES)
_SHARDED = ("pytorch_model_fsdp_*", "global_step*", "zero_to_fp32.py", "*.distcp", "mp_rank_*", "*_optim_states.pt")
_HARMLESS = re.compile(r"rotary_(pos_)?emb\.inv_freq$|(^|\.)position_ids$")  # buffers of old releases, computed anew
_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".jinja")
_BASE = "the checkpoint that this one was trained from"


def open_processor(pretrained: str):
    """The processor of a checkpoint, without its weights; that of adapters is their base's unless they bring one. Raises CheckpointError."""
    folder = find(pretrained)
    _check_texts(folder, pretrained)
    if not (folder / "adapter_config.json").exists():
        return load_processor(folder, pretrained)
    base, revision = base_of(folder, pretrained)
    return own_processor(folder, pretrained) or load_processor(_find_base(base, revision, pretrained), base)


def family_of(pretrained: str) -> type[HostModel]:
    """The family of a checkpoint, by its ``config.json`` or that of the base below adapters. Raises CheckpointError."""
    kind = model_type(pretrained)
    if kind not in families():
        raise CheckpointError(
            f"{pretrained!r} is a {kind or 'checkpoint without config.json'}; known families: {', '.join(sorted(families()))}"
        )
    return families()[kind]


def model_type(pretrained: str) -> str | None:
    """``model_type`` of a checkpoint, by its ``config.json`` or that of the base below adapters; None where there is none."""
    folder = find(pretrained)
    if (folder / "adapter_config.json").exists():
        base, revision = base_of(folder, pretrained)
        folder = _find_base(base, revision, pretrained)
    return read_json(folder / "config.json", pretrained).get("model_type")


def is_generic(pretrained: str) -> bool:
    """Whether a checkpoint is of a family that is not known here and that transformers loads as an image-text-to-text model.

    What is wrong with a folder is said where it is loaded.
    """
    try:
        kind = model_type(pretrained)
    except CheckpointError:
        return False
    return kind not in families() and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def find(pretrained: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint; one that is named by hub name is fetched, or found among what was fetched before."""
    folder = Path(pretrained)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{pretrained!r} is a file; pass the folder that holds it")
    if pretrained.startswith((".", "/", "~")):
        raise CheckpointError(f"no checkpoint folder at {pretrained!r}; pass a folder, a hub name, or pretrained=nano")
    with saying(f"no folder {pretrained!r} is here, and no checkpoint of that name could be fetched from the hub"):
        fetch: dict[str, Any] = {"revision": revision, "ignore_patterns": ["*/*"]}  # of the top folder only
        found = Path(snapshot_download(pretrained, allow_patterns=[f"*{s}" for s in _SUFFIXES if s != ".bin"], **fetch))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(pretrained, allow_patterns=["*.bin"], **fetch))
    return found


def check_files(folder: Path, shown: str, generic: bool = False) -> None:
    """Refuse a folder whose files are not what their names say, or that holds no model of a known family and no adapters.

    generic: any family will do that transformers loads as an image-text-to-text model.
    """
    names = _check_texts(folder, shown)
    if "adapter_config.json" in names:
        return
    if "config.json" not in names:
        raise CheckpointError(f"cannot read a model config from {shown!r}: it has no config.json{_hint(folder, shown)}")
    kind = read_json(folder / "config.json", shown).get("model_type")
    if kind not in families() and not (generic and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        known, loads = ", ".join(sorted(families())), kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        other = (
            "engine=generic answers with it, without training it"
            if loads
            else f"engine=generic answers with what transformers loads as an image-text-to-text model, which {__version__} does not do with it"
        )
        raise CheckpointError(
            f"{shown!r} is a {kind} checkpoint; known families: {known}; a family is one file, see docs/models.md; {other}"
        )
    if not names & set(_WEIGHTS):
        raise CheckpointError(f"{shown!r} has a config.json and no weights ({', '.join(_WEIGHTS[:3])}){_hint(folder, shown)}")


def _check_texts(folder: Path, shown: str) -> set[str]:
    """-> the names in a folder. Refuses one that is empty, git-LFS pointers, JSON that is none, adapters cut in two."""
    with saying(f"cannot read {shown!r}"):
        names = {p.name for p in folder.iterdir()}
        small = [p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file() and p.stat().st_size < 1024]
        pointers = sorted(p.name for p in small if p.read_bytes().startswith(b"version https://git-lfs"))
    if not names:
        raise CheckpointError(f"cannot read a model config from {shown!r}: the folder is empty")
    if pointers:
        raise CheckpointError(
            f"{shown!r} holds git-LFS pointers in place of {some_of(pointers)}; run git lfs pull there, or download the files anew"
        )
    for name in sorted(names & set(_READ)):
        read_json(folder / name, shown)
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


def load_config(folder: Path, shown: str) -> Qwen2_5_VLConfig:
    with saying(f"cannot read a model config from {shown!r}"):
        return AutoConfig.from_pretrained(str(folder))


def quantisation(config: Qwen2_5_VLConfig) -> str | None:
    """The method of a quantised checkpoint."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if any(found.get(f) for f in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(found.get("quant_method"), "value", found.get("quant_method")))


def check_weight_files(folder: Path, shown: str) -> None:
    """Refuse shards that are not there or cut short, and two sets of weights. Reads the headers only."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.exists() else []
    if index.exists():
        with saying(f"cannot read {index.name} of {shown!r}"):
            where = read_json(index, shown)["weight_map"]
            named = sorted(set(where.values()))
        if files and named != [single.name]:
            raise CheckpointError(
                f"{shown!r} holds two sets of weights, {single.name} and the {len(named)} files of {index.name}; remove the one that is not meant"
            )
        lost = [name for name in named if not (folder / name).exists()]
        if lost:
            raise CheckpointError(
                f"{shown!r} lacks {len(lost)} of the {len(named)} weight files that {index.name} names: {some_of(lost)}; copy them there"
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
                f"{len(some)} tensors of {shown!r} {what}: {some_of(some)}; save the whole model again, or pass another checkpoint"
            )
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not table.weight:
        raise CheckpointError(
            f"config.json of {shown!r} ties lm_head.weight to embed_tokens.weight, and the weights hold two different ones; "
            "set tie_word_embeddings to false there if both are meant, or save the model without lm_head.weight"
        )


def check_finite(tensors: dict[str, Tensor], shown: str) -> None:
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
        raise CheckpointError(f"{len(bad)} tensors of {shown!r} hold NaN or infinity: {some_of(bad)}{more}")


# ---------------------------------------------------------------------- processors


def load_processor(folder: Path, shown: str, known: bool = True):
    """The tokenizer, picture processor and chat template of a folder, each of which must be there.

    known: of a known family, whose template is told by its ``image_token``.
    """
    if not any((folder / name).exists() for name in _TOKENIZER):
        raise CheckpointError(f"{shown!r} has no tokenizer ({' or '.join(_TOKENIZER)}); copy the base model's beside the weights")
    if not (folder / _PICTURES[0]).exists() and "image_processor" not in read_json(folder / _PICTURES[1], shown):
        raise CheckpointError(
            f"{shown!r} has a tokenizer and no picture processor (preprocessor_config.json, or processor_config.json with image_processor); "
            f"copy preprocessor_config.json from {_BASE}"
        )
    with saying(f"cannot load the processor of {shown!r}"):
        processor = AutoProcessor.from_pretrained(str(folder))
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"the processor of {shown!r} is a {type(processor).__name__}; copy preprocessor_config.json and tokenizer_config.json of the base model there"
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    _check_template(processor, shown, known)
    return processor


def _check_template(processor, shown: str, known: bool) -> None:
    copy = f"copy chat_template.json or chat_template.jinja from {_BASE}"
    if not processor.chat_template:
        raise CheckpointError(
            f"{shown!r} has a tokenizer and no chat template (chat_template.jinja, chat_template.json, or in tokenizer_config.json); {copy}"
        )
    if not known:  # ``GenericHost`` renders a whole conversation
        return
    asked = chat_messages([Turn((Image.new("RGB", (56, 56)),), "question")], [])
    with saying(f"the chat template of {shown!r} cannot show a picture and a question; {copy}"):
        text = rendered(processor, asked)
    if text.count(processor.image_token) != 1 or "question" not in text:
        raise CheckpointError(
            f"the chat template of {shown!r} writes {text.count(processor.image_token)} {processor.image_token} for one picture; {copy}"
        )
    if text.rstrip().endswith("<think>"):
        raise CheckpointError(
            f"{shown!r} is a thinking checkpoint: its chat template opens every reply with <think>. Replies with thoughts are not supported "
            "(a call would not stand at the start, and answers would be scored with the thought); pass the Instruct checkpoint of this model"
        )


def own_processor(folder: Path, shown: str):
    """The processor that an adapter folder brings, or None. A tokenizer alone must be the base's, for it is not used."""
    has = [any((folder / name).exists() for name in names) for names in (_TOKENIZER, _PICTURES)]
    if all(has):
        return load_processor(folder, shown)
    if has[0]:
        base, revision = base_of(folder, shown)
        theirs = _find_base(base, revision, shown)
        with saying(f"cannot compare the tokenizers of {shown!r} and its base"):
            mine, other = (AutoTokenizer.from_pretrained(str(f)) for f in (folder, theirs))
        if mine.get_vocab() != other.get_vocab() or mine.chat_template not in (
            None,
            other.chat_template,
            load_processor(theirs, base).chat_template,
        ):
            raise CheckpointError(
                f"the adapters in {shown!r} bring a tokenizer or chat template that is not their base's, and no picture processor to use it with; "
                "copy the base's preprocessor_config.json there, or remove the tokenizer's files"
            )
    return None


def check_match(model, processor, shown: str) -> None:
    """Refuse a processor whose ids or picture sizes are not the model's."""
    config, tokenizer, pictures = model.config, processor.tokenizer, processor.image_processor
    rows, last = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values())
    copy = f"copy the tokenizer's files from {_BASE}"
    if last >= rows:
        raise CheckpointError(f"the tokenizer of {shown!r} has ids up to {last}, and the model {rows} embeddings; {copy}")
    family = families().get(config.model_type)
    mark = tokenizer.convert_tokens_to_ids(processor.image_token) if family else None
    if family and mark != config.image_token_id:
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
    for name, (theirs, ours) in family.processor_sizes(config, pictures).items() if family else ():
        if theirs != ours:
            raise CheckpointError(
                f"{name} of {shown!r} is {theirs} in its picture processor and {ours} in the model; "
                f"copy preprocessor_config.json from {_BASE}"
            )


# ---------------------------------------------------------------------- adapters


def base_of(folder: Path, shown: str) -> tuple[str, str | None]:
    """The base that adapters name, as a folder or hub name, and its revision. A relative folder counts from here or from theirs."""
    config = read_json(folder / "adapter_config.json", shown)
    named, edit = config.get("base_model_name_or_path"), "base_model_name_or_path in their adapter_config.json"
    if not named:
        raise CheckpointError(f"the adapters in {shown!r} name no base; set {edit} to a folder or hub name")
    named = resolve(str(named))
    found = {p.resolve(): str(p) for p in (Path(named), folder / named) if p.is_dir()}
    if len(found) > 1:
        raise CheckpointError(
            f"the base {named!r} of the adapters in {shown!r} is found twice, {some_of([*map(str, found)])}; write the whole path in {edit}"
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
        base, revision = base_of(folder, base)
    raise CheckpointError(
        f"the adapters in {shown!r} stand on adapters without end; name a base of whole weights in adapter_config.json"
    )


# ---------------------------------------------------------------------- words


@contextmanager
def saying(what: str):
    """Errors of the libraries become CheckpointErrors; those of memory stay what they are."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # foreign code and data
        raise CheckpointError(f"{what}: {first_line(error)}") from error


def read_json(path: Path, shown: str) -> dict:
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


def some_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(shape) -> str:
    return "x".join(map(str, shape))


def first_line(error: Exception) -> str:
    """What an error says, in one line; the line after it too where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
