"""Curation: labels and crops as defined, boxes checked, stages that resume, files that the trainers take."""

import json
from types import SimpleNamespace

import pyarrow.parquet
import pytest

from awares_bench.awares import AwaRes
from awares_bench.inference.local_model import LocalModel, SampledReply
from awares_bench.methods.conversation import Sample
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.registry import method_class
from awares_bench.models.packaged import resolve
from awares_bench.training import examples, recipe
from awares_bench.training.curation import crop_oracles, judges, pipeline
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rendering import render
from awares_bench.training.rollouts import banned_tokens

from ..helpers.tiny import picture, tiny_vlm


def test_boxes_map_to_crops_as_the_three_rules_say():
    def maps(boxes):
        return tuple(crop_oracles.crops_for(boxes, 400, 400, m) for m in ("coverage", "iou_argmax", "iou_literal"))

    small = [(20, 20, 60, 50)]
    assert maps(small) == (("top-left",), ("top-left",), ())  # Eq. 3 is empty below an eighth of the image
    assert maps([(10, 10, 190, 190)]) == (("top-left",), ("top-left",), ("top-left",))
    assert maps([(0, 0, 400, 400)]) == (("all",), ("all",), ("all",))
    assert maps([(20, 20, 60, 60), (340, 340, 380, 380)])[0] == ("top-left", "bottom-right")
    assert maps([(10, 10, 390, 190)]) == (("top",), ("top",), ("top",))
    assert crop_oracles.crops_for([], 400, 400, "coverage") == ()


@pytest.mark.parametrize("box", [(50, 0, 10, 10), (0, 0, 500, 10), (-1, 0, 5, 5), (3, 3, 3, 9), (1, 2, 3)])
def test_boxes_that_are_none_are_named(box):
    with pytest.raises(crop_oracles.BoxError, match="row 7"):
        crop_oracles.check_boxes([box], 400, 300, "row 7")


@pytest.mark.parametrize(
    "low, full, ties, label",
    [("42", "42", "split", "LR"), ("1", "42", "split", "HR"), ("42", "1", "split", "LR"), ("1", "7", "split", None), ("1", "7", "paper", "LR")],
)  # fmt: skip
def test_labels_follow_the_rule_and_ties_are_split_by_correctness(low, full, ties, label):
    made = recipe.check(
        pipeline.Curate, {"start": "s", "data": "d", "out": "o", "judge": "exact", "ties": ties, "second_judge": "anls"}
    )
    table = [{"question": "q", "answers": ["42"]}]
    (row,) = pipeline.label_rows(made, table, [{"index": 0, "low": low, "full": full, "error": None}], judges.exact)
    assert row["label"] == row["second"] == label
    (failed,) = pipeline.label_rows(made, table, [{"index": 0, "low": None, "full": None, "error": "x"}], judges.exact)
    assert failed["label"] is None and failed["verdict"] is None


@pytest.mark.parametrize("full, sure, label", [("42", 0.6, "HR"), ("42", 0.95, "LR"), ("1", 0.6, "LR")])
def test_a_right_answer_that_the_model_was_not_sure_of_is_no_sign_that_half_size_is_enough(full, sure, label):
    made = recipe.check(pipeline.Curate, {"start": "s", "data": "d", "out": "o", "judge": "exact", "sure": 0.9})
    row = {"index": 0, "low": "42", "full": full, "sure": sure, "error": None}
    (row,) = pipeline.label_rows(made, [{"question": "q", "answers": ["42"]}], [row], judges.exact)
    assert row["label"] == label and row["right_low"]


def test_how_sure_a_model_is_of_its_half_size_answer_is_the_probability_of_the_reply():
    said = {"start": "nano-base", "data": "nano:6", "out": "o", "judge": "exact", "max_new_tokens": 8, "batch": 4}
    vlm, table = LocalModel.load(resolve("nano-base")), pipeline.nano_rows(6)
    rows = [{"index": i} for i in range(6)]
    plain = pipeline.answer_rows(recipe.check(pipeline.Curate, said), table, rows, vlm)
    found = pipeline.answer_rows(recipe.check(pipeline.Curate, said | {"sure": 0.5}), table, rows, vlm)
    assert [(r["low"], r["full"], r["error"]) for r in found] == [(r["low"], r["full"], None) for r in plain]
    assert all(r["sure"] is None for r in plain)
    scorer = Scorer(vlm.host, banned_tokens(vlm.host))
    for row in found:
        one = render(vlm, method_class("low")(), examples.sample(table[row["index"]], 0, 2000), [row["low"]])
        packed = pack([[one]], vlm.host)
        scores, _ = scorer(packed, vlm.encode(packed.images))
        assert row["sure"] == pytest.approx(scores.sum().exp().item(), abs=1e-4)


def test_a_chat_judge_is_asked_in_both_orders_and_must_agree():
    def judge(*replies):
        said = iter(replies)
        return judges.Chat(SimpleNamespace(say=lambda prompt: next(said)))

    assert judge("2", "1").compare("q", ("a",), "x", "y") == 2
    assert judge("1.", " 2").compare("q", ("a",), "x", "y") == 1
    assert judge("0", "0").compare("q", ("a",), "x", "y") == 0
    assert judge("2", "2").compare("q", ("a",), "x", "y") is None  # it likes the second place
    assert judge("nonsense", "7").compare("q", ("a",), "x", "y") is None
    with pytest.raises(judges.JudgeError, match="said 'well'"):
        judge("well")("q", ("a",), "x")


