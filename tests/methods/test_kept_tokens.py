"""What a pruner lets through is told as its own indices, in masks of a bit a token, and drawn where the tokens are in the picture."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from awares_bench import api, card
from awares_bench.bench.pruner_bench import weights_of
from awares_bench.evaluation.records import Record
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.session import Request, Session
from awares_bench.methods import registry
from awares_bench.methods.conversation import Sample, Turn
from awares_bench.methods.kept_tokens import KeptTokens, mask, places
from awares_bench.reports.gallery import markup

from ..helpers.tiny import picture, tiny_vlm


def reply(pruner, *images, keep_masks=True):
    vlm = tiny_vlm()
    (answer,) = vlm.reply([Request(Session(), Turn(images, "what is it?"), 2, keep_masks=keep_masks)], pruner)
    return answer


def observed(pruner, seen):
    """The same pruner; ``seen`` gets the raster places that each call of ``reduce`` keeps, and which of them it altered."""
    kind = type(pruner)

    def reduce(self, image, n):
        features, chosen = kind.reduce(self, image, n)
        altered = (features != image.features[chosen]).any(1)
        seen.append((sorted(image.places[chosen].tolist()), sorted(image.places[chosen][altered].tolist())))
        return features, chosen

    return type(kind.__name__, (kind,), {"reduce": reduce, "__module__": kind.__module__})(**vars(pruner))


@pytest.mark.parametrize("cls", registry.pruner_classes(), ids=lambda c: c.__name__)
def test_the_told_tokens_are_the_pruners_own_indices_cut_by_cut(cls):
    seen = []
    answer = reply(observed(cls(retention=0.4, **weights_of(cls, 64)), seen), picture(170, 113), picture(84, 140, 1))
    layers = sorted({cut.layer for cut in answer.kept}, key=lambda layer: -1 if layer is None else layer)
    by_call = sorted(answer.kept, key=lambda cut: (layers.index(cut.layer), cut.image))
    assert [list(cut.kept) for cut in by_call] == [kept for kept, _ in seen]
    for image in (0, 1):  # an average stays one
        averages: set[int] = set()
        for cut, (kept, altered) in [pair for pair in zip(by_call, seen, strict=True) if pair[0].image == image]:
            averages = averages & set(kept) | set(altered)
            assert set(cut.merged) == averages
    assert {cut.image for cut in answer.kept} == {0, 1} and all(set(cut.merged) <= set(cut.kept) for cut in answer.kept)
    for image in (0, 1):  # a later cut keeps a part of what the one before left
        chain = [set(cut.kept) for cut in by_call if cut.image == image]
        assert all(later <= earlier for earlier, later in pairwise(chain))
    assert layers == [None] or None not in layers


def test_nothing_is_told_unless_asked_or_where_nothing_is_cut():
    cls = registry.method_class("divprune")
    assert reply(cls(retention=0.5), picture(84, 84), keep_masks=False).kept == ()
    assert reply(cls(retention=1), picture(84, 84)).kept == () and reply(None, picture(84, 84)).kept == ()


def test_a_batch_of_several_turns_tells_what_each_alone_does():
    built = registry.build("awares", {"pruner": "visionzip", "retention": 0.5})
    jobs = [Job(Sample((picture(120 + 30 * i, 150, i),), "what?", str(i)), 3) for i in range(4)]
    told = []
    for size in (1, 3):
        engine = Engine(tiny_vlm(), built.policy, size, built.pruner, keep_masks=True)
        told.append({i: [r.kept for r in outcome.replies] for i, outcome in engine.run(jobs)})
    assert told[0] == told[1] and all(turns[0] for turns in told[0].values())


def test_two_pruners_are_told_apart_by_where_they_cut():
    built = registry.build("visionzip+pyramiddrop", {"retention": 0.3})
    before, *inside = reply(built.pruner, picture(170, 113)).kept
    assert before.layer is None and before.merged and inside and all(cut.layer is not None for cut in inside)
    assert all(set(later.kept) <= set(earlier.kept) for earlier, later in pairwise([before, *inside]))


def test_masks_are_read_as_they_were_written():
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 4, 63, 64, 65, 1000):
        chosen = tuple(torch.rand(tokens, generator=generator).gt(0.5).nonzero().flatten().tolist())
        assert places(mask(chosen, tokens), tokens) == chosen and len(mask(chosen, tokens)) == -(-tokens // 4)
    assert mask((0, 3, 4), 6) == "98"
    cut = KeptTokens(1, 3, (2, 3), (100, 70), (0, 4), (4,))
    assert KeptTokens.from_dict(json.loads(json.dumps(cut.as_dict()))) == cut
    tile = replace(cut, run=2, runs=5)
    assert KeptTokens.from_dict(tile.as_dict()) == tile
    with pytest.raises(ValueError, match="a mask of 6 tokens has 2 digits; this one has 3"):
        places("980", 6)


@pytest.mark.parametrize("size", [(101, 67), (333, 85), (56, 200), (1000, 4)], ids=str)
def test_a_token_is_drawn_over_the_pixels_that_it_sees(size):
    """A patch of the picture is painted; the tokens whose pixels change are drawn clear, and the paint is under them and nowhere else."""
    vlm = tiny_vlm()
    width, height = size
    plain = Image.new("RGB", size, (200, 200, 200))
    painted = plain.copy()
    left, top = width // 2, height // 3
    painted.paste((10, 60, 250), (left, top, left + max(1, width // 9), top + max(1, height // 9)))
    (rows, columns), per_token = vlm.host.image_input(plain).runs[0], vlm.host.processor.image_processor.merge_size**2
    before, after = (vlm.host.image_input(image).inputs["pixel_values"] for image in (plain, painted))
    touched = (before != after).any(1).view(rows * columns, per_token).any(1)
    cut = KeptTokens(0, None, (rows, columns), vlm.host.accepted(plain)[0].size, tuple(touched.nonzero().flatten().tolist()))
    assert 0 < len(cut.kept) < rows * columns
    drawn = np.asarray(card.kept_overlay(painted, cut)).astype(int)
    blue = (drawn[..., 2] - drawn[..., 0]) > 60
    assert blue.any()  # all paint is under clear tokens: where it is dimmed it has no colour left
    scale = drawn.shape[1] / cut.size[0], drawn.shape[0] / cut.size[1]
    ys, xs = blue.nonzero()
    assert abs(xs.min() / scale[0] - left) <= 1 + 1 / scale[0] and abs(ys.min() / scale[1] - top) <= 1 + 1 / scale[1]
    assert abs(blue.sum() / (scale[0] * scale[1]) / (max(1, width // 9) * max(1, height // 9)) - 1) < 0.35 or min(size) < 9


def test_the_clear_part_of_the_overlay_has_the_share_of_the_kept_tokens():
    image = picture(230, 150, 3)
    cut = KeptTokens(0, None, (5, 8), image.size, tuple(range(0, 40, 3)), (3,))
    clear = np.asarray(card.kept_overlay(image, cut)) == np.asarray(card.enlarged(image))
    share = clear.all(2).mean()
    assert abs(share - len(cut.kept) / 40) < 0.03
    assert card.kept_words(cut) == "14 of 40 tokens go on before the decoder, 1 of them averages (dotted)"
    assert card.kept_words(replace(cut, layer=1, merged=(), run=1, runs=4), several=True) == (
        "picture 1, tile 2 of 4, 14 of 40 tokens go on after decoder layer 2"
    )


def test_cards_records_and_the_gallery_show_them():
    vlm = tiny_vlm()
    image = picture(120, 160)
    model = api.Model(vlm, {})
    answer = model.ask(image, "what is it?", "visionzip", retention=0.5, max_new_tokens=2)
    assert answer._repr_html_().count("tokens go on before the decoder") == 1
    assert "tokens go on" not in model.ask(image, "what is it?", "full", max_new_tokens=2)._repr_html_()
    built = registry.build("sparsevlm", {"retention": 0.5})
    engine = Engine(vlm, built.policy, 1, built.pruner, keep_masks=True)
    ((_, outcome),) = engine.run([Job(Sample((image,), "what is it?", "a"), 2)])
    record = Record.of(outcome, "t", 0, "test", "what is it?", 1, keep_masks=True)
    (cuts,) = json.loads(json.dumps(record.keep_masks))
    assert [cut["layer"] for cut in cuts] == [c.layer for c in outcome.replies[0].kept] and len(cuts) >= 1
    assert Record.of(outcome, "t", 0, "test", "what is it?", 1).keep_masks is None
    row = {"family": "sparsevlm", "score": 1.0, "rtr": 0.5, "called": False, "crops": "", "answer": "a", "task": "t", "doc_id": 0}
    texts = {"question": "q", "target": "a", "replies": ["a"], "usage": [], "events": [], "image_sizes": record.image_sizes}
    page = markup.card(image, [markup.Side("sparsevlm", row, texts | {"keep_masks": record.keep_masks})])
    assert page.count("tokens go on after decoder layer") == len(cuts)
