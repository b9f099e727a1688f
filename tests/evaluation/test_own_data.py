"""A run folder answers only for its own data and settings: lmms-eval's evaluator twice on the same folder, something changed between."""

import json
import shutil
import sys
import zlib
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate

from awares_bench import cli
from awares_bench.evaluation import demo, lmms_model, lmms_run, sweep
from awares_bench.methods.resolution_gate import gate_path
from awares_bench.tasks.nano import suite as nano_suite

from ..helpers.lmms_runs import records
from ..helpers.tiny import picture

pytestmark = pytest.mark.usefixtures("task_files_read_once")


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """Two suites of the same tasks, most of whose questions are the same."""
    root = tmp_path_factory.mktemp("suites")
    for seed in (1, 2):
        nano_suite.write(root / str(seed), seed, 3)
    return root


index = cache(lmms_run.task_index)
"""Reading all of lmms-eval's task files takes seconds; the tasks themselves are made anew each time."""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path, checkpoint):
    """(suite, options) -> the records that are new, and the answers of lmms-eval's samples by task and document."""
    loaded = {}

    def once(suite, tasks=("nano_doc",), out="run", **options):
        kept = len(records(tmp_path / out))
        made = lmms_model.low(vlms=loaded, pretrained=str(checkpoint), output_dir=tmp_path / out, batch_size=2)
        try:
            told = simple_evaluate(
                model=made, tasks=list(tasks), task_manager=index(str(suite)), limit=3, bootstrap_iters=0,
                verbosity="ERROR", log_samples=True, **options,
            )  # fmt: skip
        finally:
            made.run.close()
        answers = {(t, s["doc_id"]): s["resps"][0][0] for t, rows in told["samples"].items() for s in rows}
        return records(tmp_path / out)[kept:], answers

    return once


def test_the_same_command_answers_nothing_again(run, suites, capsys):
    first, answers = run(suites / "1")
    assert len(first) == 3 and all(r["content"] and r["generation"]["max_new_tokens"] for r in first)
    again, same = run(suites / "1")
    assert not again and same == answers and "3 of 3 answers are taken from" in capsys.readouterr().err


def test_other_pictures_in_the_place_of_the_old_are_answered(run, suites, tmp_path, capsys):
    place = tmp_path / "suite"
    shutil.copytree(suites / "1", place)
    run(place)
    table, other = (pq.read_table(s / "nano_doc.parquet") for s in (place, suites / "2"))
    pictures = [t.column("image").to_pylist() for t in (table, other)]
    mixed = pa.array([pictures[0][0], pictures[1][1], pictures[0][2]], table.schema.field("image").type)  # the questions stay
    pq.write_table(
        table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), mixed), place / "nano_doc.parquet"
    )
    new, answers = run(place)
    assert [r["doc_id"] for r in new] == [1] and new[0]["attempt"] == 1
    assert "2 of 3 answers are taken" in (said := capsys.readouterr().err) and "1 answers in" in said
    assert answers == run(place, out="fresh")[1]
    shutil.copy(suites / "1" / "nano_doc.parquet", place)
    new, answers = run(place)  # and back: what is in force is the last
    assert [r["doc_id"] for r in new] == [1] and answers == run(suites / "1", out="other")[1]


def test_another_suite_is_refused_by_its_place(run, suites):
    run(suites / "1")
    with pytest.raises(
        ValueError, match=r"holds answers to another nano_doc \(dataset_kwargs was .*1/nano_doc\.parquet.*Pass another"
    ):
        run(suites / "2")
    assert len(run(suites / "1", tasks=("nano_doc", "nano_ocr"))[0]) == 3  # more tasks join the folder


def test_other_generation_arguments_are_answered_and_the_same_in_other_words_are_not(run, suites):
    before, long = run(suites / "1")
    new, short = run(suites / "1", gen_kwargs="max_new_tokens=1")
    assert len(new) == 3 and all(r["usage"][0]["output"] <= 1 for r in new) and short != long
    assert not run(suites / "1", gen_kwargs="max_new_tokens=1,num_beams=1,temperature=0,seed=4")[0]
    assert len(run(suites / "1", gen_kwargs="until=a,max_new_tokens=1")[0]) == 3
    new, answers = run(suites / "1")
    assert len(new) == len(before) and answers == long


def test_what_cannot_be_acted_on_is_refused_before_anything_is_answered_and_the_rest_is_said_once(run, suites, tmp_path, capsys):
    with pytest.raises(ValueError, match="task nano_doc: num_beams=3 would change the answers"):
        run(suites / "1", gen_kwargs="num_beams=3")
    with pytest.raises(ValueError, match=r"task nano_doc: sampling is asked for \(temperature=0.5\)"):
        run(suites / "1", gen_kwargs="temperature=0.5,do_sample=none")
    assert not records(tmp_path / "run")
    run(
        suites / "1",
        tasks=("nano_doc", "nano_ocr"),
        gen_kwargs="image_aspect_ratio=pad",
        system_instruction="Be brief.",
        repeats=2,
    )
    said = capsys.readouterr().err
    assert said.count("image_aspect_ratio='pad' is not acted on (nano_doc, nano_ocr)") == 1
    assert said.count("--system_instruction are not shown (nano_doc, nano_ocr)") == 1
    assert said.count("repeats=2: decoding is greedy") == 1
    assert len(records(tmp_path / "run")) == 6


