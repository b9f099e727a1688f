"""A document's digest: every picture and text counts, encoded pictures are not decoded, what cannot be decoded has one too."""

import io

import pytest
from datasets import Dataset, Features, Image, Sequence, Value

from awares_bench.evaluation import content

from ..helpers.tiny import picture

NAMED = Features({"question": Value("string"), "image": Image()})


def encoded(seed=0, kind="PNG"):
    data = io.BytesIO()
    picture(40, 30, seed=seed).save(data, kind)
    return data.getvalue()


def table(*rows, features=NAMED):
    return Dataset.from_list([dict(zip(features, row, strict=True)) for row in rows], features=features)


def never(document):
    raise AssertionError("decoded")


def shown(document):
    return [
        {"role": "user", "content": [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]}
    ]


def test_pictures_and_texts_count_and_encoded_pictures_are_not_decoded():
    broken = encoded()[: len(encoded()) // 2]
    rows = [
        ("a", encoded(0)),
        ("a", encoded(0)),
        ("a", encoded(1)),
        ("b", encoded(0)),
        ("a", broken),
        ("a", b"no picture"),
        ("a", None),
    ]
    found = [
        content.digest(table(*((q, {"bytes": d, "path": None} if d else None) for q, d in rows)), i, never) for i in range(6)
    ]
    assert found[0] == found[1] and len(set(found)) == 5 and all(len(f) == 16 for f in found)


def test_a_row_is_found_by_its_number_after_rows_were_chosen():
    rows = table(*((str(i), {"bytes": encoded(i), "path": None}) for i in range(4)))
    assert content.digest(rows.select([3, 1]), 1, never) == content.digest(rows, 1, never)


def test_pictures_in_lists_and_by_file_count(tmp_path):
    several = Features({"images": Sequence(Image())})
    lists = [[{"bytes": encoded(i), "path": None} for i in order] for order in ((0, 1), (1, 0), (0,))]
    assert len({content.digest(table(([*x],), features=several), 0, never) for x in lists}) == 3
    found = []
    for name, seed in (("a.png", 0), ("moved.png", 0), ("a.png", 1)):
        (tmp_path / name).write_bytes(encoded(seed))
        found.append(content.digest(table(("q", str(tmp_path / name))), 0, never))
    assert found[0] == found[1] != found[2]


def test_pictures_that_a_task_opens_itself_are_digested_as_it_shows_them(tmp_path):
    rows = table(("q", "name"), features=Features({"question": Value("string"), "file": Value("string")}))
    pixels = [content.digest(rows, 0, lambda d, s=s: shown({**d, "image": picture(40, 30, seed=s)})) for s in (0, 0, 1)]
    assert pixels[0] == pixels[1] != pixels[2]
    (tmp_path / "x.png").write_bytes(encoded(0))
    by_name = [content.digest(rows, 0, lambda d: shown({**d, "image": str(tmp_path / "x.png")}))]
    (tmp_path / "x.png").write_bytes(encoded(1))
    assert by_name[0] != content.digest(rows, 0, lambda d: shown({**d, "image": str(tmp_path / "x.png")}))
    texts = [
        content.digest(
            rows, 0, lambda d, t=t: [{"role": "user", "content": [{"type": "text", "text": t}, *shown(d | {"image": 0})]}]
        )
        for t in ("before", "after")
    ]
    assert texts[0] != texts[1]


def test_palettes_count_and_documents_that_are_no_table_have_a_digest():
    coloured = [picture(40, 30).convert("P") for _ in range(2)]
    coloured[1].putpalette([255 - v for v in coloured[0].getpalette()])
    assert coloured[0].tobytes() == coloured[1].tobytes()
    found = [content.digest([{"image": image, "question": "q"}], 0, never) for image in coloured]
    assert found[0] != found[1]


def test_a_task_that_fails_on_a_document_leaves_it_a_digest():
    rows = table(("q",), features=Features({"question": Value("string")}))

    def fails(document):
        raise KeyError(f"no image in {object()}")

    assert content.digest(rows, 0, fails) == content.digest(rows, 0, fails)  # the address in the message does not count


class Config:
    dataset_path, dataset_name, dataset_kwargs = "parquet", None, {"data_files": {"test": "a.parquet"}}
    doc_to_messages = doc_to_visual = process_docs = None
    doc_to_text = "question"
    description, num_fewshot = "", 0


class Task:
    VERSION = 1.0
    lmms_eval_specific_kwargs = None

    def __init__(self, **more):
        self.config = Config()
        for name, value in more.items():
            setattr(self.config, name, value)
        self.eval_docs_no_media = [{"question": "q"}]

    def doc_to_text(self, document):
        return document["question"]

    def messages(self, document):
        return []


def test_a_task_is_told_by_version_data_split_and_how_it_asks():
    facts = content.task_facts(Task().messages, "test")
    assert facts == content.task_facts(Task().messages, "test")
    assert (facts["version"], facts["dataset_path"], facts["split"]) == (1.0, "parquet", "test")
    assert facts["dataset_kwargs"] == {"data_files": {"test": "a.parquet"}} and facts["lmms_eval"]
    for more in ({"doc_to_text": "other"}, {"description": "d"}, {"doc_to_visual": never}, {"num_fewshot": 2}):
        assert content.task_facts(Task(**more).messages, "test")["prompt"] != facts["prompt"], more
    assert content.task_facts(never, "test")["prompt"] is None


def test_a_function_s_file_counts(tmp_path):
    import importlib.util

    def load(text):
        (tmp_path / "utils.py").write_text(text)
        spec = importlib.util.spec_from_file_location("utils", tmp_path / "utils.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return content.task_facts(Task(doc_to_messages=module.ask).messages, "test")["prompt"]

    assert load("def ask(doc):\n    return 'short'\n") != load("def ask(doc):\n    return 'at length'\n")


@pytest.mark.parametrize(("prompt", "lost"), [("q", False), ("Be brief. q", True), ("Q: x A: y\n\nq", True)])
def test_what_lmms_eval_does_not_show_chat_models_is_said(prompt, lost):
    said = content.unshown(Task(doc_to_visual=never).messages, prompt, 0)
    assert bool(said) == lost and (not lost or "--system_instruction are not shown" in said)
    assert content.unshown(Task(doc_to_visual=never, doc_to_messages=never).messages, prompt, 0) is None
    assert content.unshown(never, prompt, 0) is None
