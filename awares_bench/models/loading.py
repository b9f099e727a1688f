"""Checkpoints to models: loaded whole, on the device and in the precision asked for, or refused in a sentence."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from awares_bench.errors import CheckpointError

from .adapters import merge_adapters
from .checkpoint import (
    base_of,
    check_files,
    check_finite,
    check_match,
    check_told,
    check_weight_files,
    find,
    load_config,
    load_processor,
    own_processor,
    quantisation,
    saying,
)
from .families import families, host_of
from .generic import GenericHost

DTYPES = ("float32", "bfloat16", "float16")
"""What ``dtype`` may name beside ``auto``."""


def load_host(
    pretrained: str,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    limits: str | None = None,
    generic: bool = False,
) -> Any:
    """A checkpoint as the ``HostModel`` of its family, or of any family as a ``GenericHost``, with limits of a picture; see ``load``."""
    model, processor = load(pretrained, dtype, device, attn_implementation, generic)
    return (GenericHost if generic else host_of)(model, processor, min_pixels, max_pixels, limits)


def load(
    pretrained: str, dtype: str = "auto", device: str = "auto", attn_implementation: str = "sdpa", generic: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A checkpoint folder or hub name, or one of LoRA adapters, merged into the base that they name -> model, processor.

    generic: of any family that transformers loads as an image-text-to-text model; else of a known one.

    dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. Every tensor of the model comes from the files, every tensor of the
    files is used, and all are finite. Raises CheckpointError, or ValueError for a dtype or device that cannot be.
    """
    where = _device(device)
    return _load(pretrained, getattr(torch, dtype_on(where.type, dtype)), where, attn_implementation, generic)


def dtype_on(device_type: str, dtype: str = "auto") -> str:
    """The name of the dtype that weights take on a device such as ``cuda``. Raises ValueError for one that cannot be."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    return "bfloat16" if device_type == "cuda" else "float32"


def _load(
    pretrained: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    generic: bool,
    revision: str | None = None,
    above: tuple = (),
):
    """-> model on ``device``, processor. above: the adapter folders whose base this is."""
    folder = find(pretrained, revision)
    check_files(folder, pretrained, generic)
    if (folder / "adapter_config.json").exists():
        if folder.resolve() in above:
            raise CheckpointError(f"the adapters in {pretrained!r} are their own base; name another in adapter_config.json")
        base, revision = base_of(folder, pretrained)
        processor = own_processor(folder, pretrained)
        try:
            model, theirs = _load(base, dtype, device, attention, generic, revision, (*above, folder.resolve()))
        except CheckpointError as error:
            raise CheckpointError(f"the base of the adapters in {pretrained!r}: {error}") from error
        if (kind := model.config.model_type) not in families():
            raise CheckpointError(
                f"the adapters in {pretrained!r} are of a {kind}, and are merged here into {', '.join(sorted(families()))}; merge them with peft, "
                "and pass the merged model"
            )
        model = merge_adapters(model, folder)
        if processor is not None:
            check_match(model, processor, pretrained)
        return model, processor or theirs
    config = load_config(folder, pretrained)
    family = families().get(config.model_type)
    processor = load_processor(folder, pretrained, family is not None)
    check_weight_files(folder, pretrained)
    quantised = quantisation(config)
    if quantised and quantised not in {method.value for method in QuantizationMethod}:
        raise CheckpointError(
            f"{pretrained!r} is quantised by {quantised!r}, which transformers {transformers.__version__} does not know; "
            "pass the checkpoint that was not quantised"
        )
    kind = f", which is quantised ({quantised})" if quantised else ""
    with saying(f"cannot load {pretrained!r}{kind}"):
        model, told = (family.model_class if family else AutoModelForImageTextToText).from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all are named; none is ignored
            **({"device_map": {"": device}} if quantised else {}),
        )
    if quantised and not quantisation(model.config):
        raise CheckpointError(
            f"{pretrained!r} is quantised ({quantised}), and this device can only run it unpacked to bfloat16, which answers otherwise; "
            "use a GPU that has this format, or pass the checkpoint that was not quantised"
        )
    check_told(model, told, pretrained)
    check_match(model, processor, pretrained)
    if not quantised:
        model = model.to(device)
    model.name_or_path = model.config.name_or_path = pretrained
    check_finite(dict(model.named_parameters()), pretrained)
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
