"""Training AdaptVision and ERGO: their rewards, an advantage for each turn, the mean in two parts, and the judge of crops."""

import json
from types import SimpleNamespace

import pytest
import torch

from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Event, Sample, Trajectory, Turn
from awares_bench.models.packaged import resolve
from awares_bench.training import grpo, recipe, rewards
from awares_bench.training.auxiliary.crop_reader import CropReader
from awares_bench.training.curation.judges import exact
from awares_bench.training.nano import model as nano
from awares_bench.training.nano import rival_data
from awares_bench.training.rendering import Conversation

from ..helpers.tiny import picture, tiny_copy, tiny_vlm
from ..test_policy_golden import cases
from .test_sft import figures

WEIGHTS = rewards.RewardWeights()
SIZE = (100, 100)


def rollout(answer, replies, box=None, events=(), image=None):
    turns = (Turn(),) if len(replies) == 1 else (Turn(), Turn(boxes=(box,) if box else (), images=(image,) if image else ()))
    said = tuple(SimpleNamespace(text=r) for r in replies)
    return SimpleNamespace(trajectory=Trajectory(turns, said, answer, events, 64), complete=True)


DIRECT, CALL = "<think>a</think><answer>{}</answer>", "<think>a</think><tool_call>{}</tool_call>"


def of_case(r: dict) -> SimpleNamespace:
    """A rollout of a golden group."""
    answer = "42" if r["acc"] else "no"
    last = DIRECT.format(answer) if r["format"] else f"<answer>{answer}</answer>"
    if not r["tool"]:
        return rollout(answer, [last])
    area = r["area"] or 0.5
    return rollout(answer, [CALL, last], (0, 0, 1000, round(1000 * area)))


@cases("adaptvision", "reward")
def test_adaptvisions_rewards_and_advantages_are_the_authors(case):
    group = [of_case(r) for r in case["group"]]
    truth = rewards.GroundTruth("q", ("42",), size=(1000, 1000))
    parts = rewards.adaptvision(group, truth, exact, WEIGHTS, [float(r["crop"]) for r in case["group"]])
    assert [p["reward"] for p in parts] == pytest.approx(case["outcome"], abs=1e-5)
    assert [p["tool"] for p in parts] == pytest.approx(case["tool"], abs=1e-5)
    turns = rewards.turn_advantages(
        [p["reward"] for p in parts], [p["tool"] for p in parts], [1 + r["tool"] for r in case["group"]], "group_std", 0.3
    )
    if max(case["outcome"]) - min(case["outcome"]) > 1e-4:  # else theirs is the rounding of float32 over nearly nothing
        assert [t[0] for t in turns] == pytest.approx(case["advantage_first"], abs=1e-4)
        second = [(t[1], a) for t, a in zip(turns, case["advantage_second"], strict=True) if a is not None]
        assert [t for t, _ in second] == pytest.approx([a for _, a in second], abs=1e-4)


@cases("adaptvision", "reward")
def test_the_mean_in_two_parts_is_the_authors_loss(case):
    """Their loss from their advantages: clip .2 and .24 never act here, the ratio is given."""
    gains, calls = [], []
    for r, first, second, log_ratio in zip(
        case["group"], case["advantage_first"], case["advantage_second"], case["log_ratio"], strict=True
    ):
        conversation = Conversation()
        for n in (r["first"], r["second"])[: 2 if r["second"] else 1]:
            conversation.add_context([0], [])
            conversation.add_reply([1] * n)
        row = SimpleNamespace(conversation=conversation)
        values = (first, second) if r["second"] else (first,)
        spread = grpo.per_token(row, values)
        assert len(spread) == r["first"] + r["second"] and spread[0] == first
        gains += [a * torch.tensor(log_ratio).exp().item() for a in spread]
        calls += grpo.call_tokens(row)
    gain, is_call = torch.tensor(gains), torch.tensor(calls)
    share = grpo.part_shares(is_call, float(is_call.sum()), float((~is_call).sum()), 0.5)
    assert -(gain * share).sum().item() == pytest.approx(case["loss"], abs=1e-5)


