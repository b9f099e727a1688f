"""The nano world and suite: deterministic, disjoint seeds, evidence where it is said to be, official schemas."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.tasks.nano import suite, world

FOLDER = Path(suite.__file__).parent


@pytest.mark.parametrize("family", world.FAMILIES)
def test_a_document_is_a_pure_function_of_its_seed(family):
    a, b, c = world.document(family, 7), world.document(family, 7), world.document(family, 8)
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image)) and (a.question, a.answer) == (b.question, b.answer)
    assert not np.array_equal(np.asarray(a.image), np.asarray(c.image))


def test_train_validation_and_suite_seeds_are_disjoint():
    ranges = sorted(world.SEEDS.values(), key=lambda r: r.start)
    assert len(ranges) == 3 and all(a.stop <= b.start for a, b in pairwise(ranges))
    from awares_bench.training.nano import stages as language

    for stage in language.STAGES:
        for step, i in ((0, 0), (99_999, 255)):
            assert language.train_seed(stage, step, i) in world.SEEDS["train"]
    assert language.train_seed("base", 99_999, 255) < language.train_seed("light", 0, 0)
    for number in (0, 1, 1000):
        seeds = suite.suite_seeds(number, 1000)
        assert seeds[0] in world.SEEDS["suite"] and seeds[-1] in world.SEEDS["suite"]
    assert not set(suite.suite_seeds(0, 1000)) & set(suite.suite_seeds(1, 1000))
    with pytest.raises(ValueError, match="documents is 0"):
        suite.suite_seeds(0, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        suite.suite_seeds(-1, 10)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_the_shipped_suite_is_suite_zero_in_the_official_schema(family):
    frame = pd.read_parquet(FOLDER / f"nano_{family}.parquet")
    columns = {
        "chart": {"type", "question", "answer"},
        "doc": {"questionId", "question", "docId", "answers"},
        "ocr": {"dataset", "question", "question_type", "answer"},
        "pope": {"question_id", "question", "answer", "category"},
        "real": {"question", "answer", "image_path"},
        "vstar": {"text", "category", "label", "question_id"},
    }[family]
    assert columns | {"image", "evidence", "low_is_enough", "seed"} <= set(frame.columns)
    assert len(frame) >= 200 and frame["seed"].tolist() == list(suite.suite_seeds(0, len(frame)))
    for i in (0, 57, len(frame) - 1):
        fresh = suite.row(world.document(family, int(frame["seed"][i])), i)
        image = suite_image(frame["image"][i]["bytes"])
        assert np.array_equal(image, suite_image(fresh["image"]["bytes"]))
        assert [list(map(int, b)) for b in frame["evidence"][i]] == fresh["evidence"]
        assert bool(frame["low_is_enough"][i]) == fresh["low_is_enough"]


def suite_image(data):
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def test_about_half_need_no_crop_and_every_region_is_sometimes_the_cheapest():
    enough, regions = [], Counter()
    for family in world.FAMILIES:
        for row in pd.read_parquet(FOLDER / f"nano_{family}.parquet", columns=["evidence", "low_is_enough"]).itertuples():
            enough.append(row.low_is_enough)
            regions[PAPER_GRID.cheapest_cover([tuple(map(int, b)) for b in row.evidence], world.SIZE, world.SIZE)] += 1
    assert 0.35 < np.mean(enough) < 0.65
    assert {names[0] for names in regions if len(names) == 1} == {*PAPER_GRID.names, "all"}
    assert any(len(names) == 2 for names in regions)


def test_answers_are_true_of_the_picture():
    for family in world.FAMILIES:
        for seed in range(40):
            rng = world.stream(family, seed)
            _, panels = world.family_scene(rng, family)
            question, answer, options, evidence = world.ask(rng, panels, rng.choice(panels))
            if family == "pope":
                key = question.split()[-2]
                assert answer == ("yes" if any(p.key == key and p.content in world.ROUND for p in panels) else "no")
                assert evidence == [p for p in panels if p.key == key]
            elif family == "vstar":
                assert evidence[0].content in options["ABCD".index(answer)] and len(set(options)) == 4
            else:
                assert answer == evidence[0].content and sum(p.key == evidence[0].key for p in panels) == 1
