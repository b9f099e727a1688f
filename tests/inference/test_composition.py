"""Two pruners at once: built by name, counted together, and each what it is alone."""

import pytest
import torch

from awares_bench.bench.synthetic_models import random_scorer
from awares_bench.inference.engine import Engine
from awares_bench.methods import registry
from awares_bench.methods.composition import ComposedPruner
from awares_bench.methods.pruner import Pruner
from awares_bench.methods.usage import Usage

from ..baselines.test_pruners import TOLERANCE, TURNS, check_batch, check_cut_cache, first, pruned
from ..baselines.test_registry import SAMPLES, run
from ..helpers.tiny import tiny_vlm

INSIDE = ("dart", "fastv", "pyramiddrop", "random_deep", "sparsevlm")


def composed(name: str, **options) -> ComposedPruner:
    made = registry.build(name, options).pruner
    assert isinstance(made, ComposedPruner)
    return made


def test_a_composition_is_built_by_any_order_of_names_and_told_apart_by_its_label():
    made = registry.build("full", {"pruner": "pyramiddrop+visionzip", "retention": 0.25})
    assert made.parts == ("full", "visionzip+pyramiddrop") and made.label == "visionzip+pyramiddrop retention=0.25"
    assert made == registry.build("visionzip+pyramiddrop", {"retention": 0.25})
    assert made.fields["retention"] == 0.25 and made.fields["visionzip.retention"] == made.fields["pyramiddrop.retention"] == 0.5
    assert {"policy", "visionzip", "pyramiddrop"} == {"policy", *made.members} - {"full"}
    three = registry.build("awares+visionzip+fastv", {"retention": 0.36, "fastv.layer": 3, "prompt": "adapter"})
    assert three == registry.build("awares", {"pruner": "visionzip+fastv", "retention": 0.36, "layer": 3, "prompt": "adapter"})
    assert three.label == "awares+visionzip+fastv prompt=adapter retention=0.36 fastv.layer=3"
    both = registry.build("holov+sparsevlm", {"compat": "official", "holov.compat": "fixed"})
    assert (both.fields["holov.compat"], both.fields["sparsevlm.compat"]) == ("fixed", "official")


