"""Names, colours and markers of methods and tasks: the same in every table and figure."""

from __future__ import annotations

import zlib

import pandas as pd

METHODS = {
    # family: (name in print, colour, marker); the colours are seaborn's colour-blind palette and greys
    "full": ("full resolution", "#222222", "s"),
    "low": ("half size", "#6f6f6f", "v"),
    "awares": ("AwaRes", "#0173b2", "D"),
    "visionthink": ("VisionThink", "#d55e00", "P"),
    "adaptvision": ("AdaptVision", "#ca9161", "P"),
    "ergo": ("ERGO", "#fbafe4", "p"),
    "zoom_loop": ("zoom loop", "#ece133", "h"),
    "cropvlm": ("CropVLM", "#029e73", "p"),
    "cares": ("CARES", "#cc78bc", "h"),
    "visionzip": ("VisionZip", "#de8f05", "o"),
    "sparsevlm": ("SparseVLM", "#029e73", "^"),
    "holov": ("HoloV", "#d55e00", "<"),
    "fastv": ("FastV", "#cc78bc", ">"),
    "divprune": ("DivPrune", "#ca6161", "X"),
    "scope": ("SCOPE", "#0173b2", "^"),
    "vispruner": ("VisPruner", "#029e73", "<"),
    "pyramiddrop": ("PyramidDrop", "#cc78bc", "v"),
    "hiprune": ("HiPrune", "#d55e00", "o"),
    "dart": ("DART", "#cc78bc", "p"),
    "cdpruner": ("CDPruner", "#ca6161", "D"),
    "visionselector": ("VisionSelector", "#de8f05", "P"),
    "apet": ("ApET", "#029e73", "X"),
    "mmtok": ("MMTok", "#de8f05", "h"),
    "pooling": ("pooling", "#949494", "d"),
    "random_tokens": ("random tokens", "#56b4e9", "*"),
    "random_deep": ("random, in the decoder", "#56b4e9", "v"),
    "random_crop": ("random crop", "#56b4e9", "8"),
    "all_crops": ("all crops", "#56b4e9", "H"),
    "oracle_crop": ("oracle crop", "#0173b2", "*"),
    "blank_crop": ("blank crop", "#0173b2", "X"),
    "swapped_crop": ("swapped crop", "#949494", "X"),
    "swapped_picture": ("swapped picture", "#949494", "P"),
    "no_picture": ("no picture", "#949494", "v"),
}

TASKS = {
    "chartqa": "ChartQA",
    "docvqa_val": "DocVQA",
    "ocrbench": "OCRBench",
    "pope": "POPE",
    "realworldqa": "RealWorldQA",
    "vstar_bench": "V*",
}

NANO = "nano: a 3-million-parameter Qwen2.5-VL of this repository on rendered pictures; it says nothing about a 7B checkpoint"
"""Stands under every table and figure with a nano task in it."""

SPARE_COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#949494", "#56b4e9")
SPARE_MARKERS = ("o", "s", "^", "v", "<", ">", "P", "X", "p", "h")


def family(method: str, identity: dict | None = None) -> str:
    """A run's name and identity -> the word that its colour and marker hang on: the method without its settings.

    A composition is named by both parts (``awares+visionzip``); full resolution with a pruner is that pruner; a method of a file
    (``mine.py:Mine``) is its class.
    """
    identity = identity or {}
    policy, pruner = identity.get("policy"), identity.get("pruner")
    if pruner:
        parts = [pruner] if policy in (None, "full") else [policy, pruner]
    else:
        word = str(policy or identity.get("method") or method)
        parts = [word.removeprefix("awares_") if word.removeprefix("awares_") in METHODS else word]
    return "+".join(str(part).rsplit(":", 1)[-1] for part in parts)


def label(method: str, identity: dict | None = None, run_label: str | None = None) -> str:
    """A run's name in print, with the share of tokens kept where that is a setting.

    run_label: ``label`` of run.json. The one that awares-bench makes (``awares+visionzip retention=0.5``) is put in print form, with the
    other options that it names; one that a user gave stands as it is.
    """
    own = family(method, identity)
    word = " + ".join(METHODS[part][0] if part in METHODS else readable(part) for part in own.split("+"))
    retention = ((identity or {}).get("fields") or {}).get("retention")
    first, *options = (run_label or own).split(" ")
    if run_label and (first.rsplit(":", 1)[-1] != own or not all("=" in o for o in options)):
        return readable(run_label)
    kept = [] if retention is None else [f"{100 * float(retention):g} %"]
    return " ".join([word, *(o for o in options if not o.startswith(UNSAID)), *kept])


UNSAID = ("retention=", "scorer=")
"""Options that a name in print leaves out: the first has a form of its own, the others name files of weights."""


ACRONYMS = ("sft", "grpo", "ddp", "fsdp", "lora", "vlm", "3b", "7b", "8b")
"""Words that stand in capitals in print."""


def readable(name: str) -> str:
    """A name that a machine gave, such as ``awares_sft``, in print: ``AwaRes, SFT``; one of several words stands as it is.

    A method that it begins with has its name in print, underscores are spaces.
    """
    if " " in name or (not any(c in name for c in "_-") and name not in METHODS):
        return name
    bare = name.removeprefix("awares_") if name.removeprefix("awares_") in METHODS else name
    known = max((m for m in METHODS if bare == m or bare.startswith((f"{m}_", f"{m}-"))), key=len, default="")
    rest = [w.upper() if w in ACRONYMS else w for w in bare[len(known) :].replace("_", " ").split()]
    if known and rest and rest[0].startswith("-"):
        rest = [w.upper() if w in ACRONYMS else w for w in bare[len(known) + 1 :].replace("-", " ").replace("_", " ").split()]
    return ", ".join(filter(None, [METHODS[known][0] if known else "", " ".join(rest)])) or name


def colour(family: str) -> str:
    """The colour of a method; of an unknown one by its name, the same in every figure and run."""
    return METHODS[family][1] if family in METHODS else SPARE_COLOURS[zlib.crc32(family.encode()) % len(SPARE_COLOURS)]


def marker(family: str) -> str:
    """The marker of a method; of an unknown one by its name."""
    spare = zlib.crc32(family.encode()) // len(SPARE_COLOURS) % len(SPARE_MARKERS)
    return METHODS[family][2] if family in METHODS else SPARE_MARKERS[spare]


def task(name: str) -> str:
    """A task's name in print: ``nano_doc`` -> ``nano doc``."""
    return TASKS.get(name, name.replace("nano_", "nano ").replace("_", " "))


def short(text: str, most: int = 26) -> str:
    """A name that fits beside a mark: the middle of a long one gives way, since names differ at their ends."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def is_nano(frame: pd.DataFrame) -> bool:
    """Whether any of the documents is of the nano suite."""
    return any(str(t).startswith("nano") for t in frame["task"].unique())


def suite(frame: pd.DataFrame) -> str:
    """What was measured, for a figure's title: ``nano suite, 200 documents a task``."""
    counts = frame.groupby(["method", "task"], observed=True).size()
    kind, tasks = ("nano suite" if is_nano(frame) else "Qwen2.5-VL"), frame["task"].nunique()
    each = f"{counts.max():,}" if counts.nunique() == 1 else f"{counts.min():,} to {counts.max():,}"
    return f"{kind}, {tasks} task{'s' * (tasks > 1)}, {each} documents each"