def test_a_grounding_model_is_read_and_nonsense_is_none():
    image = picture(400, 200)

    def said(text):
        return crop_oracles.ground(SimpleNamespace(say=lambda *a, **k: text), image, "q", "a")

    assert said('ok {"question": [[0, 0, 500, 500]], "answer": [[100, 100, 200, 300]]}') == [(0, 0, 200, 100), (40, 20, 80, 60)]
    assert said("no idea") is None and said("{'question': [[9, 9, 1, 1]]}") is None and said("{'question': []}") is None


def test_search_takes_the_cheapest_right_crops_and_the_surest_among_equals(monkeypatch):
    tried = crop_oracles.candidates()
    areas = [PAPER_GRID.area(n) for n in tried]
    assert areas == sorted(areas) and tried[-1] == ("all",) and len(tried) == 9 + 10 + 1

    def answering(right):
        made = [SampledReply("42" if n in right else "no", logprobs=(right.get(n, -1.0),)) for n in tried]
        monkeypatch.setattr(crop_oracles, "answers_with", lambda *a: made)
        return crop_oracles.search(None, None, Sample((), "q"), ("42",), judges.exact, 4)

    assert answering({("top",): -0.1, ("center",): -3.0, ("top-left",): -2.0}) == ("top-left",)
    assert answering({("all",): -1.0}) == ("all",) and answering({}) == ()


def test_answers_after_forced_calls_are_the_same_one_by_one():
    vlm, sample = tiny_vlm(), Sample((picture(224, 224),), "q?", "k")
    tried = [("top-left",), ("right",), ("top-left", "bottom-right"), ("all",)]
    together = crop_oracles.answers_with(vlm, AwaRes(), sample, tried, 4)
    for names, reply in zip(tried, together, strict=True):
        (alone,) = crop_oracles.answers_with(vlm, AwaRes(), sample, [names], 4)
        assert alone.tokens == reply.tokens and alone.logprobs == pytest.approx(reply.logprobs, abs=1e-3)


def test_a_curation_resumes_and_its_files_are_what_the_trainers_take(tmp_path, monkeypatch):
    said = {
        "start": "nano-base",
        "data": "nano:24",
        "out": str(tmp_path / "run"),
        "judge": "exact",
        "oracle": "boxes",
        "chunk": 8,
    }
    made = recipe.check(pipeline.Curate, said)
    calls = []

    def answers(recipe, table, some, vlm):
        calls.append([r["index"] for r in some])
        if len(calls) == 3:
            raise KeyboardInterrupt
        out = []
        for r in some:
            truth = table[r["index"]]["answers"][0]
            out.append(dict(r, low=truth if r["index"] % 3 else "?", full=truth if r["index"] % 4 else "?", error=None))
        return out

    monkeypatch.setattr(pipeline, "answer_rows", answers)
    monkeypatch.setattr(pipeline, "open_vlm", lambda r: None)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(made)
    assert len(list((tmp_path / "run" / "answers").glob("*.parquet"))) == 2
    summary = pipeline.run(made, say=lambda s: None)
    assert [c[0] for c in calls] == [0, 8, 16, 16]  # what was answered is not answered again
    hr = [i for i in range(24) if i % 3 == 0 and i % 4]
    assert summary["labels"] == {"LR": 16, "HR": len(hr), "dropped": 2} and sum(summary["crops"].values()) == len(hr)
    table = examples.rows(str(tmp_path / "run" / "trajectories.parquet"), ("image", "question", "replies"))
    assert len(table) == 22
    for row in table:
        assert len(row["replies"]) == 1 + (row["label"] == "HR") and row["replies"][-1] == row["answers"][0]
        if row["label"] == "HR":
            assert PAPER_GRID.parse(row["replies"][0]).names == tuple(row["crops"])
        assert examples.pictures(row, 2000)[0].size == (224, 224)
    labels = examples.rows(str(tmp_path / "run" / "labels.parquet"), ("image", "question", "answers", "label"))
    assert len(labels) == 22 and "replies" not in labels.column_names
    chunk = pyarrow.parquet.read_table(tmp_path / "run" / "crops" / "0000000.parquet")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary and chunk.num_rows == min(8, len(hr))


def test_rows_that_cannot_be_curated_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    from datasets import Dataset, Image

    monkeypatch.setattr(pipeline, "open_vlm", lambda r: pytest.fail("the model was loaded"))

    def go(**more):
        said = {"start": "s", "data": str(tmp_path / "rows.parquet"), "out": str(tmp_path / "out"), "oracle": "boxes"}
        pipeline.run(recipe.check(pipeline.Curate, said | more))

    def write(boxes):
        rows = [{"image": picture(112, 112), "query": "q", "answer": "1", "boxes": b} for b in boxes]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "rows.parquet")

    write([[[0, 0, 50, 50]], [[0, 0, 500, 50]]])
    with pytest.raises(crop_oracles.BoxError, match=r"row 1: box \[0, 0, 500, 50\]"):
        go(columns={"question": "query"})
    with pytest.raises(examples.DataError, match="no column question"):
        go()
    with pytest.raises(recipe.RecipeError, match="nano:COUNT"):
        go(data="nano:many")
    with pytest.raises(recipe.RecipeError, match="needs oracle_model"):
        go(oracle="endpoint", columns={"question": "query"})