@cases("adaptvision", "format_reward")
def test_the_form_is_the_authors(case):
    assert rewards.in_form(case["turns"]) == bool(case["format"])


@cases("adaptvision", "area_ratio")
def test_the_area_is_the_authors(case):
    assert rewards.area_share(tuple(case["box"]), tuple(case["view"])) == pytest.approx(case["ratio"])


def test_ergo_pays_for_a_region_that_suffices_and_is_not_the_whole():
    first, last = "<think>a</think><zoom>[0, 0, 9, 9]</zoom>", "<think>b</think><answer>42</answer>"
    group = [
        rollout("42", [first, last], (0, 0, 50, 50)),
        rollout("42", [first, last], (0, 0, 100, 100)),
        rollout("no", [first, last], (0, 0, 50, 50)),
        rollout("42", [first, last], (0, 0, 100, 100), (Event("malformed_box"),)),
    ]
    truth = rewards.GroundTruth("q", ("42",), size=SIZE)
    parts = rewards.ergo(group, truth, exact, WEIGHTS, [1.0, 1.0, 0.0, 1.0])
    assert [p["reward"] for p in parts] == [1 + 1 + 1 + 0.5, 1 + 1 + 1, 0 + 1 + 0 + 0.5, 1]
    assert rewards.covers(((0, 0, 50, 50),), ((1, 1, 50, 50),)) and not rewards.covers(((0, 0, 50, 50),), ((1, 1, 51, 50),))
    assert not rewards.covers((), ((1, 1, 2, 2),))


def test_the_reader_answers_from_the_crop_alone_and_reads_equal_crops_once(monkeypatch):
    vlm, asked = tiny_copy(), []
    crops = [picture(56, 56), picture(56, 56), picture(56, 56, 3)]
    group = [rollout("x", [CALL, "x"], (0, 0, 5, 5), image=c) for c in crops] + [rollout("x", ["x"])]
    original = vlm.reply
    monkeypatch.setattr(vlm, "reply", lambda requests: asked.extend(requests) or original(requests))
    alone = CropReader(vlm, exact, 4)
    got = alone("what is it?", ("42",), group)
    assert len(asked) == 2 and all(len(r.turn.images) == 1 and r.turn.text == "what is it?" for r in asked)
    (said,) = original([asked[0].__class__(asked[0].session.__class__(), asked[0].turn, 4)])
    assert got == [0.0] * 4 and alone("what is it?", (said.text,), group)[:2] == [1.0, 1.0]


def test_the_logged_area_is_that_of_the_regions_or_of_the_box_and_0_without_a_call():
    truth = rewards.GroundTruth("q", ("x",), size=(100, 50))
    regions = SimpleNamespace(
        trajectory=Trajectory((Turn(), Turn(crops=("top-left", "bottom-right"))), (), "x", (), 64), complete=True
    )
    assert rewards.covered(regions, truth) == 0.5
    assert rewards.covered(rollout("x", [CALL, "x"], (50, 0, 100, 50)), truth) == 0.5
    assert rewards.covered(rollout("x", ["x"]), truth) == 0.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops")
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder / "start")
    for style in ("adaptvision", "ergo"):
        assert rival_data.write(style, "nano:6", folder / f"{style}.parquet") == 6
    return folder


def settings(place, style, **more):
    said = {"start": str(place / "start"), "data": str(place / f"{style}.parquet"), "out": str(place / f"{style}-grpo")}
    said |= {"device": "cpu", "tuning": "full", "lr": 1e-3, "steps": 2, "log_every": 1, "save_every": 2, "policy": style}
    said |= {
        "policy_options": {"budget": 4} | ({"cap": 16} if style == "ergo" else {}),
        "scheme": style,
        "crop_judge": "evidence",
    }
    return said | {"prompts": 2, "group": 2, "micro_batch": 1, "max_new_tokens": 4, "answer": "exact", "beta": 0.1} | more


