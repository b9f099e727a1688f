"""Estimated floating-point operations of a document, from its token counts and the model's shapes.

Every token passes the decoder once (the second turn continues the cache). Counted: matrix products of vision tower, merger,
decoder and output layer, and attention scores. Not counted: norms, activations, auxiliary models. The images of a turn count as one
in the tower's full-attention blocks, an upper bound where a turn shows several; tokens pruned inside the decoder count by their mean over layers.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import try_to_load_from_cache

BUNDLED = ("nano", "nano-base")


def config_of(about: dict) -> dict | None:
    """The model's ``config.json`` of a run: from run.json, the package's weights, a local checkpoint or the hub's cache; None elsewhere."""
    if about.get("model_config"):
        return about["model_config"]
    name = (about.get("identity") or {}).get("pretrained")
    if not name:
        return None
    folder = files("awares_bench") / "weights" / name if name in BUNDLED else Path(str(name))
    path = folder / "config.json"
    if not path.is_file():
        cached = try_to_load_from_cache(str(name), "config.json") if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) else None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    config = json.loads(path.read_text())
    return config if "vision_config" in config else None


def shapes(about: dict) -> dict | None:
    """``config_of``, cut to what is counted here."""
    config = config_of(about)
    if config is None:
        return None
    parts = {"vision_config": config["vision_config"], "text_config": config.get("text_config") or config}
    return {name: {k: v for k, v in part.items() if k in SHAPES} for name, part in parts.items()}


SHAPES = {
    *(
        "hidden_size",
        "intermediate_size",
        "depth",
        "in_channels",
        "temporal_patch_size",
        "patch_size",
        "spatial_merge_size",
        "window_size",
    ),
    *(
        "fullatt_block_indexes",
        "out_hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "vocab_size",
    ),
}


def of_documents(frame: pd.DataFrame, config: dict) -> pd.Series:
    """Documents and a Qwen2.5-VL config -> FLOPs of each (a multiplication and an addition are two); NaN where tokens are unknown."""
    tokens = {k: pd.to_numeric(frame[k]).to_numpy(float) for k in ("encoded", "prefill", "text", "output", "turns")}
    later = pd.to_numeric(frame["later_encoded"]).to_numpy(float)
    tower = vision(tokens["encoded"] - later, config["vision_config"]) + vision(later, config["vision_config"])
    length = tokens["prefill"] + tokens["text"] + tokens["output"]
    written = tokens["output"] + tokens["turns"]
    return pd.Series(tower + decoder(length, written, config.get("text_config") or config), frame.index)


def vision(merged: np.ndarray, config: dict) -> np.ndarray:
    """Merged tokens of an image -> FLOPs of the vision tower and its merger."""
    width, inner, depth = config["hidden_size"], config["intermediate_size"], config["depth"]
    merge, patch = config.get("spatial_merge_size", 2) ** 2, config["patch_size"]
    patches = merged * merge
    embed = 2 * config["in_channels"] * config["temporal_patch_size"] * patch**2 * width
    linear = 2 * (4 * width**2 + 3 * width * inner)
    window = (config["window_size"] // patch) ** 2
    whole = len(config["fullatt_block_indexes"])
    attention = 4 * width * ((depth - whole) * np.minimum(window, patches) + whole * patches)
    merger = 2 * ((merge * width) ** 2 + merge * width * config["out_hidden_size"])
    return patches * (embed + depth * linear + attention) + merged * merger


def decoder(length: np.ndarray, written: np.ndarray, config: dict) -> np.ndarray:
    """Tokens that pass the decoder, and those read out at its end -> FLOPs."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    keys = width // heads * config["num_key_value_heads"]
    linear = 2 * (2 * width**2 + 2 * width * keys + 3 * width * config["intermediate_size"])
    attention = 4 * width * length / 2  # causal: half of the square
    return config["num_hidden_layers"] * length * (linear + attention) + written * 2 * width * config["vocab_size"]
