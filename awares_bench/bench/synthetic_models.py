"""Published sizes of Qwen2.5-VL, and models of those sizes with random weights.

A model of a published size runs anywhere without a download: its seconds are those of the real one, its answers are noise.
Sizes: config.json of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct.
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
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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
NAMES = (NANO, *_DECODERS)


def geometry(name: str, layers: int | None = None, decoder: int | None = None) -> Qwen2_5_VLConfig:
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
    if name != NANO:
        ids = {k: getattr(config.text_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        tied = name == "3b"
        text = {**_DECODERS[name], **ids, "rope_parameters": rope, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6}
        marks = {
            k: getattr(config, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        }
        tower = _TOWER | {"out_hidden_size": text["hidden_size"]}
        config = Qwen2_5_VLConfig(
            text_config={**text, "tie_word_embeddings": tied}, vision_config=tower, tie_word_embeddings=tied, **marks
        )
    text, tower = config.text_config, config.vision_config
    if layers is not None or decoder is not None:
        text.num_hidden_layers = min(decoder or layers, text.num_hidden_layers)
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    if layers is not None:
        tower.depth = min(layers, tower.depth)
        tower.fullatt_block_indexes = [i for i in tower.fullatt_block_indexes if i < tower.depth]
    return config


def random_model(config: Qwen2_5_VLConfig, dtype: torch.dtype, device: str, seed: int = 0):
    """-> (model, processor): weights uniform and scaled so that activations stay finite, nano's processor."""
    with init_empty_weights(include_buffers=False):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
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
    processor = AutoProcessor.from_pretrained(resolve(NANO))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


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
