"""The layout for GPUs, on a CPU: its kernel's contract beside PyTorch's own attention, which kernels are believed, and steps that are
recorded once, by a tracer in the place of a CUDA graph."""

import sys
import types
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from awares_bench.inference import varlen_attention, varlen_batch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.ragged_batch import RaggedBatch
from awares_bench.inference.session import Request, Session
from awares_bench.inference.token_choice import Sampling
from awares_bench.inference.varlen_attention import first_right, kernel_for, kernels, reference, trial
from awares_bench.inference.varlen_batch import PLAIN_STEPS, VarlenBatch
from awares_bench.methods.conversation import Turn
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half

from ..helpers.tiny import picture, tiny_copy, tiny_vlm

TOLERANCE = 2e-5
CPU = torch.device("cpu")
HEADS = (6, 2, 16)


@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 16), (8, 1, 4)], ids=["equal", "shared", "one"])
def test_the_contract_is_pytorchs_attention_row_by_row(heads):
    """A second turn's queries are fewer than its keys: the last query sees all of them."""
    h, g, width = heads
    new, every = [7, 1, 3, 5], [7, 9, 3, 12]
    q, k, v = torch.randn(sum(new), h, width), torch.randn(sum(every), g, width), torch.randn(sum(every), g, width)
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (new, every))
    ours = reference(q, k, v, ends_q, ends_k, 7, 12)
    at, places = 0, zip(q.split(new), k.split(every), v.split(every), strict=True)
    for one, keys, values in places:
        n, m = len(one), len(keys)
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        rows = (t.transpose(0, 1)[None] for t in (one, keys, values))
        wanted = scaled_dot_product_attention(*rows, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
        assert (ours[at : at + n] - wanted).abs().max() < 1e-6
        at += n


def first_aligned(q, k, v, ends_q, ends_k, *longest):
    """Wrong: the first query, not the last, is held against the keys' end."""
    out = []
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        rows = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
        out.append(scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def mixed_heads(q, k, v, *lengths):
    """Wrong: query heads take turns over the key heads in place of sharing them by neighbours."""
    shared = q.shape[1] // k.shape[1]
    return reference(q, k.repeat(1, shared, 1), v.repeat(1, shared, 1), *lengths)


def refuses(*_):
    raise RuntimeError("Expected query and key to have the same number of heads\nand more")


def test_wrong_kernels_are_seen_and_the_first_right_one_is_taken():
    assert trial(reference, CPU, torch.float32, *HEADS) == 0
    for wrong in (first_aligned, mixed_heads):
        assert trial(wrong, CPU, torch.bfloat16, *HEADS) > 0.1
    one_more = lambda q, k, v, a, b, *n: reference(q, k, v, a, b - (b == b[-1]).int(), *n)  # noqa: E731  # a key too few
    assert trial(one_more, CPU, torch.bfloat16, *HEADS) > varlen_attention.AGREES[torch.bfloat16]
    found = [("wrong", first_aligned), ("refuses", refuses), ("right", reference), ("late", reference)]
    assert first_right(found, CPU, torch.bfloat16, *HEADS) == ("right", reference)
    with pytest.warns(UserWarning, match="rows are padded: .*wrong differs from the reference by .*; refuses: Expected query"):
        assert first_right(found[:2], CPU, torch.bfloat16, *HEADS) is None
    with pytest.warns(UserWarning, match="older than 2.10"):
        assert first_right([], CPU, torch.bfloat16, *HEADS) is None


def test_no_kernel_is_looked_for_where_none_can_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_for(CPU, torch.bfloat16, *HEADS) is None
        assert kernel_for(torch.device("cuda"), torch.float32, *HEADS) is None  # float32 has no such kernel anywhere


def kept_apart(function):
    """``varlen_attn`` of a release, as far as its words go; it does not know shared heads unless told."""

    def run(q, k, v, cu_q, cu_k, max_q, max_k, causal, shared):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and (max_q, max_k) == (70, 140) and causal
        if not shared and q.shape[1] != k.shape[1]:
            raise ValueError("Try setting enable_gqa=True for GQA.")
        return reference(q, k, v, cu_q, cu_k, max_q, max_k)

    return function(run)


RELEASES = {
    "2.10": lambda run: (
        lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None: run(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, False
        )
    ),
    "2.11": lambda run: (
        lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1): run(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), False
        )
    ),
    "2.14": lambda run: (
        lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, seqused_k=None: (
            run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), enable_gqa)
        )
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_words_of_every_release_are_known(release, monkeypatch):
    module = types.ModuleType("varlen")
    module.varlen_attn = kept_apart(RELEASES[release])
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    name, _ = first_right(kernels(), CPU, torch.bfloat16, *HEADS)
    # where shared heads have no word and are refused, keys are repeated
    assert name == "torch.nn.attention.varlen" + ("" if release == "2.14" else ", keys repeated for every head")


