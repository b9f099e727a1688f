"""Limits of pictures: one place of the numbers, names for sets of them, what is given instead, what a record and a table say."""

import json
import re
from pathlib import Path

import pytest

import awares_bench
from awares_bench.models import limits
from awares_bench.models.families import families
from awares_bench.models.limits import NAMED, RELEASED, Limits, areas

from ..helpers.runs import full, write_run
from ..helpers.tiny import tiny_vlm

ROOT = Path(__file__).parents[2]


def test_the_numbers_of_the_released_processors_stand_in_one_place():
    """Least and most of Qwen2.5-VL and of Qwen3-VL, however they may be written."""
    numbers = r"\b(3136|3_136|12845056|12_845_056|16777216|16_777_216|16384 \* (28|32) \* \2|4 \* 28 \* 28|4 \* 28 ?\*\* ?2)\b"
    files = [p for folder in ("awares_bench", "baselines", "training", "reports") for p in (ROOT / folder).rglob("*.py")]
    found = {p.name for p in files if re.search(numbers, re.sub(r"#.*|\"\"\".*?\"\"\"", "", p.read_text(), flags=re.S))}
    assert found <= {"limits.py"}, found
    assert RELEASED == (3136, 12845056) == areas(28, 4, 16384)


def test_every_family_has_released_limits():
    assert families()["qwen2_5_vl"].default_limits == RELEASED
    if "qwen3_vl" in families():
        assert families()["qwen3_vl"].default_limits == (65536, 16777216)


@pytest.mark.parametrize(
    ("asked", "family", "pixels", "name"),
    [
        (Limits(), "qwen2_5_vl", RELEASED, "hf"),
        (Limits(), "qwen3_vl", (65536, 16777216), "hf"),
        (Limits("lmms-eval"), "qwen2_5_vl", (200704, 1605632), "lmms-eval"),
        (Limits("lmms-eval"), "qwen3_vl", (200704, 1605632), "lmms-eval"),
        (Limits("vlmevalkit"), "qwen2_5_vl", (1003520, 12845056), "vlmevalkit"),
        (Limits("vlmevalkit"), "qwen3_vl", (65536, 16777216), "vlmevalkit"),
        (Limits("angelslim"), "qwen2_5_vl", (200704, 12845056), "angelslim"),
        (Limits("awares-adapter"), "qwen2_5_vl", (25088, 1605632), "awares-adapter"),
        (Limits("pixel-reasoner"), "qwen2_5_vl", (401408, 4014080), "pixel-reasoner"),
        (Limits("qwen-advice"), "qwen3_vl", (262144, 1310720), "qwen-advice"),
        (Limits("deepeyes"), "qwen2_5_vl", RELEASED, "deepeyes"),
        (Limits(None, 3136, 12845056), "qwen2_5_vl", RELEASED, "hf"),
        (Limits(None, None, 1605632), "qwen2_5_vl", (3136, 1605632), "hf max_pixels=1605632"),
        (Limits("lmms-eval", 784), "qwen2_5_vl", (784, 1605632), "lmms-eval min_pixels=784"),
        (Limits("hf"), "mllama", None, "hf"),
    ],
)
def test_a_name_is_two_numbers_and_numbers_win(asked, family, pixels, name):
    own = {"qwen3_vl": (65536, 16777216), "mllama": None}.get(family, RELEASED)
    assert asked.resolve(family, own) == (pixels, name)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Limits("lmmseval"), "limits is 'lmmseval'; allowed: hf, lmms-eval, "),
        (
            Limits("awares-adapter"),
            "limits=awares-adapter is stated for qwen2_5_vl, and this checkpoint is a mllama; pass limits=hf",
        ),
        (Limits(None, 1), "min_pixels is given, and the picture processor of this mllama checkpoint has no limits in pixels"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(asked, said):
    with pytest.raises(ValueError) as error:
        asked.resolve("mllama", None)
    assert str(error.value).startswith(said)


def test_names_have_sources_and_limits_that_can_be():
    assert all(len(row.source) > 10 for row in NAMED)
    assert all(0 < row.pixels[0] <= row.pixels[1] for row in NAMED if row.pixels)
    pairs = [(row.name, family) for row in NAMED for family in row.families or ("",)]
    assert len(set(pairs)) == len(pairs) and limits.NAMES[0] == limits.OWN


def test_loading_by_name_counts_so_and_says_what_is_overruled(capsys, checkpoint):
    small = awares_bench.load(str(checkpoint), limits="lmms-eval").vlm
    assert small.host.limits == {"shortest_edge": 200704, "longest_edge": 1605632} and "overruled" not in capsys.readouterr().err
    mixed = awares_bench.load(str(checkpoint), limits="lmms-eval", min_pixels=3136).vlm
    assert "limits=lmms-eval is overruled by min_pixels=3136, which was given" in capsys.readouterr().err
    assert mixed.host.limits_name == "lmms-eval min_pixels=3136" and mixed.host.on(mixed.host.model).limits == mixed.host.limits
    with pytest.raises(ValueError, match="limits is 'leaderboard'; allowed: hf, "):
        awares_bench.load(limits="leaderboard")
    assert tiny_vlm().host.limits_name == "hf"


def test_a_run_and_every_table_say_the_limits(tmp_path, checkpoint):
    from awares_bench.evaluation import lmms_model
    from awares_bench.reports.report import write

    made = lmms_model.full(pretrained=str(checkpoint), limits="angelslim", output_dir=str(tmp_path / "run"))
    made.run.close()
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert (identity["limits"], identity["min_pixels"], identity["max_pixels"]) == ("angelslim", 200704, 12845056)
    named = {"limits": "angelslim", "min_pixels": 200704}
    write_run(tmp_path, "a", {"nano_doc": full()}, named)
    *_, notes = write([tmp_path], tmp_path / "out", formats=())
    told = "Processor limits (pixels): 200,704 to 12,845,056 (limits=angelslim)."
    assert told in notes and all(told in path.read_text() for path in (tmp_path / "out").glob("*.md"))