def test_an_edited_method_or_a_file_it_reads_is_another_run(run, suites, tmp_path):
    source = (Path(__file__).parents[1] / "helpers" / "example_method.py").read_text()
    paths = [tmp_path / n / "mine.py" for n in ("a", "b")]
    for path, text in zip(paths, (source, source.replace("the middle third", "the middle")), strict=True):
        path.parent.mkdir()
        path.write_text(text)
    first = getattr(lmms_model, lmms_model.COMPOSED)
    model = first(method=f"{paths[0]}:Strip", output_dir=tmp_path / "run")
    model.run.close()
    identity = model.run.identity
    shutil.copy(paths[1], paths[0])
    again = first(method=f"{paths[0]}:Strip", output_dir=tmp_path / "other").run.identity
    assert {k for k in identity if identity[k] != again[k]} == {"code"}
    with pytest.raises(ValueError, match=r"holds another run.*code was"):
        first(method=f"{paths[0]}:Strip", output_dir=tmp_path / "run")

    gate = tmp_path / "gate.safetensors"
    shutil.copy(gate_path("nano"), gate)
    identity = lmms_model.cares(gate=str(gate), output_dir=tmp_path / "gated").run.identity
    assert identity["files"] == {"gate": lmms_model.content.file(gate)} and set(identity["code"]) == {"cares"}


def test_a_method_s_code_counts_with_what_it_derives_from():
    from awares_bench.awares import AwaRes

    class Mine(AwaRes):
        """In this file."""

    assert lmms_model._code(Mine()).split("+") == [
        lmms_model.content.file(__file__),
        lmms_model.content.file(sys.modules[AwaRes.__module__].__file__),
    ]


def instance(task, doc_id, repeats=1, **more):
    def messages(document):
        return [
            {
                "role": "user",
                "content": [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}],
            }
        ]

    metadata = {"task": task, "doc_id": doc_id, "repeats": repeats, **more}
    return Instance("generate_until", (f"q{doc_id}", messages, {"max_new_tokens": 4}, doc_id, task, "test"), 0, metadata)


def test_doubles_are_answered_once_and_padding_not_at_all(tmp_path, checkpoint):
    model = lmms_model.low(pretrained=str(checkpoint), output_dir=tmp_path / "run", batch_size=2)
    model.task_dict = {"t": {"test": [{"image": picture(56, 56, seed=i), "question": f"q{i}"} for i in range(3)]}}
    asked = [instance("t", i) for i in (2, 0, 2)] + [instance("t", 1, __padding_only__=True), instance("t", 0, 2)]
    given = model.generate_until(asked)
    assert [r["doc_id"] for r in records(tmp_path / "run")] == [2, 0]
    texts = [g.text for g in given]
    assert texts[0] == texts[2] and texts[1] == texts[4] and texts[3] == "" and given[3].token_counts is None
    model.task_dict["t"]["test"][2]["image"] = picture(56, 56, seed=9)
    model.generate_until(asked)
    assert [r["doc_id"] for r in records(tmp_path / "run")] == [2, 0, 2]
    assert model.generate_until([instance("t", 1, __padding_only__=True)])[0].text == ""


def test_a_chat_template_for_text_models_is_refused(run, suites):
    with pytest.raises(ValueError, match="--apply_chat_template renders text prompts"):
        run(suites / "1", apply_chat_template=True)


@pytest.mark.slow
def test_a_demo_on_another_suite_is_refused_and_a_suite_made_anew_is_answered(tmp_path, suites, checkpoint, capsys, monkeypatch):
    place, out = tmp_path / "suite", tmp_path / "demo"
    shutil.copytree(suites / "1", place)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = ["demo", "--methods", "awares_low", "--limit", "1", "--pretrained", str(checkpoint), "--out", str(out)]
    assert cli.main([*asked, "--suite", str(place)]) == 0
    first = records(out / "runs" / "awares_low")
    assert cli.main([*asked, "--suite", str(suites / "2")]) != 0
    assert "holds a demo on the suite" in capsys.readouterr().err and records(out / "runs" / "awares_low") == first
    nano_suite.write(place, 2, 3)
    demo.run(out, ["awares_low"], place, 1, str(checkpoint))
    again = records(out / "runs" / "awares_low")[len(first) :]
    assert len(again) == len(first) and {r["content"] for r in again}.isdisjoint(r["content"] for r in first)
    shown = pd.read_csv(out / "documents.csv")
    assert sorted(shown["content"]) == sorted(zlib.crc32(r["content"].encode()) for r in again)


def test_a_sweep_s_cell_is_not_done_when_its_folder_of_tasks_changed(tmp_path, suites):
    shutil.copytree(suites / "1", tmp_path / "suite")
    (tmp_path / "recipe.yaml").write_text("tasks: [nano_doc]\ninclude_path: suite\nmethods: [low]\n")
    (cell,) = sweep.read(tmp_path / "recipe.yaml").cells
    out = tmp_path / "out"
    for folder, name, text in (("runs", "run.json", '{"status": "complete"}'), ("lmms", "cell.json", json.dumps(cell.spec))):
        (out / folder / cell.name).mkdir(parents=True)
        (out / folder / cell.name / name).write_text(text)
    assert sweep._is_done(out, cell) and sweep._is_done(out, sweep.read(tmp_path / "recipe.yaml").cells[0])
    shutil.copy(suites / "2" / "nano_doc.parquet", tmp_path / "suite")
    assert not sweep._is_done(out, sweep.read(tmp_path / "recipe.yaml").cells[0])
    (tmp_path / "recipe.yaml").write_text("tasks: [nano_doc]\ninclude_path: nowhere\nmethods: [low]\n")
    with pytest.raises(ValueError, match="include_path is nowhere; there is no folder"):
        sweep.read(tmp_path / "recipe.yaml")
