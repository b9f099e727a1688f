"""A tiny random model of every family, on the real classes of transformers and the nano tokenizer.

Weights are drawn wide: the default initialisation hides mistakes.
"""

import copy
from functools import cache

import torch
import transformers
from transformers import (
    Glm4vConfig,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from awares_bench.models.base import HostModel
from awares_bench.models.families import host_of
from awares_bench.training.nano import model as nano

from ..helpers.tiny import tiny_tokenizer

QWEN3_TEMPLATE = (  # renders as that of Qwen3-VL-Instruct: no system message by default
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOWER3 = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}


def finish(config, processor, seed: int = 0, stop: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")) -> HostModel:
    """Random weights for a config -> its host. stop: tokens that end a reply."""
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config).float().eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02 if "patch_embed" in name else 0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(stop))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = processor.image_processor.size  # less than the released limits: pictures of tests are small
    return host_of(model, processor, size["shortest_edge"], size["longest_edge"])


def text_config(**changes) -> dict:
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": -(-len(tiny_tokenizer()) // 64) * 64}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return {**ids, **sizes, **changes}


def _marks() -> dict[str, int]:
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokens |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tiny_tokenizer().convert_tokens_to_ids(token) for name, token in tokens.items()}


@cache
def qwen2_vl() -> HostModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    tower = {"depth": 4, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text_config(num_hidden_layers=4, rope_parameters=rope, tie_word_embeddings=True),
        vision_config=tower,
        tie_word_embeddings=True,
        architectures=["Qwen2VLForConditionalGeneration"],
        **_marks(),
    )
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28})
    made = Qwen2VLProcessor(
        image_processor=pictures,
        tokenizer=tiny_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=nano.CHAT_TEMPLATE,
    )
    return finish(config, made)


def _qwen3_processor() -> Qwen3VLProcessor:
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16384 * 32 * 32}
    pictures = Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Qwen3VLProcessor(
        image_processor=pictures,
        tokenizer=tiny_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=QWEN3_TEMPLATE,
    )


_ROPE3 = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 6, 6], "mrope_interleaved": True}


@cache
def qwen3_vl() -> HostModel:
    """Heads of 40, which is not width / heads: released sizes have that too."""
    config = Qwen3VLConfig(
        text_config=text_config(head_dim=40, rope_parameters=_ROPE3, tie_word_embeddings=True),
        vision_config=_TOWER3,
        tie_word_embeddings=True,
        architectures=["Qwen3VLForConditionalGeneration"],
        **_marks(),
    )
    return finish(config, _qwen3_processor())


@cache
def qwen3_vl_moe() -> HostModel:
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3VLMoeConfig(
        text_config=text_config(head_dim=40, rope_parameters=_ROPE3, tie_word_embeddings=False, **experts),
        vision_config=_TOWER3,
        tie_word_embeddings=False,
        architectures=["Qwen3VLMoeForConditionalGeneration"],
        **_marks(),
    )
    return finish(config, _qwen3_processor())


GLM_TEMPLATE = (  # renders as that of GLM-4.1V-9B, without its line for thoughts
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@cache
def glm4v() -> HostModel:
    """A turn of GLM's ends where the next one begins: its end token is ``<|user|>``."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    roles = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    marks = ["<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|video|>", "<|end_of_video|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": roles + marks})
    ids = dict(zip(("image_start", "image", "image_end", "video_start", "video", "video_end"), marks, strict=True))
    config = Glm4vConfig(
        text_config=text_config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
        ),
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "num_heads": 2,
            "image_size": 56,
            "out_hidden_size": 64,
            "intermediate_size": 96,
        },
        architectures=["Glm4vForConditionalGeneration"],
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in ids.items()},
    )
    made = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(),
        chat_template=GLM_TEMPLATE,
    )
    return finish(config, made, stop=("<|user|>", "<|endoftext|>"))
