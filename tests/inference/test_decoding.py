"""Greedy decoding as the checkpoint's generation_config.json asks for it, against transformers' own ``generate``."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from awares_bench.awares import AwaRes
from awares_bench.baselines.full import Full
from awares_bench.errors import CheckpointError
from awares_bench.inference.decoding import Repetition, own_penalty, penalised, penalty_of, unsupported
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Sample, Turn, chat_messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.models.families import host_of
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rollouts import banned_tokens, rollouts

from ..helpers.tiny import picture, tiny_copy, tiny_vlm

BOTH = pytest.mark.usefixtures("layout")


def penalising(penalty):
    vlm = copy.copy(tiny_vlm())
    vlm.repetition_penalty = penalty
    return vlm


def traced(vlm, requests):
    vlm.trace = []
    try:
        return vlm.reply(requests), torch.stack(vlm.trace)
    finally:
        vlm.trace = None


def generated(vlm, text, images, penalty, steps):
    inputs = vlm.host.processor(text=[text], images=images or None, return_tensors="pt")
    how = {"max_new_tokens": steps, "do_sample": False, "repetition_penalty": penalty}
    out = vlm.host.model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)
    return torch.stack(out.scores), out.sequences[0, inputs["input_ids"].shape[1] :].tolist()


def rendered(vlm, turns, replies):
    return vlm.host.processor.apply_chat_template(chat_messages(turns, replies), tokenize=False, add_generation_prompt=True)


QUESTIONS = [
    Turn((picture(224, 224),), "What is the value of the red bar?"),
    Turn((picture(112, 112, 2), picture(56, 140, 3)), "Compare the two."),
    Turn((), "No picture at all: what is two and two?"),
]


def test_the_penalty_is_that_of_transformers():
    scores, before = torch.randn(3, 50), torch.randint(0, 50, (3, 9))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(before, scores.clone())
    assert torch.equal(penalised(scores, before, 1.3), theirs) and not torch.equal(scores, theirs)


@BOTH
@pytest.mark.parametrize("penalty", [1.05, 1.5, 0.8])
@pytest.mark.parametrize("turn", QUESTIONS, ids=["one", "two-images", "text-only"])
def test_one_turn_has_the_scores_and_tokens_of_generate_under_a_penalty(turn, penalty):
    vlm = penalising(penalty)
    (reply,), ours = traced(vlm, [Request(Session(), turn, 24)])
    theirs, tokens = generated(vlm, rendered(vlm, [turn], []), list(turn.images), penalty, 24)
    assert (ours[: len(theirs), 0] - theirs[:, 0]).abs().max() < 1e-4
    assert list(reply.tokens) == [t for t in tokens if t not in vlm.host.stop]
    if penalty == 1.5:
        assert reply.tokens != tiny_vlm().reply([Request(Session(), turn, 24)])[0].tokens


@BOTH
def test_a_second_turn_is_penalised_for_what_the_first_showed_and_said():
    vlm, image = penalising(1.4), picture(280, 224, 5)
    session, one = Session(), Turn((half(image),), "What is the value of the red bar?", system=PAPER_GRID.prompt, is_final=False)
    words = vlm.tokenizer("the red bar", add_special_tokens=False)["input_ids"]  # random weights write what no text is made of
    (first,) = vlm.reply([Request(session, one, 8, forced_tokens=tuple(words))])
    two = Turn(tuple(PAPER_GRID.cut(image, ("top-left",))))
    (reply,), ours = traced(vlm, [Request(session, two, 12)])
    text = rendered(vlm, [one, two], [first.text])
    assert list(first.tokens) == words
    theirs, tokens = generated(vlm, text, [*one.images, *two.images], 1.4, 12)
    assert (ours[: len(theirs), 0] - theirs[:, 0]).abs().max() < 1e-4
    assert list(reply.tokens) == [t for t in tokens if t not in vlm.host.stop]


@BOTH
def test_rows_of_a_batch_are_penalised_for_their_own_tokens_and_by_their_own_penalty():
    vlm = penalising(1.3)
    lengths = (5, 30, 17)
    alone = [vlm.reply([Request(Session(), t, n)])[0].tokens for t, n in zip(QUESTIONS, lengths, strict=True)]
    together = vlm.reply([Request(Session(), t, n) for t, n in zip(QUESTIONS, lengths, strict=True)])
    assert [r.tokens for r in together] == alone
    plain = penalising(1.0)
    mixed = vlm.reply([Request(Session(), QUESTIONS[0], 30, penalty=1.0), Request(Session(), QUESTIONS[1], 30)])
    assert mixed[0].tokens == plain.reply([Request(Session(), QUESTIONS[0], 30)])[0].tokens
    assert mixed[1].tokens == alone[1]


def test_a_draft_is_penalised_token_by_token_and_what_does_not_stand_is_forgotten():
    torch.manual_seed(0)
    scores, seen, device = torch.randn(2, 3, 40), [[1, 2], [3]], torch.device("cpu")
    drafts = Repetition(seen, [1.5, 1.2], device)
    made = drafts.next(scores, [0, 1], [[7, 8, 9], [5]])  # the second row is padded on the left
    for j, before in enumerate(([1, 2, 7], [1, 2, 7, 8], [1, 2, 7, 8, 9])):
        assert torch.equal(made[0, j], RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([before]), scores[0, j][None])[0])
    assert torch.equal(made[1, 2], RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[3, 5]]), scores[1, 2][None])[0])
    drafts.keep([0, 1], [[7, 8, 9], [5]], [2, 1])
    again = drafts.next(scores[:, :1], [0, 1], [[9], [6]])
    assert torch.equal(again[0, 0], RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1, 2, 7, 8, 9]]), scores[0, :1])[0])
    assert torch.equal(again[1, 0], RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[3, 5, 6]]), scores[1, :1])[0])


def test_the_grammar_chooses_among_penalised_scores():
    turn = replace(QUESTIONS[0], crop_grammar=PAPER_GRID)
    vlm = penalising(1.2)
    ids = vlm.tokenizer("GET_CROPS", add_special_tokens=False)["input_ids"]
    forced = (*ids, *[0] * 3)
    (reply,), _ = traced(vlm, [Request(Session(), turn, 24, forced_tokens=forced)])
    assert reply.text.startswith("GET_CROPS")  # what is forced is not overruled by a penalty either


def test_a_penalty_out_of_range_is_a_sentence_and_the_checkpoints_own_is_the_default():
    for wrong in (0, -1, "much", True, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="repetition_penalty"):
            penalty_of(wrong)
    assert own_penalty(GenerationConfig()) == 1 and own_penalty(GenerationConfig(repetition_penalty=1.05)) == 1.05
    model, processor = tiny_copy().host.model, tiny_vlm().host.processor
    model.generation_config.repetition_penalty = 1.05
    assert LocalModel(host_of(model, processor)).repetition_penalty == 1.05
    assert LocalModel(host_of(model, processor), repetition_penalty=1).repetition_penalty == 1


@pytest.mark.parametrize(
    "asked",
    [{"no_repeat_ngram_size": 3}, {"num_beams": 4}, {"suppress_tokens": [5]}, {"min_new_tokens": 2}, {"bad_words_ids": [[7]]}],
)
def test_a_setting_that_would_change_answers_is_refused(asked):
    config = GenerationConfig(**asked)
    assert unsupported(config) == [f"{k}={v!r}" for k, v in asked.items()]
    model = tiny_copy().host.model
    model.generation_config = config
    with pytest.raises(CheckpointError, match=next(iter(asked))):
        LocalModel(tiny_vlm().host.on(model))


def test_sampling_settings_of_a_release_are_no_reason_to_refuse():
    released = GenerationConfig(do_sample=True, temperature=1e-6, top_p=0.8, top_k=20, repetition_penalty=1.05, num_beams=1)
    assert unsupported(released) == [] and unsupported(GenerationConfig()) == []


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_that_documents_failure(value):
    vlm = tiny_copy()
    odd = vlm.tokenizer("star", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        vlm.host.model.get_input_embeddings().weight[odd] = value
        vlm.host.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(vlm.host.model.lm_head.weight) * 0.1)
    images = [picture(112, 112, i) for i in range(3)]
    jobs = [Job(Sample((i,), q, str(n)), 6) for n, (i, q) in enumerate(zip(images, ("bar", "star", "value"), strict=True))]
    out = dict(Engine(vlm, Full(), 3).run(jobs))
    assert isinstance(out[1], Failure) and "float32" in out[1].error and ("nan" in out[1].error or "inf" in out[1].error)
    assert [isinstance(out[i], Failure) for i in (0, 2)] == [False, False]


# ------------------------------------------------------------------ texts around pictures


def test_texts_and_pictures_keep_their_order_and_spacing():
    from awares_bench.evaluation.lmms_model import job_of

    a, b = picture(56, 56), picture(84, 56)
    content = [("text", "Compare"), ("image", a), ("text", "and"), ("image", b), ("text", "now.\nA. yes")]
    talk = [{"role": "user", "content": [{"type": k, "text" if k == "text" else "url": v} for k, v in content]}]
    sample = job_of(talk, {}, "mmmu/1").sample
    assert sample.question == "Compare and now.\nA. yes" and sample.parts == ("Compare", "and", "now.\nA. yes")
    vlm = tiny_vlm()
    theirs = [{"role": "user", "content": [{"type": k, k: v} for k, v in content]}]
    expected = vlm.host.processor.apply_chat_template(theirs, tokenize=False, add_generation_prompt=True)
    for policy, images in ((Full(), (a, b)), (AwaRes(), (a, b))):
        look = policy.turns(sample)
        turn = next(look)
        while not isinstance(turn, Turn):
            turn = next(look)
        assert rendered(vlm, [turn], []) == expected and turn.images == images


def test_text_before_the_only_picture_stays_before_it_in_every_view():
    from awares_bench.evaluation.lmms_model import job_of

    image = picture(224, 224)
    content = [{"type": "text", "text": "Look: "}, {"type": "image", "url": image}, {"type": "text", "text": " What is it?"}]
    sample = job_of([{"role": "user", "content": content}], {}, "x").sample
    turn = next(AwaRes().turns(sample))
    assert rendered(tiny_vlm(), [turn], []).count("Look: <|vision_start|>") == 1
    assert sample.ask((image, image)).image_prefixes == ("Look: ",) and sample.ask((image, image)).text == " What is it?"


@pytest.mark.parametrize(
    "until, expected",
    [
        (["\n\n"], ()),
        (["\n\n", "</s>"], ("</s>",)),
        ("\n\n", ()),
        ("STOP", ("STOP",)),
        ([], ()),
        (None, ()),
        (["", "\n"], ("\n",)),
    ],
)
def test_a_blank_line_is_no_stop_and_other_stops_are(until, expected):
    from awares_bench.evaluation.lmms_model import job_of

    talk = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    assert job_of(talk, {"until": until}, "x").until == expected


# ------------------------------------------------------------------ training under a penalty


def test_sampled_tokens_score_as_they_were_sampled():
    vlm = penalising(1.3)
    samples = [Sample((picture(224, 168, i),), f"What is the value of bar {i}?", str(i)) for i in range(2)]
    with torch.no_grad():
        made, _ = rollouts(vlm, AwaRes(), samples, 3, 10, seed="1")
        groups = [[r.conversation for r in g] for g in made]
        scorer = Scorer(vlm.host, banned_tokens(vlm.host), penalty=1.3)
        packed = pack(groups, vlm.host, followed=True)
        scores, _ = scorer(packed, vlm.encode(packed.images))
        plain, _ = Scorer(vlm.host, banned_tokens(vlm.host))(packed, vlm.encode(packed.images))
    sampled = torch.tensor([x for g in made for r in g for x in r.logprobs])
    assert (scores - sampled).abs().max() < 1e-4
    assert (plain - sampled).abs().max() > 1e-2


def test_a_greedy_rollout_writes_what_the_engine_writes_under_a_penalty():
    vlm = penalising(1.3)
    vlm.constrained = False
    sample = Sample((picture(224, 168),), "What is the value of the red bar?", "0")
    made, _ = rollouts(vlm, Full(), [sample], 2, 16, temperature=0.0)
    out = dict(Engine(vlm, Full()).run([Job(sample, 16)]))[0]
    assert {r.trajectory.answer for r in made[0]} == {out.answer}


def test_a_recipe_takes_the_starts_penalty_unless_it_sets_one():
    from awares_bench.training import grpo
    from awares_bench.training.recipe import RecipeError, check

    base = {"start": "nano-sft", "data": "x", "out": "y"}
    assert check(grpo.GRPO, base).repetition_penalty is None
    assert check(grpo.GRPO, base | {"repetition_penalty": 1}).repetition_penalty == 1.0
    with pytest.raises(RecipeError, match="above 0"):
        check(grpo.GRPO, base | {"repetition_penalty": 0})


@BOTH
def test_a_replys_log_probability_is_that_of_a_forward_pass_over_it():
    vlm = tiny_vlm()
    requests = [Request(Session(), turn, n) for turn, n in zip(QUESTIONS, (4, 6, 3), strict=True)]
    replies, scores = traced(vlm, requests)
    for b, reply in enumerate(replies):
        known = scores[: len(reply.tokens) + bool(reply.complete), b].float().log_softmax(-1)
        ends = [int(known[-1].argmax())] if reply.complete else []
        wanted = sum(known[i, token].item() for i, token in enumerate([*reply.tokens, *ends]))
        assert reply.logprob == pytest.approx(wanted, abs=1e-4) and reply.logprob < 0
    (forced,) = vlm.reply([Request(Session(), replace(QUESTIONS[0], forced_reply="no"), 3)])
    assert forced.logprob is None
