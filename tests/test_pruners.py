"""Every pruner in ``baselines``: the contract of ``awares_bench.method.Pruner``, on logits."""

from importlib import import_module
from importlib.resources import files

import pytest
import torch

from awares_bench.method import Pruner

from .test_vlm import TURNS, first, ours
from .tiny import tiny_vlm

TOLERANCE = 1e-4


def pruners() -> list[type[Pruner]]:
    """The pruner class of every file of the room that has one."""
    room = files("awares_bench.baselines").iterdir()
    modules = [
        import_module(f"awares_bench.baselines.{p.name[:-3]}") for p in room if p.name[0] != "_" and p.name.endswith(".py")
    ]
    found = [c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    return sorted((c for c in found if issubclass(c, Pruner)), key=lambda c: c.__name__)


EVERY = pytest.mark.parametrize("cls", pruners(), ids=lambda c: c.__name__)


def pruned(vlm, requests, pruner):
    vlm.trace = []
    try:
        replies = vlm.reply(requests, pruner)
        return replies, torch.stack(vlm.trace)
    finally:
        vlm.trace = None


@EVERY
def test_a_batch_has_the_logits_of_each_row_alone(cls):
    vlm, pruner = tiny_vlm(), cls(0.4)
    alone = [pruned(vlm, [first(t)], pruner) for t in TURNS]
    replies, logits = pruned(vlm, [first(t) for t in TURNS], pruner)
    for b, ((reply,), single) in enumerate(alone):
        assert replies[b].usage.prefill == pytest.approx(reply.usage.prefill)
        steps = len(reply.tokens)
        assert (logits[:steps, b] - single[:steps, 0]).abs().max() < TOLERANCE


@EVERY
def test_retention_1_has_the_bits_of_no_pruner(cls):
    vlm = tiny_vlm()
    _, plain = ours(vlm, [first(t) for t in TURNS])
    _, logits = pruned(vlm, [first(t) for t in TURNS], cls(1.0))
    assert torch.equal(plain, logits)
