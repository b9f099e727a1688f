"""GRPO: the reward's arithmetic, the loss against one written out by hand, exact resume, processes and micro-batches alike, warnings."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lmms_eval.api.metrics import anls as lmms_anls

from awares_bench.cli import main
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import Event, Trajectory, Turn
from awares_bench.training import grpo, recipe, rewards, sft
from awares_bench.training.curation.judges import JudgeError, anls, exact, relaxed
from awares_bench.training.nano import ablations
from awares_bench.training.nano import model as nano
from awares_bench.training.packing import pack

from ..helpers.ranks import FSDP2, launched, ranks
from ..helpers.tiny import tiny_vlm
from .test_sft import figures, write_rows


def rollout(answer, crops=(), events=(), complete=True):
    turns = (Turn(), Turn(crops=crops)) if crops else (Turn(),)
    return SimpleNamespace(trajectory=Trajectory(turns, (), answer, events, 64), complete=complete)


def test_the_composite_reward_is_the_papers():
    group = [rollout("42"), rollout("42", ("top-left",)), rollout("no", ("top-left", "left")), rollout("no", ("all",))]
    for label, missed in (("HR", 2.0), ("LR", 0.0), (None, 0.0)):
        parts = rewards.awares(group, rewards.GroundTruth("q", ("42",), label), exact, rewards.RewardWeights())
        got = [p["reward"] for p in parts]
        assert got == pytest.approx([1 - missed, 1 - 0.25 - 0.0025, -0.25 - 0.005, -0.25 - 0.01])
    tens = rewards.awares(group, rewards.GroundTruth("q", ("42",), "HR"), exact, rewards.RewardWeights(w_ans=10, area_of="sum"))
    assert [p["reward"] for p in tens] == pytest.approx([8, 9.7475, -0.25 - 0.0075, -0.26])
    direct = rewards.awares(
        [rollout("42"), rollout("no")], rewards.GroundTruth("q", ("42",), "HR"), exact, rewards.RewardWeights(missed="wrong")
    )
    assert [p["reward"] for p in direct] == [1, -2]


def test_visionthinks_penalty_turns_with_the_share_of_right_direct_answers():
    truth = rewards.GroundTruth("q", ("42",))
    often = [rollout("42"), rollout("42", ("all",)), rollout("no"), rollout("no", ("all",))]
    assert [p["reward"] for p in rewards.visionthink(often, truth, exact, rewards.RewardWeights())] == pytest.approx(
        [1.5, 1.4, 0.5, 0.4]
    )
    seldom = [rollout("no"), *[rollout("42", ("all",))] * 3]
    assert [p["reward"] for p in rewards.visionthink(seldom, truth, exact, rewards.RewardWeights())] == pytest.approx(
        [0.4] + [1.5] * 3
    )
    bad = rollout("42", ("all",), (Event("malformed_call"),))
    assert rewards.visionthink([bad], truth, exact, rewards.RewardWeights())[0]["format"] == 0


def test_advantages_are_scaled_as_asked():
    assert rewards.advantages([1, 2, 3], "none") == rewards.advantages([1, 2, 3], "dr_grpo") == [-1, 0, 1]
    assert rewards.advantages([1, 2, 3], "group_std") == pytest.approx([-1, 0, 1], abs=1e-3)
    assert rewards.advantages([5, 5], "group_std") == [0, 0]
    area_only = rewards.advantages([0.7475, 0.74], "group_std")
    assert area_only[0] > 0.6  # the area weight counts only because of the deviation


def test_the_rules_of_judges():
    assert exact("", ("Left ",), "left.") == 1 and exact("", ("left",), "lefty") == 0
    assert relaxed("", ("100",), "104") == 1 and relaxed("", ("100",), "106") == 0 and relaxed("", ("0.5",), "50%") == 1
    assert anls("", ("kitten",), "sitting") == pytest.approx(4 / 7) and anls("", ("abc",), "xyz") == 0
    assert anls("", ("a", "kitten"), "kitten") == 1


def test_anls_is_the_field_s():
    assert anls("", ("blue", "red"), " Red ") == 1.0
    assert anls("", ("red",), "reds") == 0.75
    assert anls("", ("wxyz",), "abcd") == anls("", ("x",), "") == 0.0
    texts = ["", *("".join(w) for n in (1, 2, 3, 4) for w in itertools.product("ab ", repeat=n))]
    texts = [t for t in texts if t == " ".join(t.split())]  # lmms-eval divides by the length before white space is folded
    for answer, prediction in itertools.product(texts, texts):
        assert anls("", (answer, "abba"), prediction) == lmms_anls([answer, "abba"], [prediction])["anls"]
    assert anls("", ("red",), "Red.") == 1.0 > lmms_anls(["red"], ["Red."])["anls"]  # a closing full stop is no mistake here


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model that has learned to call for some pictures and to answer others, and rows with labels."""
    folder = tmp_path_factory.mktemp("grpo")
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder / "random")
    write_rows(folder / "rows.parquet", label=lambda i: ("LR", "HR")[i % 2])
    said = {"start": str(folder / "random"), "data": str(folder / "rows.parquet"), "out": str(folder / "sft"), "device": "cpu"}
    said |= {"batch": 8, "micro_batch": 8, "steps": 10, "lr": 3e-3, "tuning": "full", "log_every": 10, "save_every": 10}
    said |= {"schedule": "constant", "warmup": 0.0}
    sft.run(recipe.check(sft.SFT, said))
    return folder