def test_the_flash_attention_package_is_the_last_resort(monkeypatch):
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False):
        assert causal
        return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert first_right(kernels(), CPU, torch.bfloat16, *HEADS)[0] == "flash_attn"


def test_the_installed_kernel_takes_our_words():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="PyTorch before 2.10")
    from inspect import signature

    name, kernel = next(iter(kernels()))
    signature(varlen.varlen_attn).bind(*range(7), **kernel.keywords)
    assert name == "torch.nn.attention.varlen"


# ---------------------------------------------------------------------- batches


def asked(n: int, budget: int, final: bool = True) -> list[Request]:
    """Conversations of different sizes, whose replies are as long as their budgets."""
    turns = [Turn((picture(112 + 28 * i, 84, i),), "Which one?" * (1 + i % 3), is_final=final) for i in range(n)]
    return [Request(Session(), t, budget + i) for i, t in enumerate(turns)]


def traced(vlm: LocalModel, layout, requests: list[Request]) -> torch.Tensor:
    """Scores (steps, B, vocabulary), NaN after a reply's end."""
    vlm.layout, vlm.trace = layout, []
    try:
        vlm.reply(requests)
        return torch.stack(vlm.trace)
    finally:
        vlm.layout = vlm.trace = None


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() < TOLERANCE)[~b.isnan()].all()) and torch.equal(a.isnan(), b.isnan())


class Traced:
    """Records as a CUDA graph does, by PyTorch's tracer: only its operations run again, on the memory that they ran on."""

    made = 0

    def __init__(self, function, inputs):
        Traced.made += 1
        self.inputs = [t.clone() for t in inputs]
        self.run = make_fx(function)(*self.inputs)

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.run(*self.inputs)


class Recorded(VarlenBatch):
    graphs, recorder = True, Traced


@pytest.mark.parametrize(
    ("layout", "few"),
    [
        pytest.param(VarlenBatch, 0, marks=pytest.mark.slow, id="fused"),
        pytest.param(VarlenBatch, 32, marks=pytest.mark.slow, id="products"),
        pytest.param(Recorded, 0, id="recorded"),
    ],
)
def test_replies_that_outgrow_their_room_and_rows_that_leave_change_nothing(layout, few, monkeypatch):
    """The block moves: rows end at different steps, so that half of them leave twice, and the longest outgrows its room."""
    vlm, moves = tiny_vlm(), []
    lengths, move = [3, 24, 5, 8], layout.move
    monkeypatch.setattr(varlen_batch, "ROOM", 8)
    monkeypatch.setattr(varlen_batch, "FEW", few)
    monkeypatch.setattr(
        layout, "move", lambda self, slots, room: (moves.append((len(slots), room > self.room)), move(self, slots, room))
    )

    def requests():
        made = asked(4, 0)
        return [
            Request(r.session, r.turn, n + 1, forced_tokens=tuple(20 + j % 7 for j in range(n)))
            for r, n in zip(made, lengths, strict=True)
        ]

    Traced.made = 0
    assert close(traced(vlm, layout, requests()), traced(vlm, PaddedBatch, requests()))
    assert {(2, False), (1, False), (1, True)} <= set(moves)
    assert Traced.made == (3 if layout is Recorded else 0), moves


def test_a_recorded_step_is_replayed_and_not_run_again(monkeypatch):
    calls = []
    advance = VarlenBatch.advance
    monkeypatch.setattr(VarlenBatch, "advance", lambda self, *a, **k: (calls.append(k), advance(self, *a, **k))[1])
    vlm, forced = tiny_vlm(), tuple(range(20, 36))
    (one,) = asked(1, 0)
    traced(vlm, Recorded, [Request(one.session, one.turn, 20, forced_tokens=forced)])
    assert len(calls) == PLAIN_STEPS + 1 and "longest" in calls[-1]  # the last was the recording


def test_a_recording_that_fails_is_said_and_decoding_goes_on():
    class Fails(VarlenBatch):
        graphs = True

        def recorder(*_):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    vlm, (one, same) = tiny_vlm(), asked(1, 12) + asked(1, 12)
    with pytest.warns(UserWarning, match="without a CUDA graph: CUDA error: operation not permitted") as said:
        found = traced(vlm, Fails, [one])
    assert len(said) == 1 and Fails.graphs is False and VarlenBatch.graphs is None  # it is not tried again
    assert close(found, traced(vlm, PaddedBatch, [same]))


