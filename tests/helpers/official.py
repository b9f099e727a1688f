"""Six tiny datasets in the schemas of the official ones, laid out so that ``datasets`` finds them from the working folder."""

from __future__ import annotations

import io
from pathlib import Path

from datasets import Dataset, Features, Image, Sequence, Value

from .tiny import picture

TASKS = "chartqa,docvqa_val,ocrbench,pope,realworldqa,vstar_bench"
TEXT = Value("string")
SIZES = ((320, 240), (57, 400), (200, 60), (640, 480))
COUNT = len(SIZES)


def write(root: Path, broken: bool = False, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Folders ``root/lmms-lab-encoder/ChartQA`` and so on: a relative path that exists wins over the hub.

    broken: document 1 is a truncated image, document 2 no image at all. sizes: of the pictures, one a document.
    """
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    if broken:
        whole = io.BytesIO()
        images[1].save(whole, "PNG")
        images[1] = {"bytes": whole.getvalue()[: whole.tell() // 2], "path": None}
        images[2] = {"bytes": b"this is not a picture", "path": None}
    specs = {
        "lmms-lab-encoder/ChartQA": (
            None,
            "test",
            {"type": TEXT, "question": TEXT, "answer": TEXT},
            lambda i: {"type": ("human_test", "augmented_test")[i % 2], "question": f"What is value {i}?", "answer": str(i)},
        ),
        "lmms-lab-encoder/DocVQA": (
            "DocVQA",
            "validation",
            {"questionId": TEXT, "question": TEXT, "docId": Value("int64"), "answers": Sequence(TEXT)},
            lambda i: {"questionId": str(i), "question": f"What is the value {i}?", "docId": i, "answers": [str(i)]},
        ),
        "echo840/OCRBench": (
            None,
            "test",
            {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": Sequence(TEXT)},
            lambda i: {
                "dataset": "IIIT5K",
                "question": "what is written in the image?",
                "question_type": "Regular Text Recognition",
                "answer": [f"value {i}"],
            },
        ),
        "lmms-lab-encoder/POPE": (
            None,
            "test",
            {"id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "category": TEXT},
            lambda i: {
                "id": str(i),
                "question_id": str(i),
                "question": "Is there a dog in the image?",
                "answer": ("yes", "no")[i % 2],
                "image_source": f"x{i}",
                "category": "adversarial",
            },
        ),
        "lmms-lab-encoder/RealWorldQA": (
            None,
            "test",
            {"question": TEXT, "answer": TEXT, "image_path": TEXT},
            lambda i: {"question": f"Which way? Picture {i}.", "answer": "ABC"[i % 3], "image_path": f"{i}.png"},
        ),
        "lmms-lab-encoder/vstar-bench": (
            None,
            "test",
            {"text": TEXT, "category": TEXT, "label": TEXT, "question_id": TEXT},
            lambda i: {
                "text": "What is the color of the flag? (A) red (B) blue (C) green (D) white",
                "category": "direct_attributes",
                "label": "ABCD"[i % 4],
                "question_id": str(i),
            },
        ),
    }
    for name, (config, split, features, row) in specs.items():
        data = Dataset.from_list(
            [row(i) | {"image": images[i]} for i in range(len(images))], features=Features(features | {"image": Image()})
        )
        folder = config or "data"
        (root / name / folder).mkdir(parents=True)
        data.to_parquet(root / name / folder / f"{split}-00000-of-00001.parquet")
        block = f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n  - split: {split}\n    path: {folder}/{split}-*\n---\n"
        (root / name / "README.md").write_text(block)