def settings(place, out, **more):
    said = {
        "start": str(place / "sft" / "checkpoint"),
        "data": str(place / "rows.parquet"),
        "out": str(place / out),
        "device": "cpu",
    }
    said |= {"prompts": 4, "group": 4, "micro_batch": 2, "steps": 4, "lr": 1e-3, "log_every": 1, "save_every": 2}
    said |= {"max_new_tokens": 8, "answer": "exact"}
    return said | more


def train(place, out, **more):
    grpo.run(recipe.check(grpo.GRPO, settings(place, out, **more)))
    return figures(place / out)


COMMAND = (
    "import sys, json; from awares_bench.training import recipe, grpo; grpo.run(recipe.check(grpo.GRPO, json.loads(sys.argv[1])))"
)


@pytest.mark.parametrize("scaling", ["group_std", "dr_grpo"])
def test_the_loss_is_the_one_written_out_by_hand(place, scaling):
    said = recipe.check(grpo.GRPO, settings(place, "byhand", tuning="full", scaling=scaling, beta=0.3))
    trainer = grpo.build(said, dry=True)
    with torch.no_grad():
        for p in trainer.scorer.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    data = [trainer.train_dataset[i] for i in range(4)]
    micro, count = trainer.get_batch_samples(iter([data[:2], data[2:]]), 2, "cpu")
    assert len(micro) == 2 and count == 16
    parameters = [p for p in trainer.scorer.parameters() if p.requires_grad]
    mine = sum(trainer.compute_loss(trainer.scorer, groups, num_items_in_batch=count) for groups in micro)
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(mine, parameters)])
    total, tokens, varied = 0.0, [0, 0], []
    for groups in micro:
        tokens[0] += pack([[r.conversation for r in g.rollouts] for g in groups], trainer.vlm.host).tokens
        for g in groups:
            worth = torch.tensor([p["reward"] for p in g.parts])
            varied.append(bool(worth.std() > 0))
            for r, a in zip(g.rollouts, worth - worth.mean(), strict=True):
                alone = pack([[r.conversation]], trainer.vlm.host)
                tokens[1] += alone.tokens
                features = trainer.vlm.encode(alone.images)
                lp = trainer.scorer(alone, features)[0]
                with torch.no_grad():
                    ref = trainer.reference(alone, features)[0]
                advantage = a / (worth.std() + 1e-4) if scaling == "group_std" else a
                kl = (ref - lp).exp() - (ref - lp) - 1
                each = -((lp - lp.detach()).exp() * advantage - 0.3 * kl)
                total = total + (each.mean() if scaling == "group_std" else each.sum() / 8) / 16
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    assert mine.item() == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
    assert (gradients - reference).norm() / reference.norm() < 1e-4
    assert tokens[0] < 0.6 * tokens[1] and sum(varied) > 1


def test_a_run_learns_and_its_table_adds_up(place):
    write_rows(place / "hard.parquet", label=lambda i: "HR")  # not to call costs 2
    train(place, "learns", data=str(place / "hard.parquet"), steps=12, tuning="full", log_every=2, save_every=12)
    lines = [json.loads(x) for x in (place / "learns" / "log.jsonl").read_text().splitlines()]
    assert sum(x["reward"] for x in lines[-2:]) > sum(x["reward"] for x in lines[:2]) + 0.3
    assert all(x["sampler_dlogp"] < 1e-3 for x in lines) and 0 <= lines[0]["kl"] < lines[-1]["kl"]
    import pandas

    table = pandas.read_parquet(place / "learns" / "completions" / "000012.parquet")
    assert len(table) == 16
    assert (table.reward - (table.answer - table.miss - table.use - table.area)).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_digits(place, tuning):
    whole = train(place, f"uncut-{tuning}", tuning=tuning)
    code = (
        "from awares_bench.training import grpo; import os; old = grpo.GRPOTrainer.compute_loss;"
        "grpo.GRPOTrainer.compute_loss = lambda s, *a, **k: os.kill(os.getpid(), 9) if s.state.global_step == 3 else old(s, *a, **k);"
    )
    said = settings(place, f"cut-{tuning}", tuning=tuning)
    assert subprocess.run([sys.executable, "-c", code + COMMAND, json.dumps(said)], capture_output=True).returncode == -9
    assert sorted(figures(place / f"cut-{tuning}")) == [1, 2, 3]
    assert train(place, f"cut-{tuning}", tuning=tuning) == whole


