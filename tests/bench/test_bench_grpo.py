"""The GRPO bench: our side counts what its step feeds, and TRL's side, where TRL is at hand, does the same work in its own way."""

import json
import sys
from importlib.util import find_spec

import pytest

from awares_bench.bench import grpo_bench
from awares_bench.cli import main
from awares_bench.training.nano import model as nano

from ..helpers.tiny import tiny_vlm


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "start"
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder)
    return str(folder)


def test_our_side_alone_counts_what_its_step_feeds(start, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", "grpo", "--pretrained", start, "--prompts", "2", "--group", "2", "--repeats", "1", "--device", "cpu", "--json", str(path)]) == 0  # fmt: skip
    result, said = json.loads(path.read_text()), capsys.readouterr()
    row = result["rows"]["ours"]
    tokens = row["tokens"]
    assert tokens["reference"] == tokens["loss"] == tokens["backward"] > 0
    assert row["pushed"] == sum(tokens[n] for n in grpo_bench.PUSHED) and row["seconds"] > 0
    assert 0 < tokens["prefill"] < tokens["loss"]  # two prompts, each once
    assert tokens["decode"] <= 4 * 31 and tokens["encoded"] >= 2 * 16  # a reply's last token is never fed
    assert result["figures"] == [] and "--trl-python" in said.err


@pytest.mark.skipif(find_spec("trl") is not None, reason="trl is installed here, so its absence cannot be seen")
@pytest.mark.slow
def test_an_environment_without_trl_is_named(start, capsys):
    told = ["bench", "grpo", "--pretrained", start, "--prompts", "2", "--group", "2", "--repeats", "1", "--device", "cpu"]
    assert main([*told, "--trl-python", sys.executable]) == 1
    assert "No module named 'trl'" in capsys.readouterr().err


@pytest.mark.skipif(
    find_spec("trl") is None, reason="trl is not installed here; it is no dependency, only the other side of a bench"
)
def test_trl_takes_its_step_on_the_same_prompts():
    result = grpo_bench.run("nano", sys.executable, prompts=2, group=4, repeats=1, device="cpu")  # raises for other prompts
    ours, theirs = result["rows"]["ours"], result["rows"]["TRL"]
    assert theirs["call_rate"] > 0 and theirs["tokens"]["loss"] == theirs["tokens"]["reference"] > ours["tokens"]["loss"]
    assert theirs["pushed"] > 1.5 * ours["pushed"] and theirs["tokens"]["encoded"] > ours["tokens"]["encoded"]