@pytest.mark.parametrize(
    ("given", "before", "inside", "total"),
    [
        ({}, 0.5**0.5, 0.5**0.5, 0.5),
        ({"retention": 0.09}, 0.3, 0.3, 0.09),
        ({"visionzip.retention": 0.4}, 0.4, 0.5, 0.2),
        ({"retention": 0.1, "fastv.retention": 0.2}, 0.5, 0.2, 0.1),
        ({"visionzip.retention": 0.4, "fastv.retention": 0.6}, 0.4, 0.6, 0.24),
        ({"retention": 1}, 1, 1, 1),
    ],
)
def test_the_retention_is_that_of_both_together(given, before, inside, total):
    made = composed("visionzip+fastv", **given)
    assert (made.before.retention, made.inside.retention, made.retention) == pytest.approx((before, inside, total))


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("visionzip+divprune", {}, "visionzip and divprune both cut before the decoder; compose one that cuts before it"),
        ("fastv+dart", {}, "fastv and dart both cut inside the decoder"),
        ("visionzip+divprune+fastv", {}, "one policy and at most two pruners"),
        ("awares+low", {}, "one policy and at most two pruners"),
        ("visionzip+pyramidrop", {}, "Did you mean pyramiddrop"),
        ("visionzip+fastv", {"fastv.laier": 3}, "unknown option 'fastv.laier'. Did you mean 'fastv.layer'"),
        (
            "visionzip+fastv",
            {"retention": 0.5, "fastv.retention": 0.2},
            "fastv.retention is 0.2, less than the retention of both, 0.5",
        ),
        ("visionzip+fastv", {"retention": 0.5, "fastv.retention": 0.7, "visionzip.retention": 0.7}, "leave one of the three out"),
        ("visionzip+fastv", {"retention": 0}, "retention is 0; it must be a number above 0"),
        ("visionzip", {"visionzip.retention": 0.5}, "unknown option 'visionzip.retention'"),
        ("low", {"pruner": "visionzip+low"}, "low is not a pruner"),
    ],
)
def test_what_cannot_be_composed_says_what_can(name, given, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.").replace("?", r"\?")):
        registry.build(name, given)


@pytest.mark.parametrize("inside", INSIDE)
def test_the_usage_counts_both(inside):
    """An image of 64 tokens: what enters each layer of the decoder, from the two rules of counting."""
    vlm, made = tiny_vlm(), composed(f"visionzip+{inside}", retention=0.36)
    layers, entering = len(vlm.host.decoder.layers), [made.before.tokens_to_keep(64, made.before.retention)]
    left, cuts = entering[0], made.inside.cut_layers(layers)
    for layer in range(layers - 1):
        entering.append(made.inside.tokens_to_keep(left, cuts[layer]) if layer in cuts else entering[-1])
    (reply,), _ = pruned(vlm, [first(TURNS[0])], made)
    assert reply.usage.prefill == pytest.approx(sum(entering) / layers)
    if inside in ("pyramiddrop", "sparsevlm"):  # their retention is the mean over the layers
        assert reply.usage.prefill / 64 == pytest.approx(0.36, abs=2 / 64)


@pytest.mark.parametrize("name", ["visionzip+pyramiddrop", "apet+dart", "holov+sparsevlm"])
def test_batches_and_second_turns_have_the_logits_of_each_row_alone(name):
    check_batch(composed(name, retention=0.4))


@pytest.mark.parametrize(
    "name", ["divprune+pyramiddrop", "random_tokens+random_deep", "scope+fastv", "mmtok+dart", "vispruner+dart"]
)
def test_a_second_turn_is_what_a_mask_over_the_whole_conversation_gives(name):
    check_cut_cache(composed(name, retention=0.4))


def test_a_part_that_keeps_everything_is_left_out():
    vlm = tiny_vlm()
    for own, alone in (("visionzip", "visionzip"), ("pyramiddrop", "pyramiddrop")):
        other = {"visionzip": "pyramiddrop", "pyramiddrop": "visionzip"}[own]
        made = composed("visionzip+pyramiddrop", **{f"{own}.retention": 0.4, f"{other}.retention": 1.0})
        _, both = pruned(vlm, [first(t) for t in TURNS], made)
        _, one = pruned(vlm, [first(t) for t in TURNS], registry.build(alone, {"retention": 0.4}).pruner)
        assert torch.equal(both.nan_to_num(), one.nan_to_num())


def test_a_policy_and_two_pruners_run_and_are_counted():
    method = registry.build("all_crops", {"pruner": "visionzip+pyramiddrop", "retention": 0.25})
    together, batched = run(method, 3, SAMPLES[:3])
    alone, single = run(method, 1, SAMPLES[:3])
    for a, b in zip(alone, together, strict=True):
        assert [r.usage.prefill for r in a.replies] == [r.usage.prefill for r in b.replies]
        assert sum((r.usage for r in a.replies), Usage()).prefill <= 0.3 * sum((r.usage for r in a.replies), Usage()).encoded
    assert max((single.logits[k] - batched.logits[k]).abs().max() for k in single.logits) < TOLERANCE


def test_what_a_part_needs_is_refused_for_both():
    with pytest.raises(ValueError, match="visionselector needs scorer=FILE"):
        Engine(tiny_vlm(), registry.build("full", {}).policy, pruner=composed("visionselector+fastv"))
    with pytest.raises(ValueError, match="reads 12 numbers a token, and this model's tokens have 64"):
        Engine(
            tiny_vlm(), registry.build("full", {}).policy, pruner=composed("visionselector+fastv", scorer=str(random_scorer(12)))
        )


def test_every_pruner_of_this_package_is_on_one_of_the_two_sides():
    inside = {
        name for name in registry.own_names() if issubclass(cls := registry.method_class(name), Pruner) and cls().cut_layers(28)
    }
    assert inside == set(INSIDE)
