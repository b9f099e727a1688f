"""Estimated floating-point operations of a document, from its token counts and the model's shapes.

Every token passes the decoder once (the second turn continues the cache). What is counted of it: ``awares_bench.models.flops``; not
auxiliary models. The images of a turn count as one in the tower's full-attention blocks, an upper bound where a turn shows several;
tokens pruned inside the decoder count by their mean over layers.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pandas as pd
from huggingface_hub import try_to_load_from_cache

from awares_bench.models.flops import OPTIONAL_SHAPES, TEXT_SHAPES, VISION_SHAPES, decoder_flops, vision_family, vision_flops

BUNDLED = ("nano", "nano-base")


def shapes(about: dict) -> dict[str, dict] | None:
    """The parts of a run's model config, cut to what is counted; None where there is no config, or one of another family."""
    config = _config(about)
    if config is None or "vision_config" not in config:
        return None
    parts = {"vision_config": config["vision_config"], "text_config": config.get("text_config") or config}
    family = vision_family(parts["vision_config"])
    if family is None or any(key not in parts["text_config"] for key in TEXT_SHAPES):
        return None
    needed = {"vision_config": VISION_SHAPES[family], "text_config": TEXT_SHAPES}
    return {name: {k: v for k, v in part.items() if k in (*needed[name], *OPTIONAL_SHAPES)} for name, part in parts.items()}


def _config(about: dict) -> dict | None:
    """The model's ``config.json``: from run.json, the package's weights, a local checkpoint or the hub's cache; None elsewhere."""
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
    return json.loads(path.read_text())


def of_documents(frame: pd.DataFrame, config: dict[str, dict]) -> pd.Series:
    """Documents and the ``shapes`` of their model -> FLOPs of each; NaN where tokens are unknown."""
    tokens = {
        k: pd.to_numeric(frame[k]).to_numpy(float) for k in ("encoded", "prefill", "text", "output", "turns", "later_encoded")
    }
    vision, text = config["vision_config"], config["text_config"]
    first, later = tokens["encoded"] - tokens["later_encoded"], tokens["later_encoded"]
    tower = vision_flops(first, vision) + vision_flops(later, vision)
    length = tokens["prefill"] + tokens["text"] + tokens["output"]
    return pd.Series(tower + decoder_flops(length, text, scored=tokens["output"] + tokens["turns"]), frame.index)
