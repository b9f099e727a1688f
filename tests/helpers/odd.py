"""A task whose documents are odd, each in its own way, for lmms-eval: rows, the task file and its functions."""

from __future__ import annotations

import json
from pathlib import Path

from .tiny import picture

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {data}
task: odd
test_split: train
output_type: generate_until
doc_to_messages: !function odd_functions.messages
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
process_results: !function odd_functions.results
metric_list:
  - metric: here
    aggregation: mean
    higher_is_better: true
"""

FUNCTIONS = """
import io
import json

import numpy as np
from PIL import Image

HALF = chr(0xD800)


def messages(doc):
    kind, place = doc["kind"], doc["place"]
    image = Image.open(place)
    question = doc["question"]
    if kind == "half":
        question += HALF
    if kind == "long":
        question = "value " * 50000
    if kind == "empty":
        question = ""
    data = open(place, "rb").read()
    url = {
        "path": place,
        "bytes": data,
        "stored": {"bytes": data, "path": None},
        "array": np.asarray(image),
        "missing": place + ".gone",
        "address": "https://example.com/a.png",
        "cut": data[: len(data) // 2],
        "nothing": None,
        "numbers": 17,
    }.get(kind, image)
    media = "video" if kind == "stored" else "image"
    if kind == "raises":
        raise KeyError("evidence of " + HALF)
    return [{"role": "user", "content": [{"type": media, "url": url}, {"type": "text", "text": question}]}]


def results(doc, answers):
    return {"here": {"score": float(int(doc["answer"]) % 2), "answered": len(answers)}["score"]}
"""

ANSWERED = ("plain", "path", "bytes", "stored", "array", "empty", "hole", "end")
FAILED = {
    "half": "lone surrogate U+D800",
    "long": "max_position_embeddings",
    "mark": "which stands for an image",
    "video": "which stands for an image",
    "missing": "no image file at",
    "address": "nothing is downloaded",
    "cut": "cannot be decoded",
    "nothing": "allowed: a PIL image",
    "numbers": "allowed: a PIL image",
    "raises": "KeyError",
}
KINDS = [kind for pair in zip(ANSWERED, FAILED, strict=False) for kind in pair] + list(FAILED)[len(ANSWERED) :]
"""Odd documents between others."""

QUESTIONS = {
    "mark": "What is <|image_pad|>?",
    "video": "What is <|video_pad|>?",
    "hole": "What is \ufdd0reply\ufdd0 here?",
    "end": "What is <|im_end|> here?",
}


def write(folder: Path) -> None:
    """``folder/odd.yaml`` with its functions, its rows and their pictures."""
    rows = []
    for i, kind in enumerate(KINDS):
        place = folder / f"{i}.png"
        picture(84 + 28 * (i % 3), 112, seed=i).save(place)
        rows.append({"kind": kind, "place": str(place), "question": QUESTIONS.get(kind, f"What is value {i}?"), "answer": str(i)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "odd.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    (folder / "odd_functions.py").write_text(FUNCTIONS)