@pytest.mark.parametrize(
    ("style", "more"),
    [("adaptvision", {"token_mean": "parts"}), ("ergo", {"crop_judge": "target"})],
    ids=["adaptvision", "ergo"],
)
def test_grpo_runs_and_logs_the_parts(place, style, more):
    more = more | ({"target": str(place / "start")} if style == "ergo" else {})
    grpo.run(recipe.check(grpo.GRPO, settings(place, style, **more)))
    assert len(figures(place / f"{style}-grpo")) == 2
    line = json.loads((place / f"{style}-grpo" / "log.jsonl").read_text().splitlines()[-1])
    assert line["sampler_dlogp"] < 1e-3 and ("tool_score" if style == "adaptvision" else "region_score") in line


def test_the_loss_in_parts_is_the_sum_over_micro_batches(place):
    """One micro-batch or two: the counts are the step's."""
    gradients = []
    for micro_batch in (1, 2):
        out = str(place / f"parts-{micro_batch}")
        more = {
            "token_mean": "parts",
            "micro_batch": micro_batch,
            "steps": 1,
            "save_every": 1,
            "out": out,
            "crop_judge": "evidence",
        }
        grpo.run(recipe.check(grpo.GRPO, settings(place, "adaptvision", **more)))
        gradients.append(json.loads((place / f"parts-{micro_batch}" / "log.jsonl").read_text().splitlines()[0])["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"crop_judge": ""}, "and a crop_judge go together"),
        ({"scheme": "awares"}, "and a crop_judge go together"),
        ({"crop_judge": "target"}, "a target and crop_judge: target"),
        ({"target": "nano"}, "a target and crop_judge: target"),
        ({"token_mean": "parts", "scaling": "dr_grpo"}, "set one of them"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(place, more, words):
    with pytest.raises(recipe.RecipeError, match=words):
        recipe.check(grpo.GRPO, settings(place, "adaptvision", **more))


def test_the_rows_replies_lead_the_policies_where_the_labels_say(place):
    from awares_bench.methods.registry import method_class
    from awares_bench.training import examples

    from ..test_policy_golden import Played

    for style, options in (("adaptvision", {}), ("ergo", {"cap": rival_data.ERGO_CAP})):
        for row in examples.rows(str(place / f"{style}.parquet"), ("replies",)):
            sample: Sample = examples.sample(row, 0, 2000)
            t = Played(method_class(style)(**options), sample.images, list(row["replies"]), sample.question)
            assert t.answer == row["answers"][0] and not t.events and len(t.turns) == len(row["replies"])
            if len(t.turns) == 2:
                assert rewards.covers(t.turns[1].boxes, [tuple(b) for b in row["boxes"]])


@pytest.mark.parametrize("style", ["adaptvision", "ergo"])
def test_the_start_of_a_protocol_has_its_sentences_as_tokens_and_is_nano_base_in_all_else(tmp_path, style):
    before = LocalModel.load(resolve("nano-base"), "float32", "cpu").host
    added = rival_data.write_start(style, tmp_path)
    after = LocalModel.load(str(tmp_path), "float32", "cpu").host
    known = before.tokenizer.get_vocab()
    assert {k: v for k, v in after.tokenizer.get_vocab().items() if k in known} == known
    assert len(after.tokenizer) == len(known) + added and added > 5
    begin, end, _ = rival_data.STARTS[style]
    assert len(after.tokenizer(begin)["input_ids"]) == len(after.tokenizer(end)["input_ids"]) == 1
    turn = Turn((picture(224, 224),), "What is the value of the red bar?")
    given = [host.render([turn], [], [host.image_input(turn.images[0])]) for host in (before, after)]
    assert given[0] == given[1]
    said = [vlm.reply([Request(Session(), turn, 4)])[0].tokens for vlm in (LocalModel(before), LocalModel(after))]
    assert said[0] == said[1]
