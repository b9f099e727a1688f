"""The AwaRes policy, driven by scripted replies: what it shows, when it fetches, what it notes."""

import pytest
from PIL import Image

from awares_bench.awares import AwaRes
from awares_bench.inference.engine import Engine, Job, Scripted
from awares_bench.methods.conversation import Failure, Sample
from awares_bench.methods.registry import describe, method_class, names

from ..helpers.tiny import picture


def run(policy, script, images, cap=64, until=()):
    engine = Engine(Scripted({"q": script}), policy, batch_size=2)
    ((_, outcome),) = list(engine.run([Job(Sample(tuple(images), "q", "k"), cap, until)]))
    return outcome


def kinds(t):
    return [e.kind for e in t.events]


def test_a_direct_answer_costs_the_half_size_view_only():
    t = run(AwaRes(), ["blue"], [picture(224, 224)])
    assert (t.answer, t.crops, len(t.turns)) == ("blue", (), 1)
    assert t.turns[0].images[0].size == (112, 112)
    assert t.rtr == 0.25
    assert not t.turns[0].is_final


def test_a_call_fetches_the_named_crops_at_full_density_and_answers():
    t = run(AwaRes(), ["GET_CROPS: ['0', '8']", "42"], [picture(224, 224)])
    assert (t.answer, t.crops) == ("42", ("top-left", "right"))
    assert [i.size for i in t.turns[1].images] == [(112, 112), (112, 224)]
    assert t.turns[1].text == "" and t.turns[1].is_final
    assert t.rtr == 0.25 + 0.25 + 0.5


@pytest.mark.parametrize(("choice", "answer", "turns"), [("full", "42", 2), ("answer", "GET_CROPS: ['99']", 1)])
def test_a_malformed_call_follows_its_stated_policy_and_is_an_event(choice, answer, turns):
    t = run(AwaRes(on_malformed=choice), ["GET_CROPS: ['99']", "42"], [picture(224, 224)])
    assert (t.answer, len(t.turns)) == (answer, turns)
    assert kinds(t) == ["malformed_call"]
    if choice == "full":
        assert t.crops == ("all",) and t.rtr == 1.25


def test_a_malformed_call_may_be_an_error_and_is_then_no_answer():
    assert isinstance(run(AwaRes(on_malformed="error"), ["GET_CROPS: ['99']"], [picture(224, 224)]), Failure)


def test_a_second_call_is_the_answer_text_and_an_event():
    t = run(AwaRes(), ["GET_CROPS: ['0']", "GET_CROPS: ['1']"], [picture(224, 224)])
    assert t.answer == "GET_CROPS: ['1']" and kinds(t) == ["call_in_answer"] and len(t.turns) == 2


def test_documents_without_an_image_or_with_several_are_answered_and_noted():
    t = run(AwaRes(), ["four"], [])
    assert (t.answer, t.rtr, kinds(t)) == ("four", None, ["no_image"])
    t = run(AwaRes(), ["four"], [picture(224, 224), picture(112, 112)])
    assert (t.rtr, kinds(t)) == (1.0, ["several_images"])


def test_an_image_too_small_to_cut_is_sent_whole():
    t = run(AwaRes(), ["GET_CROPS: ['2']", "x"], [picture(40, 300)])
    assert t.crops == ("all",) and "crops_too_small" in kinds(t)


def test_the_call_has_a_budget_of_its_own_and_the_answer_keeps_the_tasks():
    t = run(AwaRes(), ["a long answer that the task would cut"], [picture(224, 224)], cap=6)
    assert t.answer == "a long" and "answer_cut" in kinds(t)
    t = run(AwaRes(), ["GET_CROPS: ['0', '5', '7']", "ok"], [picture(224, 224)], cap=6)
    assert t.crops == ("top-left", "top", "left") and t.answer == "ok"


def test_options_are_checked_with_what_is_allowed():
    with pytest.raises(ValueError, match="'full', 'answer', 'error'"):
        AwaRes(on_malformed="ignore")
    with pytest.raises(ValueError, match="'paper', 'adapter'"):
        AwaRes(prompt="mine")
    with pytest.raises(ValueError, match="at least 32"):
        AwaRes(call_budget=16)


def test_a_broken_image_is_a_failure_that_names_it_and_others_go_on():
    broken = Image.open(_truncated())
    engine = Engine(Scripted({"q": ["a"]}), AwaRes(), batch_size=4)
    outcomes = dict(
        engine.run([Job(Sample((i,), "q", str(n)), 8) for n, i in enumerate([picture(56, 56), broken, picture(84, 84)])])
    )
    assert isinstance(outcomes[1], Failure) and "cannot be decoded" in outcomes[1].error
    assert outcomes[0].answer == outcomes[2].answer == "a"


def _truncated():
    import io

    data = io.BytesIO()
    picture(300, 300).save(data, "PNG")
    return io.BytesIO(data.getvalue()[: len(data.getvalue()) // 2])


def test_every_method_documents_itself_and_loads_by_name():
    assert {"awares", "full", "low"} <= set(names())
    for name in names():
        assert {"Title", "Paper", "Code", "Needs", "Cost", "Differs"} <= set(describe(name))
        method_class(name)()
    with pytest.raises(ValueError, match="Did you mean awares"):
        method_class("aware")