def test_hooks_see_every_step():
    vlm, seen = tiny_copy(), []
    hook = vlm.host.decoder.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    (one,) = asked(1, 12)
    scores = traced(vlm, Recorded, [one])
    hook.remove()
    assert len(seen) == len(scores)


@pytest.mark.parametrize("then", [VarlenBatch, RaggedBatch, PaddedBatch])
def test_conversations_go_on_in_another_layout(then):
    vlm, image = tiny_vlm(), picture(280, 224, 5)
    one = Turn((half(image),), "What is the value of the red bar?", system=PAPER_GRID.prompt, is_final=False)
    other = Turn((picture(112, 112),), "q?", is_final=False)
    second = Turn(tuple(PAPER_GRID.cut(image, ("top-left",))), is_final=False)
    third = Turn((picture(56, 84),))

    def talk(first, later):
        sessions = [Session(), Session(), Session()]
        out = [traced(vlm, first, [Request(s, t, 4) for s, t in zip(sessions, (one, other, one), strict=True)])]
        # a batch of other rows in another order, one of them new
        fresh = Request(Session(), other, 3)
        out.append(traced(vlm, later, [Request(sessions[2], second, 4), fresh, Request(sessions[0], second, 4)]))
        out.append(traced(vlm, first, [Request(sessions[0], third, 4), Request(sessions[2], third, 2)]))
        return out

    for found, wanted in zip(talk(VarlenBatch, then), talk(PaddedBatch, PaddedBatch), strict=True):
        assert close(found, wanted)


def test_a_session_keeps_its_own_tokens_and_no_more_of_the_block():
    vlm, requests = tiny_vlm(), asked(3, 4, final=False)
    traced(vlm, VarlenBatch, requests)
    for r in requests:
        for kept in (*r.session.keys, *r.session.values):
            assert kept.untyped_storage().nbytes() <= 2 * kept.numel() * kept.element_size() and kept.shape[1] == r.session.length


@pytest.mark.slow
def test_sampled_replies_share_prefills_and_are_those_of_the_other_layout():
    vlm = tiny_vlm()

    def sampled(layout):
        vlm.layout = layout
        try:
            turns = [Turn((picture(112, 84),), "Which?", is_final=False), Turn((picture(84, 84),), "Which?", is_final=False)]
            sessions = [Session() for _ in range(6)]
            requests = [Request(s, turns[i % 2], 9, conversation=i) for i, s in enumerate(sessions)]
            one = vlm.reply(requests, None, Sampling(seed="3"), [str(i) for i in range(6)])
            again = [Request(s, Turn((picture(56, 56),)), 5, conversation=i) for i, s in enumerate(sessions)]
            two = vlm.reply(again, None, Sampling(seed="3"), [str(i) for i in range(6)])
            return [*one, *two]
        finally:
            vlm.layout = None

    for a, b, c in zip(*map(sampled, (VarlenBatch, Recorded, RaggedBatch)), strict=True):
        assert a.written == b.written == c.written and a.prefilled == c.prefilled
        for found in (a, b):
            assert max(abs(x - y) for x, y in zip(found.logprobs, c.logprobs, strict=True)) < TOLERANCE


def test_the_layout_follows_the_device_and_what_runs_on_it(monkeypatch):
    vlm = tiny_copy()
    assert vlm.own_layout() is RaggedBatch
    monkeypatch.setattr(type(vlm.host), "device", torch.device("cuda"))
    found: dict = {"kernel": ("a kernel", reference)}
    monkeypatch.setattr("awares_bench.inference.local_model.kernel_for", lambda *heads: found["kernel"])
    assert vlm.own_layout() is VarlenBatch and vlm.host.heads == (2, 1, 32)
    found["kernel"] = None
    assert vlm.own_layout() is PaddedBatch
    found["kernel"] = ("a kernel", reference)
    monkeypatch.setattr(type(vlm.host), "attention", "eager")
    assert vlm.own_layout() is PaddedBatch


# ---------------------------------------------------------------------- with a GPU: pytest -m gpu


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_is_right_and_recorded_steps_are_those_from_python():
    from awares_bench.bench.equality import Equality, PlainSteps, compare

    device = torch.device("cuda")
    assert kernel_for(device, torch.bfloat16, 16, 2, 128), "a kernel for rows of different lengths"
    exact = Equality("nano", None, torch.float32, "cuda", (64, 16, 100), 24)
    way = Equality("nano", None, torch.bfloat16, "cuda", (64, 16, 100), 24, exact)
    assert way.vlm.own_layout() is VarlenBatch
    for kind in (PlainSteps, VarlenBatch):
        assert compare(way.by(kind, together=True), way.alone)["relative"] < 0.02
    assert VarlenBatch.graphs is None  # recording did not fail
