"""The rivals' trainers: rows whose replies the policies read as meant, and a cropper that is paid for what the target then sees."""

import json

import pytest
import torch

from awares_bench.inference.engine import Engine, Job, Scripted
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Sample
from awares_bench.methods.images import half
from awares_bench.methods.policy import UNDER_TEST
from awares_bench.methods.registry import method_class
from awares_bench.training import examples, grpo, recipe, sft
from awares_bench.training.auxiliary import cropper
from awares_bench.training.nano import model as nano
from awares_bench.training.nano import rival_data
from awares_bench.training.rendering import render
from awares_bench.training.rollouts import rollouts

from ..helpers.tiny import chunk_ids, picture, pixels, tiny_copy, tiny_vlm
from ..training.test_sft import figures

OPTIONS = {"view": "low", "longest": 112}


def whole(**more):
    return method_class("cropvlm")(**OPTIONS | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder / "start")
    for style in rival_data.STYLES:
        assert rival_data.write(style, "nano:6", folder / f"{style}.parquet") == 6
    return folder


def settings(place, style, out, **more):
    said = {"start": str(place / "start"), "data": str(place / f"{style}.parquet"), "out": str(place / out), "device": "cpu"}
    said |= {"tuning": "full", "lr": 1e-3, "steps": 2, "log_every": 1, "save_every": 2, "policy": style}
    return (
        said
        | ({"policy_options": OPTIONS, "role": "cropper"} if style == "cropvlm" else {"policy_options": {"budget": 4}})
        | more
    )


def test_the_replies_lead_the_policies_where_the_labels_say(place):
    called = set()
    for row in examples.rows(str(place / "visionthink.parquet"), ("replies",)):
        sample = examples.sample(row, 0, 2000)
        ((_, outcome),) = Engine(Scripted({f"\n{sample.question}": list(row["replies"])}), method_class("visionthink")(), 1).run(
            [Job(sample, 8)]
        )
        assert outcome.answer == row["answers"][0] and not outcome.events
        assert outcome.crops == (("all",) if row["label"] == "HR" else ())
        called.add(row["label"])
    assert called == {"LR", "HR"}
    for row in examples.rows(str(place / "cropvlm.parquet"), ("replies",)):
        sample = examples.sample(row, 0, 2000)
        look = whole().turns(sample)
        next(look)
        events, turn = cropper.after_reply(look, cropper.Reply(row["replies"][0]))
        assert not events and turn.images[0].size == half(sample.images[0]).size
        ((left, top, right, bottom),) = turn.boxes
        assert all(left <= b[0] and top <= b[1] and right >= b[2] and bottom >= b[3] for b in row["boxes"])


def test_a_part_asks_what_evaluation_asks_the_cropper_and_the_target_sees_what_it_sees(place):
    sample, said = Sample((picture(224, 224),), "what is it?", "k"), "[10, 20, 60, 70]."
    auxiliary_turn = cropper.AuxiliaryTurn(whole(), "cropper")
    c = render(tiny_vlm(), auxiliary_turn, sample, [said])
    policy = whole()
    first = next(policy.turns(sample))
    assert first.model == "cropper" and c.ids[: c.prompt] == chunk_ids(tiny_vlm(), Session(), first)
    script = {first.text: [said], sample.question: ["42"]}
    ((_, outcome),) = Engine(Scripted(script), policy, 1).run([Job(sample, 8)])
    shown = cropper.FrozenTargetReward(tiny_copy(), auxiliary_turn).turn_after(sample, said)
    assert [i.tobytes() for i in shown.images] == [i.tobytes() for i in outcome.turns[1].images]
    assert shown.text == outcome.turns[1].text and shown.images[1].size == (112, 112)
    with pytest.raises(ValueError, match="not the other's"):
        next(cropper.AuxiliaryTurn(whole(), "other").turns(sample))


class Says:
    """A stand-in for a rollout: the reply's text and the events that evaluation notes."""

    def __init__(self, text, sample):
        script = {next(whole().turns(sample)).text: [text]}
        ((_, self.trajectory),) = Engine(Scripted(script), cropper.AuxiliaryTurn(whole(), "cropper"), 1).run([Job(sample, 8)])


