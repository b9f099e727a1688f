"""Floating-point operations of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V from their shapes: a multiplication and an addition are two. No torch, so that reports can count.

Counted: matrix products of vision tower, merger, decoder and output layer, and attention scores. Not counted: norms, activations.
Configs are parts of a ``config.json``, token counts are numbers or arrays of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

VISION_SHAPES = {
    "qwen2_5_vl": (
        "hidden_size", "intermediate_size", "depth", "patch_size", "window_size", "fullatt_block_indexes", "out_hidden_size",
    ),
    "qwen3_vl": ("hidden_size", "intermediate_size", "depth", "patch_size", "deepstack_visual_indexes", "out_hidden_size"),
    "qwen2_vl": ("embed_dim", "mlp_ratio", "depth", "patch_size", "hidden_size"),
    "glm4v": ("hidden_size", "intermediate_size", "depth", "patch_size", "image_size", "out_hidden_size"),
}  # fmt: skip
"""What the vision part of a config has, by family, which it is told by; where no line fits the model is not counted here."""

TEXT_SHAPES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
"""What its text part must have."""

OPTIONAL_SHAPES = {
    "in_channels": 3,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "head_dim": None,
    "num_experts": None,
    "num_local_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
}
"""What either may have, and the value where it has none: transformers' defaults; None: hidden_size // num_attention_heads, no experts."""


def vision_family(config: Mapping) -> str | None:
    """The family whose shapes a vision part has; None where it is another."""
    return next((name for name, needed in VISION_SHAPES.items() if all(key in config for key in needed)), None)


def vision_flops(tokens: float | np.ndarray, config: Mapping) -> float | np.ndarray:
    """Operations of the vision tower and its mergers on an image of so many merged tokens; ``config``: the vision part.

    Raises ValueError for a tower of another family.
    """
    family = vision_family(config)
    if family is None:
        raise ValueError(f"no known vision tower has {', '.join(sorted(config))}; counted: {', '.join(VISION_SHAPES)}")
    channels, frames, side = (
        config.get(k, OPTIONAL_SHAPES[k]) for k in ("in_channels", "temporal_patch_size", "spatial_merge_size")
    )
    depth, merge = config["depth"], side**2
    patches: float | np.ndarray = tokens * merge
    # 1. shapes: Qwen2-VL calls the tower's width embed_dim; Qwen2.5-VL and GLM have a gate in their MLPs, and only the first has windows
    if family == "qwen2_vl":
        width, inner, out = config["embed_dim"], config["embed_dim"] * config["mlp_ratio"], config["hidden_size"]
    else:
        width, inner, out = config["hidden_size"], config["intermediate_size"], config["out_hidden_size"]
    full_blocks, window, matrices = depth, 0, 2
    if family == "qwen2_5_vl":
        full_blocks, matrices = len(config["fullatt_block_indexes"]), 3
        window = (config["window_size"] // config["patch_size"]) ** 2  # patches that a patch attends to outside the full blocks
    if family == "glm4v":  # its blocks are as wide inside as the decoder is; intermediate_size is the merger's
        inner, matrices = out, 3
    mergers = 1 + len(config.get("deepstack_visual_indexes") or ()) if family == "qwen3_vl" else 1
    # 2. operations of a patch, then of a token
    embed = 2 * channels * frames * config["patch_size"] ** 2 * width
    linear = 2 * (4 * width**2 + matrices * width * inner)
    attention = 4 * width * ((depth - full_blocks) * np.minimum(window, patches) + full_blocks * patches)
    merger = 2 * ((merge * width) ** 2 + merge * width * out)
    if family == "glm4v":  # a convolution, a product, and an MLP with a gate
        merger = 2 * (merge * width * out + out**2 + 3 * out * config["intermediate_size"])
    return patches * (embed + depth * linear + attention) + tokens * mergers * merger


def decoder_flops(
    new: float | np.ndarray, config: Mapping, past: float | np.ndarray = 0, scored: float | np.ndarray = 1
) -> float | np.ndarray:
    """Operations of the decoder on ``new`` tokens after ``past`` cached ones, ``scored`` of which meet the output layer; ``config``: the text part."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    queries, keys = head * heads, head * config["num_key_value_heads"]
    inner, router = config["intermediate_size"], 0
    if experts := config.get("num_experts") or config.get(
        "num_local_experts"
    ):  # of every layer, as released; the shared cost is that of the chosen ones
        inner, router = config["num_experts_per_tok"] * config["moe_intermediate_size"], width * experts
    linear = 2 * (2 * width * queries + 2 * width * keys + 3 * width * inner + router)
    attention = 4 * queries * (new * past + new * new / 2)  # causal: half of the square
    return config["num_hidden_layers"] * (new * linear + attention) + scored * 2 * width * config["vocab_size"]
