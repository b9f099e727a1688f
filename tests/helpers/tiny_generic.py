"""Tiny random models of families that have no host of their own here, on the real classes of transformers and the nano tokenizer.

Weights are drawn wide: the default initialisation hides mistakes.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers as hf

from awares_bench.models.generic import GenericHost

from ..models.tiny_families import QWEN3_TEMPLATE
from .tiny import tiny_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
TOWER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
TOWER |= {"image_size": 112, "patch_size": 14}

LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Reads parts only, as LLaVA-OneVision's own does: a message that is a string is left out in silence."""

GEMMA_TEMPLATE = (
    "<bos>{% if messages[0]['role'] == 'system' %}{% set first = (messages[0]['content'] if messages[0]['content'] is string else "
    "messages[0]['content'][0]['text']) + '\n\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ first if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<start_of_image>{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""As Gemma 3's: the system message stands in the first message of the user."""


def tokenizer(*special: str, **named: str):
    """The nano tokenizer with further special tokens; ``named`` ones are also attributes, as processors read them."""
    made = copy.deepcopy(tiny_tokenizer())
    made.add_tokens([*special, *named.values()], special_tokens=True)
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def drawn(config, made, ends: str = "<|im_end|>"):
    """A model of random weights for a config and a tokenizer."""
    torch.manual_seed(0)
    model = getattr(hf, config.architectures[0])(config).float().eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02 if "patch_embed" in name else 0.15)
    model.generation_config.eos_token_id = made.convert_tokens_to_ids(ends)
    model.generation_config.pad_token_id = made.pad_token_id
    return model


def sized(made) -> dict:
    return TEXT | {"vocab_size": -(-len(made) // 64) * 64}


@cache
def gemma3() -> GenericHost:
    """Layers with a sliding window of 64 tokens among others, pictures that see themselves whole, a mark that is not the image token."""
    made = tokenizer(
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    token = made.convert_tokens_to_ids
    layers = ["sliding_attention", "full_attention"] * 2
    config = hf.Gemma3Config(
        text_config=sized(made) | {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 64, "layer_types": layers},
        vision_config=TOWER,
        mm_tokens_per_image=16,
        image_token_index=token("<image_soft_token>"),
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        architectures=["Gemma3ForConditionalGeneration"],
    )
    pictures = hf.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    processor = hf.Gemma3Processor(image_processor=pictures, tokenizer=made, image_seq_length=16, chat_template=GEMMA_TEMPLATE)
    made.eos_token = "<end_of_turn>"
    return GenericHost(drawn(config, made, "<end_of_turn>"), processor)


@cache
def llava_onevision() -> GenericHost:
    """Tiles by aspect, and tokens that stand for no one patch."""
    made = tokenizer("<image>", "<video>")
    points = [[112 * i, 112 * j] for i in range(1, 4) for j in range(1, 4)]
    config = hf.LlavaOnevisionConfig(
        text_config=sized(made) | {"model_type": "qwen2", "tie_word_embeddings": True},
        vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=made.convert_tokens_to_ids("<image>"),
        video_token_id=made.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=points,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size={"height": 112, "width": 112}, image_grid_pinpoints=points),
        tokenizer=made,
        video_processor=hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    return GenericHost(drawn(config, made), processor)


@cache
def qwen3_5() -> GenericHost:
    """Three recurrent layers in four."""
    made = tiny_tokenizer()
    token = made.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    recurrent = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    tower = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64, "patch_size": 16}
    config = hf.Qwen3_5Config(
        text_config=sized(made)
        | recurrent
        | {
            "head_dim": 32,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "rope_parameters": rope | {"partial_rotary_factor": 0.25},
            "tie_word_embeddings": True,
        },
        vision_config=tower | {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        architectures=["Qwen3_5ForConditionalGeneration"],
    )
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16384 * 32 * 32}
    pictures = hf.Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = hf.Qwen3VLProcessor(
        image_processor=pictures, tokenizer=made, video_processor=hf.Qwen3VLVideoProcessor(), chat_template=QWEN3_TEMPLATE
    )
    return GenericHost(drawn(config, made), processor)


TINY = {f.__name__: f for f in (gemma3, llava_onevision, qwen3_5)}
"""By ``config.model_type``."""
