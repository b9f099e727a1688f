"""Published sizes of Qwen2.5-VL and Qwen3-VL, and models of those sizes with random weights.

A model of a published size runs anywhere without a download: its seconds are those of the real one, its answers are noise.
Sizes: config.json of Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-{2B,4B,8B}-Instruct.
"""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import (
    AutoProcessor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from awares_bench.models.families import families
from awares_bench.models.packaged import NANO, resolve
from awares_bench.models.scorer import PARTS

_DECODERS = {
    "3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
}
_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
}
_QWEN3_DECODERS = {
    "qwen3-vl-2b": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "qwen3-vl-4b": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "qwen3-vl-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
_QWEN3_TOWERS = {
    "small": {
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "large": {
        "depth": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
NAMES = (NANO, *_DECODERS, *_QWEN3_DECODERS)


def geometry(name: str, layers: int | None = None, decoder: int | None = None) -> PreTrainedConfig:
    """The config of a published size, with the token ids of nano's tokenizer, which stands in for Qwen's.

    layers: build only the first so many layers of the decoder and of the tower; for trying out, never for a figure.
    decoder: of the decoder only so many, where nothing but the tower is run.
    Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"geometry is {name!r}; known: {', '.join(NAMES)}")
    if layers is not None and layers < 1:
        raise ValueError(f"layers is {layers}; it must be at least 1")
    config = Qwen2_5_VLConfig.from_pretrained(resolve(NANO))
    if name in _DECODERS:
        config = _qwen2_5(name, config)
    elif name in _QWEN3_DECODERS:
        config = _qwen3(name, config)
    text, tower = config.text_config, config.vision_config
    if layers is not None or decoder is not None:
        text.num_hidden_layers = min(decoder or layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    if layers is not None:
        tower.depth = min(layers, tower.depth)
        for blocks in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if hasattr(tower, blocks):
                setattr(tower, blocks, [i for i in getattr(tower, blocks) if i < tower.depth])
    return config


def _ids(nano: Qwen2_5_VLConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Ids of nano's tokenizer: those of a text config, and the marks of a picture."""
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {k: getattr(nano.text_config, k) for k in ends}, {k: getattr(nano, k) for k in marks}


def _qwen2_5(name: str, nano: Qwen2_5_VLConfig) -> Qwen2_5_VLConfig:
    ids, marks = _ids(nano)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    tied = name == "3b"
    text = {**_DECODERS[name], **ids, "rope_parameters": rope, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6}
    return Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": tied},
        vision_config=_TOWER | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        **marks,
    )


def _qwen3(name: str, nano: Qwen2_5_VLConfig) -> Qwen3VLConfig:
    ids, marks = _ids(nano)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
    }
    text |= {**_QWEN3_DECODERS[name], **ids}
    tower: dict[str, object] = {
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
    }
    tower |= _QWEN3_TOWERS["large" if name.endswith("8b") else "small"] | {"out_hidden_size": text["hidden_size"]}
    return Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=text["tie_word_embeddings"], **marks)


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: str, seed: int = 0):
    """-> (model, processor): weights uniform and scaled so that activations stay finite, nano's processor with the family's patches."""
    with init_empty_weights(include_buffers=False):
        model = families()[config.model_type].model_class._from_config(config, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)
    for name, empty in list(model.named_parameters()):
        values = torch.ones(empty.shape, dtype=dtype, device=device)
        if values.ndim > 1:
            bound = (3 / values[0].numel()) ** 0.5
            values.uniform_(-bound, bound, generator=generator)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model = model.to(device)
    processor = _processor(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def _processor(config: PreTrainedConfig):
    nano = AutoProcessor.from_pretrained(resolve(NANO))
    if config.model_type != "qwen3_vl":
        return nano
    pictures = Qwen2VLImageProcessor(
        size=dict(zip(("shortest_edge", "longest_edge"), families()[config.model_type].default_limits, strict=True)),
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLProcessor(
        image_processor=pictures,
        tokenizer=nano.tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=nano.chat_template,
    )


@cache
def random_scorer(width: int, seed: int = 0) -> Path:
    """A file with a scorer of random weights for tokens of ``width`` numbers, half as wide inside; it goes when the process ends."""
    folder = Path(mkdtemp(prefix="awares-scorer-"))
    atexit.register(rmtree, folder, True)
    generator, hidden = torch.Generator().manual_seed(seed), max(1, width // 2)
    shapes = {part: (hidden, width) if part.endswith("weight") else (hidden,) for part in PARTS}
    tensors = {part: torch.randn(shape, generator=generator) / width**0.5 for part, shape in shapes.items()}
    save_file(tensors, folder / "scorer.safetensors")
    return folder / "scorer.safetensors"