def test_the_reward_is_the_targets_likelihood_and_the_worth_of_the_form():
    vlm, sample = tiny_copy(), Sample((picture(224, 224),), "what is it?", "k")
    target = cropper.FrozenTargetReward(vlm, cropper.AuxiliaryTurn(whole(), "cropper"))
    texts = ["[10, 20, 60, 70].", "[10, 20, 10, 70].", "Not needed.", "[0, 0, 100, 100]."]
    parts = target(sample, "42", [Says(t, sample) for t in texts])
    assert [p["form"] for p in parts] == [1.0, 0.0, 0.25, 1.0]
    assert parts[1]["likelihood"] == pytest.approx(parts[2]["likelihood"], abs=1e-4)  # nothing is gained by a broken box
    for text, p in zip(texts, parts, strict=True):
        turn = target.turn_after(sample, text if p["form"] else cropper.NOT_NEEDED)
        views = [pixels(vlm, i) for i in turn.images]
        said = [*vlm.tokenizer("42")["input_ids"], vlm.tokenizer.eos_token_id]
        ids = torch.tensor([chunk_ids(vlm, Session(), turn) + said])
        with torch.no_grad():
            logits = vlm.host.model(
                input_ids=ids,
                pixel_values=torch.cat([x for x, _, _ in views]),
                image_grid_thw=torch.tensor([g for _, g, _ in views]),
                mm_token_type_ids=(ids == vlm.host.image_token).int(),
            ).logits[0]
        n = len(said)
        expected = logits[-n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None]).sum().item()
        assert p["likelihood"] == pytest.approx(expected, abs=1e-3) and p["reward"] == p["likelihood"] + p["form"]
    assert parts[0]["likelihood"] != pytest.approx(parts[3]["likelihood"], abs=1e-3)


def test_a_cropper_goes_through_both_trainers_into_evaluation(place):
    sft.run(
        recipe.check(sft.SFT, settings(place, "cropvlm", "crop-sft", batch=6, micro_batch=6, steps=30, save_every=30, lr=3e-3))
    )
    curve = [loss for loss, _ in figures(place / "crop-sft").values()]
    assert curve[-1] < 0.5 * curve[0]
    start = str(place / "crop-sft" / "checkpoint")
    more = {"prompts": 2, "group": 3, "micro_batch": 1, "max_new_tokens": 24, "answer": "exact", "scheme": "likelihood"}
    grpo.run(recipe.check(grpo.GRPO, settings(place, "cropvlm", "crop", start=start, target=str(place / "start"), **more)))
    line = json.loads((place / "crop" / "log.jsonl").read_text().splitlines()[-1])
    assert line["reward"] < 1 and line["sampler_dlogp"] < 1e-3 and 0 <= line["parse_fail"] <= 1
    assert not (place / "crop" / "warnings.jsonl").exists()
    vlm = LocalModel.load(str(place / "crop" / "checkpoint"), device="cpu")
    sample = Sample((picture(224, 224),), "what is it?", "k")
    policy = whole(cropper=UNDER_TEST)
    ((_, outcome),) = Engine(tiny_vlm(), policy, 1, models={"cropper": vlm}).run([Job(sample, 2)])
    (alone,) = vlm.reply([Request(Session(), next(policy.turns(sample)), 32)])
    assert outcome.replies[0].text == alone.text and alone.text.startswith("[")
    assert "--model cropvlm" in (place / "crop" / "checkpoint" / "README.md").read_text()


def test_visionthink_goes_through_both_trainers(place):
    sft.run(recipe.check(sft.SFT, settings(place, "visionthink", "think-sft", batch=6, micro_batch=3)))
    start = str(place / "think-sft" / "checkpoint")
    more = {"prompts": 2, "group": 2, "micro_batch": 2, "max_new_tokens": 4, "answer": "exact", "scheme": "visionthink"}
    grpo.run(recipe.check(grpo.GRPO, settings(place, "visionthink", "think", start=start, **more)))
    assert (place / "think" / "checkpoint" / "config.json").exists() and len(figures(place / "think")) == 2


def test_a_role_that_the_policy_does_not_have_is_refused(place):
    for cls, more, words in (
        (sft.SFT, {"role": "croper", "batch": 6, "micro_batch": 6}, "models of cropvlm: cropper"),
        (grpo.GRPO, {"prompts": 2, "scheme": "likelihood"}, "go together"),
        (grpo.GRPO, {"prompts": 2, "target": "nano"}, "go together"),
    ):
        with pytest.raises(recipe.RecipeError, match=words):
            (sft if cls is sft.SFT else grpo).build(
                recipe.check(cls, settings(place, "cropvlm", "never", start="nowhere", **more))
            )


def test_rollouts_of_a_part_note_what_the_box_came_to():
    vlm = tiny_copy()
    part = cropper.AuxiliaryTurn(whole(), "cropper")
    ((one, two),), _ = rollouts(vlm, part, [Sample((picture(224, 224),), "what?", "k")], 2, 6)
    for r in (one, two):  # random weights write no box
        assert [e.kind for e in r.trajectory.events][:1] == ["malformed_box"] and len(r.trajectory.turns) == 1