@pytest.mark.slow
def test_micro_batches_and_processes_change_nothing(place):
    one = train(place, "one", steps=2)
    finer = train(place, "finer", steps=2, micro_batch=1)
    assert ranks(COMMAND, settings(place, "two", steps=2)) == [0, 0]
    two = figures(place / "two")
    for step in one:
        assert finer[step] == pytest.approx(one[step], rel=1e-6, abs=1e-7)
        assert two[step] == pytest.approx(one[step], rel=1e-6, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_fsdp2_rolls_out_and_trains_as_one_process(place, tuning):
    """The processes decode different numbers of steps between the gathers of sharded weights, and end with the same rollouts."""
    import pandas

    one = train(place, f"alone-{tuning}", tuning=tuning, steps=2)
    said = settings(place, f"sharded-{tuning}", tuning=tuning, steps=2)
    assert ranks(FSDP2 + COMMAND, said, launched("fsdp2")) == [0, 0]
    assert (place / f"sharded-{tuning}" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    two = figures(place / f"sharded-{tuning}")
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-7)
        said = [
            sorted(
                (row.id, *row.replies) for f in folder.glob(f"{step:06d}*.parquet") for row in pandas.read_parquet(f).itertuples()
            )
            for folder in (place / f"{x}-{tuning}" / "completions" for x in ("alone", "sharded"))
        ]
        assert said[0] == said[1] and len(said[0]) == 16
    assert LocalModel.load(str(place / f"sharded-{tuning}" / "checkpoint"), device="cpu")


def test_recipes_that_cannot_work_say_so_before_anything_loads(place, capsys, tmp_path):
    path = tmp_path / "r.json"
    write_rows(tmp_path / "plain.parquet")
    write_rows(tmp_path / "odd.parquet", label=lambda i: "HR!")
    for said, words in (
        ({"data": str(tmp_path / "plain.parquet")}, "nobody could ever be charged"),
        ({"data": str(tmp_path / "odd.parquet")}, "allowed: LR, HR, null"),
        ({"prompts": 64}, "has 8 rows, a step takes 64"),
        ({"answer": "endpoint"}, "endpoint needs judge_model and judge_url"),
        ({"group": 1}, "group is 1; it must be at least 2"),
        ({"clipp": 1}, "Did you mean 'clip'"),
    ):
        path.write_text(json.dumps(settings(place, "never", start="nowhere") | said))
        assert main(["train", "grpo", str(path)]) == 1
        assert words in capsys.readouterr().err
    assert not (place / "never").exists()


def test_a_dry_run_shows_rollouts_and_rewards(place, capsys):
    grpo.dry_run(recipe.check(grpo.GRPO, settings(place, "dry")))
    said = capsys.readouterr().out
    assert "advantage" in said and "packed into" in said and not (place / "dry").exists()


def test_warnings_come_once_and_early():
    watch = grpo.HealthChecks()
    fine = {"reward": 0.5, "answer_score": 0.5, "call_rate": 0.4, "frac_zero_std": 0.2, "reply_tokens": 8}
    assert not any(watch(fine) for _ in range(6))
    said = [watch(fine | {"call_rate": 0.0, "frac_zero_std": 1.0}) for _ in range(6)]
    assert sum(len(x) for x in said) == 2 and "stopped calling" in said[4][-1] + said[4][0]
    watch = grpo.HealthChecks()
    for i in range(12):
        hacked = watch(fine | {"reward": 0.5 + 0.1 * i, "answer_score": 0.5 - 0.01 * i})
        if hacked:
            assert "reward rises" in hacked[0]
            break
    else:
        raise AssertionError("no warning")


def test_an_endpoint_that_does_not_answer_is_named():
    from awares_bench.training.curation.judges import Endpoint

    with pytest.raises(JudgeError, match="gave no answer in 2 tries"):
        Endpoint("http://127.0.0.1:9", "m", timeout=0.2, retries=1).say("hello")


@pytest.mark.parametrize("name", ablations.CHANGES)
def test_every_ablation_is_a_recipe_that_differs_from_nano_grpo(name):
    plain, changed = recipe.load(grpo.GRPO, "nano_grpo"), recipe.load(grpo.GRPO, "nano_grpo", ablations.CHANGES[name])
    assert (changed == plain) == (name == "grpo")
