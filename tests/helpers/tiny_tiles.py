"""Tiny random models of the families that cut pictures into tiles, around nano's tokenizer. Real classes, processors and templates."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers as T
from tokenizers import AddedToken

from awares_bench.models.base import HostModel
from awares_bench.models.families import host_of

from .tiny import tiny_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
VISION = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}

INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS3_TEMPLATE = (  # as Idefics3 and the first SmolVLMs have it: contents are lists of parts, and a text alone is not shown
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOLVLM_TEMPLATE = (  # as transformers has it
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}"
    "{% else %}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tokenizer(*marks: str):
    """Nano's, with more special tokens."""
    made = copy.deepcopy(tiny_tokenizer())
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    return made


def drawn(model, ends: list[int]):
    """Weights large enough for attention to matter; the default initialisation hides mistakes."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02 if "patch_embed" in name else 0.15)
    model.generation_config.eos_token_id = ends
    return model.float().eval()


def internvl_processor(tokens, side: int = 112, length: int = 16):
    """side: pixels of a tile; length: its tokens. The released InternVL3: 448 and 256."""
    ip = T.GotOcr2ImageProcessor(size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=12)
    video = T.InternVLVideoProcessor()
    return T.InternVLProcessor(ip, tokens, video, image_seq_length=length, chat_template=INTERNVL_TEMPLATE)


INTERNVL_MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@cache
def internvl(text: str = "qwen3") -> HostModel:
    """text: the decoder's family, ``qwen2`` or ``qwen3``; the vision tower of ``qwen2`` has query and key norms."""
    t = tokenizer(*INTERNVL_MARKS.values())
    t._set_model_specific_special_tokens(INTERNVL_MARKS)
    config = T.InternVLConfig(
        text_config={**TEXT, "model_type": text, "vocab_size": len(t), "tie_word_embeddings": True},
        image_token_id=t.context_image_token_id,
        image_seq_length=16,
        vision_config={**VISION, "image_size": [112, 112], "patch_size": [14, 14], "use_qk_norm": text == "qwen2"},
    )
    model = drawn(T.InternVLForConditionalGeneration(config), [t.eos_token_id, t.convert_tokens_to_ids("<|endoftext|>")])
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.1)
    return host_of(model, internvl_processor(t))


SMOLVLM_MARKS = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def smolvlm_processor(kind: str, tokens, edge: int = 448, side: int = 112, length: int = 16):
    """edge: longest edge of a picture; side: pixels of a tile; length: its tokens. The released SmolVLM2-2.2B: 1536, 384, 81."""
    sizes = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": side}, "do_image_splitting": True}
    if kind == "idefics3":
        ip = T.Idefics3ImageProcessor(**sizes)
        return T.Idefics3Processor(ip, tokens, image_seq_len=length, chat_template=IDEFICS3_TEMPLATE)
    ip, video = T.SmolVLMImageProcessor(**sizes), T.SmolVLMVideoProcessor()
    return T.SmolVLMProcessor(ip, tokens, video, image_seq_len=length, chat_template=SMOLVLM_TEMPLATE)


@cache
def smolvlm(kind: str = "smolvlm") -> HostModel:
    """kind: ``smolvlm``, whose processor needs num2words, or ``idefics3``; the same weights."""
    t = tokenizer(*SMOLVLM_MARKS)
    t.eos_token = "<end_of_utterance>"
    classes = {
        "smolvlm": (T.SmolVLMConfig, T.SmolVLMForConditionalGeneration),
        "idefics3": (T.Idefics3Config, T.Idefics3ForConditionalGeneration),
    }
    of_config, of_model = classes[kind]
    config = of_config(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(t)},
        vision_config={**VISION, "image_size": 112, "patch_size": 14},
        scale_factor=2,
        image_token_id=t.convert_tokens_to_ids("<image>"),
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    return host_of(drawn(of_model(config), [t.eos_token_id]), smolvlm_processor(kind, t))
