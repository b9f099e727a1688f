"""Floating-point operations of Qwen2.5-VL from its shapes: a multiplication and an addition are two. No torch, so that reports can count.

Counted: matrix products of vision tower, merger, decoder and output layer, and attention scores. Not counted: norms, activations.
Configs are parts of a ``config.json``, token counts are numbers or arrays of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

VISION_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "patch_size",
    "window_size",
    "fullatt_block_indexes",
    "out_hidden_size",
)
"""What the vision part of a config must have; without one of them the model is of another family, and not counted here."""

TEXT_SHAPES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
"""What its text part must have."""

OPTIONAL_SHAPES = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2, "head_dim": None}
"""What either may have, and the value where it has none: transformers' defaults; None: hidden_size // num_attention_heads."""


def vision_flops(tokens: float | np.ndarray, config: Mapping) -> float | np.ndarray:
    """Operations of the vision tower and its merger on an image of so many merged tokens; ``config``: the vision part."""
    channels, frames, side = (
        config.get(k, OPTIONAL_SHAPES[k]) for k in ("in_channels", "temporal_patch_size", "spatial_merge_size")
    )
    width, depth, merge = config["hidden_size"], config["depth"], side**2
    patches, full_blocks = tokens * merge, len(config["fullatt_block_indexes"])
    embed = 2 * channels * frames * config["patch_size"] ** 2 * width
    linear = 2 * (4 * width**2 + 3 * width * config["intermediate_size"])
    window = (config["window_size"] // config["patch_size"]) ** 2  # patches that a patch attends to outside the full blocks
    attention = 4 * width * ((depth - full_blocks) * np.minimum(window, patches) + full_blocks * patches)
    merger = 2 * ((merge * width) ** 2 + merge * width * config["out_hidden_size"])
    return patches * (embed + depth * linear + attention) + tokens * merger


def decoder_flops(
    new: float | np.ndarray, config: Mapping, past: float | np.ndarray = 0, scored: float | np.ndarray = 1
) -> float | np.ndarray:
    """Operations of the decoder on ``new`` tokens after ``past`` cached ones, ``scored`` of which meet the output layer; ``config``: the text part."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    queries, keys = head * heads, head * config["num_key_value_heads"]
    linear = 2 * (2 * width * queries + 2 * width * keys + 3 * width * config["intermediate_size"])
    attention = 4 * queries * (new * past + new * new / 2)  # causal: half of the square
    return config["num_hidden_layers"] * (new * linear + attention) + scored * 2 * width * config["vocab_size"]
