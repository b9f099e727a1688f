"""Packed scoring against conversations one by one: log-probabilities, loss and gradients; and against transformers' own forward."""

import pytest
import torch

from awares_bench.awares import AwaRes
from awares_bench.inference.image_features import FeatureStore
from awares_bench.inference.session import Session
from awares_bench.methods.conversation import Sample, Turn
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rendering import Conversation, render

from ..helpers.tiny import chunk_ids, picture, tiny_copy, tiny_vlm

REPLIES = (
    ["42"],
    ["GET_CROPS: ['1', '6']", "left"],
    ["GET_CROPS: ['3']", "GET"],
    ["yes, it is"],
    ["GET_CROPS: ['1', '6']", "right"],  # the same call again, and the same answer
    ["42"],
)


def group(seed: int, size=(224, 168)) -> list[Conversation]:
    sample = Sample((picture(*size, seed),), f"What is it, number {seed}?", str(seed))
    return [render(tiny_vlm(), AwaRes(), sample, replies, 5.0) for replies in REPLIES]


def loss_and_gradients(scorer, batches, features):
    scorer.zero_grad()
    total = 0.0
    for packed in batches:
        scores, _ = scorer(packed, features(packed.images))
        loss = -(scores * packed.weight * (1 + packed.conversation_index % len(REPLIES))).sum()
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


def test_a_packed_group_has_the_loss_and_gradients_of_its_conversations_one_by_one():
    vlm = tiny_copy()
    scorer = Scorer(vlm.host).requires_grad_(False)
    vlm.host.decoder.requires_grad_(True)
    groups = [group(1), group(2, (112, 300))]
    together = pack(groups, vlm.host)
    alone = [pack([[c]], vlm.host) for g in groups for c in g]
    for i, p in enumerate(alone):
        p.conversation_index += i
    with torch.no_grad():
        one_by_one = torch.cat([scorer(p, vlm.encode(p.images))[0] for p in alone])
        assert (scorer(together, vlm.encode(together.images))[0] - one_by_one).abs().max() < 1e-4
    vlm.features = FeatureStore(2**24)
    vlm.encode([v for p in (together, *alone) for v in p.images])  # the tower stays in float32

    def double(images):
        return vlm.encode(images).double()

    loss, gradients = loss_and_gradients(scorer.double(), [together], double)
    expected, reference = loss_and_gradients(scorer, alone, double)
    assert abs(loss - expected) / abs(expected) < 1e-6
    assert (gradients - reference).norm() / reference.norm() < 1e-6
    one, many = together.tokens, sum(p.tokens for p in alone)
    print(f"tokens pushed: packed {one}, one by one {many}")
    assert one < 0.4 * many
    once = pack([[c for i, c in enumerate(g) if i not in (4, 5)] for g in groups], vlm.host)
    right = len(vlm.tokenizer("right")["input_ids"]) + 1
    assert one == once.tokens + 2 * right  # what is equal goes through once


def test_different_questions_packed_into_a_row_share_what_they_begin_with_and_nothing_else():
    vlm = tiny_vlm()
    scorer = Scorer(vlm.host)
    mixed = [c for pair in zip(group(1), group(2, (112, 300)), strict=True) for c in pair]
    together, alone = pack([mixed], vlm.host), [pack([[c]], vlm.host) for c in mixed]
    with torch.no_grad():
        one_by_one = torch.cat([scorer(p, vlm.encode(p.images))[0] for p in alone])
        assert (scorer(together, vlm.encode(together.images))[0] - one_by_one).abs().max() < 1e-4
    both = sum(pack([group(*g)], vlm.host).tokens for g in ((1,), (2, (112, 300))))
    assert both - together.tokens == mixed[0].ids.index(vlm.host.image_token)  # once in place of twice


def test_rows_side_by_side_are_the_rows_alone_and_those_of_transformers():
    vlm = tiny_vlm()
    scorer = Scorer(vlm.host)
    conversations = group(3)
    batch = pack([[c] for c in conversations], vlm.host)
    assert batch.mask.ndim == 2
    with torch.no_grad():
        scores, _ = scorer(batch, vlm.encode(batch.images))
        for i, c in enumerate(conversations):
            ids = torch.tensor([c.ids])
            logits = vlm.host.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.cat([v.inputs["pixel_values"] for v in c.images]),
                image_grid_thw=torch.cat([v.inputs["image_grid_thw"] for v in c.images]),
                mm_token_type_ids=(ids == vlm.host.image_token).int(),
            ).logits[0]
            at = torch.tensor([k for k, w in enumerate(c.weights) if w])
            theirs = logits.log_softmax(-1)[at - 1, ids[0, at]]
            assert (scores[batch.conversation_index == i] - theirs).abs().max() < 1e-4


def test_a_rendered_conversation_is_what_the_engine_feeds():
    vlm, image = tiny_vlm(), picture(224, 224)
    c = render(vlm, AwaRes(), Sample((image,), "What is it?", "k"), ["GET_CROPS: ['1', '6']", "42"], 5.0)
    one = Turn((half(image),), "What is it?", system=PAPER_GRID.prompt, is_final=False)
    two = Turn(tuple(PAPER_GRID.cut(image, ("top-right", "bottom"))))
    head, call = chunk_ids(vlm, Session(), one), vlm.tokenizer("GET_CROPS: ['1', '6']")["input_ids"]
    tail = chunk_ids(vlm, Session(turns=[one], replies=["GET_CROPS: ['1', '6']"]), two)
    assert c.ids == head + call + tail + vlm.tokenizer("42")["input_ids"] + [vlm.tokenizer.eos_token_id]
    said = [(vlm.tokenizer.decode(c.ids[s:e]), set(c.weights[s:e])) for s, e in c.replies]
    assert said == [("GET_CROPS: ['1', '6']<|im_end|>", {5.0}), ("42<|im_end|>", {1.0})]
    assert sum(c.weights) == 5 * (len(call) + 1) + len(vlm.tokenizer("42")["input_ids"]) + 1 and c.prompt == len(head)


def test_replies_that_do_not_fit_the_policy_are_refused():
    sample = Sample((picture(112, 112),), "q", "k")
    with pytest.raises(ValueError, match="the policy ends after 1"):
        render(tiny_vlm(), AwaRes(), sample, ["42", "43"])
    with pytest.raises(ValueError, match="asks for more"):
        render(tiny_vlm(), AwaRes(), sample, ["GET_CROPS: ['3']"])
    with pytest.raises(ValueError, match="max_length allows 20"):
        render(tiny_vlm(), AwaRes(), sample, ["42"], max_length=20)


def test_features_are_encoded_once_and_the_oldest_leave(monkeypatch):
    vlm, encoded = tiny_copy(), []
    plain = vlm.host.encode
    monkeypatch.setattr(vlm.host, "encode", lambda images, *more: encoded.append(len(images)) or plain(images, *more))
    vlm.features = FeatureStore(2**20)
    images = [vlm.image_input(picture(112, 112, s)) for s in range(3)]
    first = vlm.encode([images[0], images[1], images[0]])
    assert sum(encoded) == 2 and torch.equal(first[:16], first[32:])
    again = vlm.encode([vlm.image_input(picture(112, 112, 1))])
    assert torch.equal(again, first[16:32]) and sum(encoded) == 2
    vlm.features = FeatureStore(1)  # room for none: equal pictures of one call are still encoded once
    assert torch.allclose(vlm.encode([images[0], images[1], images[0]]), first, atol=1e-6) and sum(encoded) == 4
    vlm.encode([images[0]])
    assert sum(encoded) == 5
