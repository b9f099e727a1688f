"""The committed nano weights do what the README says, on fresh documents of a suite of their own."""

import pytest

from awares_bench.baselines.visionthink import SYSTEM
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import Sample
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.registry import method_class
from awares_bench.models.packaged import resolve
from awares_bench.tasks.nano import suite, world
from awares_bench.training.nano.model import nano_tokenizer

DOCUMENTS = 30  # a task: small enough for CI, so the bounds leave room for chance (a standard error of about 0.02)


@pytest.fixture(scope="module")
def outcomes():
    vlm = LocalModel.load(resolve("nano"))
    documents = [world.document(f, s) for f in world.FAMILIES for s in suite.suite_seeds(999, DOCUMENTS)]
    jobs = [
        Job(Sample((d.image,), world.prompt(d.family, d.question, d.options), str(i)), 16, ("\n\n",))
        for i, d in enumerate(documents)
    ]
    runs = {name: dict(Engine(vlm, method_class(name)(), 8).run(jobs)) for name in ("full", "low", "awares")}
    right = {name: [run[i].answer.strip() == d.answer for i, d in enumerate(documents)] for name, run in runs.items()}
    return documents, runs, right


def test_full_reads_what_low_cannot_and_awares_lies_between_them(outcomes):
    documents, runs, right = outcomes
    full, low, awares = (sum(right[name]) / len(documents) for name in ("full", "low", "awares"))
    assert full > 0.95 and full - low > 0.15
    assert low + 0.75 * (full - low) < awares <= full
    assert sum(t.rtr for t in runs["awares"].values()) / len(documents) < 0.5


def test_calls_name_the_region_of_the_evidence(outcomes):
    documents, runs, _ = outcomes
    called = [(d, runs["awares"][i].crops) for i, d in enumerate(documents) if runs["awares"][i].crops]
    covered = [PAPER_GRID.holds(crops, d.evidence, *d.image.size) for d, crops in called]
    small = [crops for _, crops in called if PAPER_GRID.area(crops) <= 0.5]
    assert sum(covered) / len(called) > 0.9  # a region drawn at random with the same areas covers about one in five
    assert len(small) / len(called) > 0.5 and len(set(small)) >= 6


def test_calls_are_well_formed_and_come_where_the_half_size_view_is_not_enough(outcomes):
    documents, runs, right = outcomes
    assert not [e for t in runs["awares"].values() for e in t.events if e.kind == "malformed_call"]
    called = [bool(runs["awares"][i].crops) for i in range(len(documents))]
    wrong = [not r for r in right["low"]]
    caught = sum(c and w for c, w in zip(called, wrong, strict=True))
    assert caught / sum(wrong) > sum(called) / len(called)  # better than calling at random


def test_adapters_of_the_package_are_the_base_with_something_added():
    base, sft = (LocalModel.load(resolve(name)).host.model.state_dict() for name in ("nano-base", "nano-sft"))
    assert base.keys() == sft.keys()
    moved = {name for name in base if not base[name].equal(sft[name])}
    assert moved == {name for name in base if "language_model.layers" in name and "_proj.weight" in name}


def test_their_tokenizer_is_the_one_that_training_makes():
    tokenizer = nano_tokenizer()
    for name in ("nano", "nano-base"):
        assert LocalModel.load(resolve(name)).tokenizer.get_vocab() == tokenizer.get_vocab()
    ids = tokenizer(SYSTEM)["input_ids"]
    assert len(ids) < 12  # sentences that every VisionThink prompt repeats are whole tokens


def test_stock_transformers_loads_them():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = resolve("nano")
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
    assert AutoProcessor.from_pretrained(folder).chat_template


def test_visionthink_reads_the_original_that_it_calls_for():
    documents = [world.document(f, s) for f in world.FAMILIES for s in suite.suite_seeds(999, DOCUMENTS)]
    jobs = [Job(Sample((d.image,), world.prompt(d.family, d.question, d.options), str(i)), 16) for i, d in enumerate(documents)]
    run = dict(Engine(LocalModel.load(resolve("nano-visionthink")), method_class("visionthink")(budget=64), 16).run(jobs))
    right, called = (
        [run[i].answer.strip() == d.answer for i, d in enumerate(documents)],
        [bool(run[i].crops) for i in range(len(jobs))],
    )
    assert not [e for t in run.values() for e in t.events if e.kind != "crops"]
    assert sum(right) / len(right) > 0.9 and 0.25 < sum(called) / len(called) < 0.5
    assert sum(r for r, c in zip(right, called, strict=True) if c) / sum(called) > 0.95
