"""Nano: Qwen2.5-VL's own classes, processor and chat template at three million parameters, with a tokenizer of its own.

The tokenizer is Qwen2's byte-level BPE with Qwen's special tokens; its merges are learned from the nano suite's questions
and the crop prompts. Sentences that every prompt repeats (system prompts, answer instructions) are single tokens of the added
vocabulary, so that a CPU spends its time on the picture. Any other wording is encoded by BPE.
"""

from __future__ import annotations

import copy
import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from awares_bench.methods import registry
from awares_bench.methods.conversation import Sample
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.models.limits import RELEASED
from awares_bench.tasks.nano import world

from ..rendering import play

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

SUFFIXES = (
    "\nAnswer the question with a single word.",
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
    " Please answer directly with a single word or number.",
)
"""What the official tasks append to a question (lmms-eval 0.7.3), and the last sentence of RealWorldQA's own questions."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Renders as the template of Qwen2.5-VL-7B-Instruct does."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Qwen2.5-VL. The defaults are nano's before its last stage, which adds a layer."""

    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 448
    vision_width: int = 128
    vision_depth: int = 4
    vision_heads: int = 2
    vision_mlp: int = 384


def tokenizer(corpus: list[str], merges: int = 400) -> Qwen2Tokenizer:
    """Qwen2's tokenizer class with ``merges`` merges learned from ``corpus``; padding on the left."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    empty = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    learned = empty.train_new_from_iterator([corpus], vocab_size=len(alphabet) + merges, show_progress=False)
    learned.add_special_tokens({"extra_special_tokens": SPECIAL})
    crop_prompts = (PAPER_GRID.prompt, PAPER_GRID.prompt_as("adapter"))
    phrases = ["You are a helpful assistant.", *SUFFIXES, *(p for prompt in crop_prompts for p in _phrases(prompt))]
    phrases += visionthink_phrases()
    learned.add_tokens([AddedToken(p, normalized=False, special=False) for p in dict.fromkeys(phrases)])
    learned.padding_side = "left"
    return learned


PHRASE_ENDS = ("them. ", "analysis, ", "areas are ", "image are ", "'all'}", "brackets ", "version, ", "), ")
"""Where the crop prompts are cut into phrases: after sentences, after clauses, and after the map of the regions."""


def _phrases(prompt: str) -> list[str]:
    """A crop prompt, cut into phrases for the added vocabulary."""
    return [p for p in re.split("|".join(f"(?<={re.escape(end)})" for end in PHRASE_ENDS), prompt) if p]


def visionthink_phrases() -> list[str]:
    """What VisionThink's policy says around a question and a call, sentence by sentence, and the marks of a reply."""
    call = ["<tool_call>", '\n{"name": "resize_image", "arguments": {"action": "resize"}}\n', "</tool_call>"]
    return [*said_by("visionthink", ["".join(call), ""]), *call, "<think>", "</think>", "<answer>", "</answer>"]


def said_by(method: str, replies: list[str], **options: Any) -> list[str]:
    """What a policy says around a question when it gets these replies, sentence by sentence, for the added vocabulary."""
    look = registry.build(method, options).policy.turns(Sample((Image.new("RGB", (56, 56)),), ""))
    shown = [turn for turn, *_ in play(look, replies, 1.0)]
    said = [text for turn in shown for text in (turn.system or "", *turn.image_prefixes, turn.text)]
    return [s for text in said for s in re.split(r"(?<=\. )|(?<=\.)(?=\n)|(?<=:)(?=\n)", text) if len(s) > 20]


def question_corpus(questions: list[str]) -> list[str]:
    """Texts from which merges are learned: questions, prompts, instructions and the words of a tool call."""
    return [
        *questions,
        PAPER_GRID.prompt,
        PAPER_GRID.prompt_as("adapter"),
        *SUFFIXES,
        "system\nuser\nassistant\n",
        "yes",
        "no",
    ] + [PAPER_GRID.format(pair) for pair in itertools.combinations(PAPER_GRID.names, 2)]


def processor(tok: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """The processor of Qwen2.5-VL around ``tok``. Limits: 4 to 16,384 visual tokens, as the released checkpoints'."""
    size = dict(zip(("shortest_edge", "longest_edge"), RELEASED, strict=True))
    images = Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2)
    return Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=tok, video_processor=Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )


def build(tok: Qwen2Tokenizer, geometry: Geometry = Geometry()) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL for this tokenizer."""
    g, token = geometry, tok.convert_tokens_to_ids
    head = g.width // g.heads
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tok) // 64) * 64,
            hidden_size=g.width,
            intermediate_size=g.mlp,
            num_hidden_layers=g.layers,
            num_attention_heads=g.heads,
            num_key_value_heads=g.kv_heads,
            max_position_embeddings=32768,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
            tie_word_embeddings=True,
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=g.vision_depth,
            hidden_size=g.vision_width,
            intermediate_size=g.vision_mlp,
            num_heads=g.vision_heads,
            out_hidden_size=g.width,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112,
            fullatt_block_indexes=[g.vision_depth // 2 - 1, g.vision_depth - 1],
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def save(model: Qwen2_5_VLForConditionalGeneration, proc: Qwen2_5_VLProcessor, out: Path) -> None:
    """Write a checkpoint folder that stock transformers loads; weights in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    proc.save_pretrained(out)


def nano_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of the nano checkpoints, rebuilt from training questions. Every call returns the same one."""
    w, rng, questions = world, random.Random("tokenizer"), []
    for i in range(1800):
        _, panels = w.family_scene(rng, w.FAMILIES[i % 6], size=(112, 112), count=(1, 1))
        question, _, options, _ = w.ask(rng, panels, panels[0], varied=True)
        questions.append(question + "".join(f"\n{letter}. {o}" for letter, o in zip("ABCD", options, strict=False)))
    return tokenizer(question_corpus(questions))
