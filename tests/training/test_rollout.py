"""Rollouts: sampled log-probabilities are those of a fresh forward, the same whatever runs beside them; greedy ones are evaluation's."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from awares_bench.awares import AwaRes
from awares_bench.errors import RunError
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Sample, Turn
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rendering import render
from awares_bench.training.rollouts import SamplingModel, banned_tokens, rollouts

from ..helpers.tiny import picture, tiny_copy


@cache
def talker():
    """A tiny model that ends about half of its replies within their budget; random weights end none."""
    vlm = tiny_copy()
    head = torch.nn.Linear(*reversed(vlm.host.model.lm_head.weight.shape))
    head.weight, end = vlm.host.model.lm_head.weight, vlm.tokenizer.eos_token_id
    with torch.no_grad():
        head.bias.zero_()[end] = 3.5
    vlm.host.model.lm_head = head
    return vlm


class OftenCalls(AwaRes):
    """Reads a call for one crop, for two, or for none into a first reply."""

    def turns(self, sample):
        reply = yield Turn(
            (half(sample.images[0]),), sample.question, system=PAPER_GRID.prompt, is_final=False, min_reply_tokens=32
        )
        crops = ("top-left", "right")[: sum(reply.tokens) % 3]
        return (yield Turn(tuple(PAPER_GRID.cut(sample.images[0], crops)))) if crops else reply


SAMPLES = [Sample((picture(168 + 56 * i, 168, i),), f"Number {i}?" * (1 + i), f"s{i}") for i in range(3)]


def go(samples=SAMPLES, temperature=1.0, size=4):
    vlm = talker()
    return rollouts(vlm, OftenCalls(), samples, size, 6, temperature, "seed")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_are_those_of_a_fresh_forward_alone_and_packed(temperature):
    vlm = talker()
    groups, sampler = go(temperature=temperature)
    turns = [len(r.trajectory.turns) for g in groups for r in g]
    assert set(turns) == {1, 2} and {r.complete for g in groups for r in g} == {True, False}
    scorer = Scorer(vlm.host, banned_tokens(vlm.host), temperature)
    packs = [pack([[r.conversation for r in g] for g in groups], vlm.host)]
    packs.append(pack([[r.conversation] for g in groups for r in g], vlm.host))
    sampled = torch.tensor([x for g in groups for r in g for x in r.logprobs])
    with torch.no_grad():
        for packed in packs:
            scores, _ = scorer(packed, vlm.encode(packed.images))
            assert len(scores) == len(sampled) and (scores - sampled).abs().max() < 1e-4
    assert sampler.shared > sampler.prefilled * 0.5


def test_what_runs_beside_a_conversation_changes_nothing():
    together, _ = go()
    alone, _ = go(SAMPLES[1:2])
    for a, b in zip(together[1], alone[0], strict=True):
        assert a.conversation.ids == b.conversation.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({tuple(r.conversation.ids) for r in together[0]}) > 1
    other, _ = rollouts(talker(), OftenCalls(), SAMPLES[:1], 4, 6, 1.0, "another seed")
    assert [r.conversation.ids for r in other[0]] != [r.conversation.ids for r in together[0]]


def test_at_temperature_zero_the_rollout_is_evaluation():
    vlm = talker()
    groups, sampler = go(temperature=0.0, size=2)
    _, alone = go(temperature=0.0, size=1)
    assert {len(g[0].trajectory.turns) for g in groups} == {1, 2}
    assert sampler.prefilled == alone.prefilled == sampler.shared  # the second of a group feeds nothing, in either turn
    evaluated = dict(Engine(vlm, OftenCalls(), 1).run(Job(s, 6) for s in SAMPLES))
    for i, group in enumerate(groups):
        for r in group:
            assert [x.text for x in r.trajectory.replies] == [x.text for x in evaluated[i].replies]
            assert r.trajectory.usage.prefill == evaluated[i].usage.prefill


def test_a_forced_call_leads_to_the_answer_of_the_conversation_that_holds_it():
    vlm, sample = talker(), SAMPLES[0]
    call = "GET_CROPS: ['1', '6']"
    sampling, session = SamplingModel(vlm, 0.0), Session()
    policy = AwaRes()
    look = policy.turns(sample)
    one = next(look)
    (said,) = sampling.reply([Request(session, replace(one, forced_reply=call), 6)])
    step = look.send(said)
    two = step if isinstance(step, Turn) else next(look)
    (answer,) = sampling.reply([Request(session, two, 5)])
    assert said.text == call and one.images[0].size == half(sample.images[0]).size
    c = render(vlm, policy, sample, [call, "x"])
    start = c.replies[1][0]
    whole = pack([[c]], vlm.host)
    with torch.no_grad():
        embeds = vlm.host.decoder.get_input_embeddings()(whole.ids)
        here = (whole.ids == vlm.host.image_token)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(here, vlm.encode(whole.images))
        hidden = vlm.host.decoder(inputs_embeds=embeds, attention_mask=whole.mask, position_ids=whole.positions, use_cache=False)[
            0
        ]
        scores = vlm.host.model.lm_head(hidden[0, start - 1])
    scores[list(banned_tokens(vlm.host))] = float("-inf")
    assert answer.written[0] == scores.argmax() and abs(scores.log_softmax(-1).max() - answer.logprobs[0]) < 1e-4


def test_a_batch_may_hold_first_and_second_turns():
    vlm = talker()
    turns = Turn((picture(56, 56),), "q", is_final=False), Turn((picture(84, 56),), "and?")
    sampling, together, alone = SamplingModel(vlm, 1.0), Session(), Session()
    for session in (together, alone):
        sampling.reply([Request(session, turns[0], 4, conversation=1)])
    other = Request(Session(), Turn((picture(56, 84),), "other"), 4, conversation=2)
    (mixed, _), (single,) = (
        sampling.reply([Request(together, turns[1], 4, conversation=1), other]),
        sampling.reply([Request(alone, turns[1], 4, conversation=1)]),
    )
    assert mixed.written == single.written and mixed.logprobs == pytest.approx(single.logprobs, abs=1e-4)


def test_methods_that_ask_other_models_are_refused():
    sampling = SamplingModel(talker())
    with pytest.raises(RunError, match="rollouts know the trained model only"):
        sampling.reply([Request(Session(), Turn((picture(56, 56),), "q", model="cropper"), 2)])


def test_a_reply_put_into_the_models_mouth_is_fed_and_not_scored():
    class Put(AwaRes):
        def turns(self, sample):
            said = PAPER_GRID.format(("left",))
            yield Turn((half(sample.images[0]),), sample.question, is_final=False, forced_reply=said)
            return (yield Turn(tuple(PAPER_GRID.cut(sample.images[0], ("left",)))))

    vlm = talker()
    ((one, two),), _ = rollouts(vlm, Put(), SAMPLES[:1], 2, 6)
    said = vlm.tokenizer(PAPER_GRID.format(("left",)))["input_ids"]
    for r in (one, two):
        c = r.conversation
        assert sum(c.weights) == len(r.logprobs) == c.replies[1][1] - c.replies[1][0] and c.ids[slice(*c.replies[0])] == said
    packed = pack([[one.conversation, two.conversation]], vlm.host)
    with torch.no_grad():
        scores, _ = Scorer(vlm.host, banned_tokens(vlm.host))(packed, vlm.encode(packed.images))
    assert (scores - torch.tensor(one.logprobs + two.logprobs)).abs().max() < 1e-4
    fixed = render(vlm, Put(), SAMPLES[0], [one.trajectory.answer])
    assert fixed.ids[: fixed.replies[1][0]] == one.conversation.ids[: one.conversation.replies[1][0]]
