"""A checkpoint as Qwen2.5-VL is released: its file layout, its tokenizer, its chat template and generation settings; small random weights.

The tokenizer is Qwen's own (``qwen_tokenizer``). Weights are rounded to
bfloat16, in which checkpoints are released, so that a runner that loads them so and one that loads them in float32 have the same.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import finalize

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from .qwen_tokenizer import qwen_tokenizer_json

TEXT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of the released processors (``chat_template.json``); the tokenizer has one for text alone."""

QWEN3_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}",
    "",
)
"""What that of Qwen3-VL's Instruct checkpoints renders for pictures and text: no system message of its own."""

IM_END, BLANK_LINE = 151645, 271
"""Ids of ``<|im_end|>`` and of two line breaks."""

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": SHAPE["hidden_size"],
    "fullatt_block_indexes": [1, 3],
}


@cache
def stock(tied: bool = True, penalty: float = 1.05, seed: int = 0) -> Path:
    """The folder of ``write`` in a temporary place, written once a process."""
    holder = TemporaryDirectory(prefix="stock-")
    finalize(stock, holder.cleanup)
    return write(Path(holder.name) / "Qwen2.5-VL", tied, penalty, seed)


def write(folder: Path, tied: bool = True, penalty: float = 1.05, seed: int = 0) -> Path:
    """A checkpoint folder in the layout of Qwen2.5-VL-3B-Instruct (tied) or 7B (untied).

    penalty: of ``generation_config.json``; the releases have 1.05. Random weights hardly ever write one token of 151,936: the scores
    of an end and of a blank line are raised, so that both occur in a few answers of a hundred tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    _write_settings(folder, tied, penalty)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # large enough for attention to matter: the default initialisation hides mistakes
            torch.nn.init.normal_(weight, std=0.02 if "patch_embed" in name else 0.15)
    _raise_scores(model, {IM_END: 13.0, BLANK_LINE: 8.0})
    released = {}
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            released[old] = weight.to(torch.bfloat16).contiguous()
    save_file(released, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@cache
def stock_qwen3(tied: bool = True, penalty: float = 1.05) -> Path:
    """The folder of ``write_qwen3`` in a temporary place, written once a process."""
    holder = TemporaryDirectory(prefix="stock-")
    finalize(stock_qwen3, holder.cleanup)
    return write_qwen3(Path(holder.name) / "Qwen3-VL", tied, penalty)


def write_qwen3(folder: Path, tied: bool = True, penalty: float = 1.05, seed: int = 0) -> Path:
    """A checkpoint folder in the layout of Qwen3-VL-4B-Instruct (tied) or 8B (untied): nested config, template without a system message.

    penalty: of ``generation_config.json``; the releases have none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, QWEN3_TEMPLATE)
    pictures = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    _write(folder / "preprocessor_config.json", pictures)
    video = {
        **pictures,
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    _write(folder / "video_preprocessor_config.json", {k: v for k, v in video.items() if k != "image_processor_type"})
    ends = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
    sampling = {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": penalty}
    _write(folder / "generation_config.json", ends | sampling | {"transformers_version": "4.56.0"})
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 40,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [8, 6, 6], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": 151936,
        **SHAPE,
    }
    vision = {k: v for k, v in VISION.items() if k != "fullatt_block_indexes"} | {
        "deepstack_visual_indexes": [0, 1, 2],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "model_type": "qwen3_vl",
        "num_position_embeddings": 2304,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    whole = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": text,
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": vision,
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }
    _write(folder / "config.json", whole)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02 if "patch_embed" in name else 0.15)
    _raise_scores(model, {IM_END: 13.0, BLANK_LINE: 8.0})
    tensors = {
        k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def _raise_scores(model, more: dict[int, float]) -> None:
    """Give some tokens a bias, which the architecture does not have: the first of the hidden numbers is made the same everywhere."""
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    embeddings[:, 0] = head[:, 0] = 1.0
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    tower = model.model.visual
    last = tower.merger.mlp[2] if hasattr(tower.merger, "mlp") else tower.merger.linear_fc2
    last.weight[0], last.bias[0] = 0.0, 1.0
    for merger in getattr(tower, "deepstack_merger_list", ()):
        merger.linear_fc2.weight[0], merger.linear_fc2.bias[0] = 0.0, 0.0
    for token, value in more.items():
        head[token, 0] += value


def _write_tokenizer(folder: Path, template: str = CHAT_TEMPLATE) -> None:
    made = json.loads(qwen_tokenizer_json(folder).read_text(encoding="utf-8"))
    words, added = made["model"]["vocab"], made["added_tokens"]
    _write(folder / "vocab.json", words)
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in made["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    kept = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token["id"]): {k: token[k] for k in kept} for token in added},
        "additional_special_tokens": [token["content"] for token in added if token["special"]][1:],
        "bos_token": None,
        "chat_template": TEXT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "chat_template.json", {"chat_template": template})


def _write_settings(folder: Path, tied: bool, penalty: float) -> None:
    pictures = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _write(folder / "preprocessor_config.json", pictures)
    ends = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
    sampling = {"do_sample": True, "repetition_penalty": penalty, "temperature": 0.000001, "transformers_version": "4.49.0"}
    _write(folder / "generation_config.json", ends | sampling)
    vision = {"hidden_act": "silu", "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14}
    vision |= {"window_size": 112, "tokens_per_second": 2, "temporal_patch_size": 2}
    marks = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}
    flat = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        **marks,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vocab_size": 151936,
        "vision_config": vision | VISION,
        **SHAPE,
    }
    _write(folder / "config.json", flat)


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
