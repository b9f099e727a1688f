"""Every pruner in ``baselines``: the contract of ``awares_bench.methods.pruner.Pruner``, on logits."""

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb
from transformers.vision_utils import get_vision_window_index

from awares_bench.baselines._greedy import cover
from awares_bench.baselines.apet import ApET
from awares_bench.baselines.cdpruner import CDPruner
from awares_bench.baselines.dart import Dart
from awares_bench.baselines.divprune import DivPrune
from awares_bench.baselines.fastv import FastV
from awares_bench.baselines.hiprune import HiPrune
from awares_bench.baselines.holov import HoloV
from awares_bench.baselines.mmtok import MMTok
from awares_bench.baselines.pooling import Pooling
from awares_bench.baselines.pyramiddrop import PyramidDrop
from awares_bench.baselines.sparsevlm import SparseVLM
from awares_bench.baselines.visionselector import VisionSelector
from awares_bench.baselines.visionzip import VisionZip
from awares_bench.baselines.vispruner import VisPruner
from awares_bench.bench import pruner_bench
from awares_bench.bench.meter import Meter
from awares_bench.bench.synthetic_models import random_scorer
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Turn
from awares_bench.methods.images import half
from awares_bench.methods.options import options
from awares_bench.methods.pruner import Pruner, VisualTokens, quirks_of
from awares_bench.methods.registry import pruner_classes
from awares_bench.models.attention_scores import AttentionRows, column_attention, window_order
from awares_bench.models.qwen2_5_vl import runs_of
from awares_bench.models.qwen_vision import VisionProbe
from awares_bench.models.scorer import PARTS, load_scorer

from ..helpers.tiny import chunk_ids, embedded, image_input, picture, pixels, see, tiny_vlm
from ..inference.test_vlm import TURNS, first, ours

TOLERANCE = 1e-4


EVERY = pytest.mark.parametrize("cls", pruner_classes(), ids=lambda c: c.__name__)


def made(cls: type[Pruner], retention: float, width: int = 64, **options) -> Pruner:
    """A pruner for a model of this width, with a random scorer where it needs one."""
    return cls(retention, **pruner_bench.weights_of(cls, width), **options)


VARIANTS = [
    SparseVLM(0.4, "plus"),
    SparseVLM(0.4, "1.5", "official"),
    HoloV(0.4, "official"),
    VisionZip(0.4, compat="official"),
    PyramidDrop(0.4, "official"),
    PyramidDrop(0.4, "vscan"),
    Dart(0.4, compat="official"),
    HiPrune(0.4, compat="official"),
    MMTok(0.4, compat="official"),
    CDPruner(0.4, "official"),
    VisPruner(0.4, compat="angelslim"),
    made(VisionSelector, 0.4, mmr=0.5),
]


def pruned(vlm, requests, pruner):
    vlm.trace = []
    try:
        replies = vlm.reply(requests, pruner)
        return replies, torch.stack(vlm.trace)
    finally:
        vlm.trace = None


def image(v: int = 45, grid: tuple[int, int] = (5, 9), seed: int = 0) -> VisualTokens:
    """A picture's tokens as every pruner may see them."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(4, 3, 16, generator=g), torch.randn(2, v + 8, 16, generator=g)
    rows = AttentionRows(q, k, torch.arange(v + 5, v + 8), slice(3, v + 3), torch.rand(2, v + 8, 16, generator=g).unbind())
    return VisualTokens(
        torch.randn(v, 12, generator=g),
        grid,
        torch.arange(v),
        torch.rand(v, generator=g),
        torch.randn(v, 6, generator=g),
        rows,
        seed,
        middle_attention=torch.rand(v, generator=g),
        unmerged=torch.randn(v, 7, generator=g),
        text=torch.randn(5, 12, generator=g),
    )


# ------------------------------------------------------------------ every pruner, on the model


@EVERY
def test_retention_1_has_the_bits_of_no_pruner_and_keeps_every_token_by_itself(cls):
    vlm = tiny_vlm()
    _, plain = ours(vlm, [first(t) for t in TURNS])
    _, logits = pruned(vlm, [first(t) for t in TURNS], made(cls, 1.0))
    assert torch.equal(plain.nan_to_num(), logits.nan_to_num())
    features, indices = made(cls, 1.0, 12).reduce(image(), 45)
    assert torch.equal(indices, torch.arange(45)) and torch.equal(features, image().features)


@EVERY
def test_a_mixed_batch_with_second_turns_has_the_logits_of_each_row_alone(cls):
    check_batch(made(cls, 0.4))


@pytest.mark.parametrize(
    "pruner", VARIANTS, ids=lambda p: re.sub(r"scorer='[^']*/", "scorer='", repr(p))
)  # processes name files alike
def test_the_other_versions_hold_in_batches_and_second_turns_too(pruner):
    check_batch(pruner)


def check_batch(pruner):
    vlm = tiny_vlm()
    one = Turn((half(picture(252, 252, 7)),), "Which way?", is_final=False)

    def second_turn():
        session = Session()
        vlm.reply([Request(session, one, 4)], pruner)
        return Request(session, Turn((picture(112, 168, 8),)), 6)

    kinds = [lambda t=t: first(t) for t in TURNS] + [second_turn]
    alone = [pruned(vlm, [kind()], pruner) for kind in kinds]
    for rows in ([0, 1, 2, 3, 4, 2, 1, 0], [4, 2, 1]):  # a batch of eight, and of three
        replies, logits = pruned(vlm, [kinds[row]() for row in rows], pruner)
        for b, row in enumerate(rows):
            (reply,), single = alone[row]
            assert replies[b].usage.prefill == pytest.approx(reply.usage.prefill)
            assert replies[b].usage.encoded == reply.usage.encoded
            steps = len(reply.tokens)
            assert (logits[:steps, b] - single[:steps, 0]).abs().max() < TOLERANCE


@EVERY
def test_a_second_turn_on_the_cut_cache_is_what_a_mask_over_the_whole_conversation_gives(cls):
    """The oracle never drops a token: a 4-D mask per layer hides what was cut, and nothing is cached."""
    if cls in (ApET, Pooling, SparseVLM, VisionZip):
        pytest.skip("merging changes features; the batch test covers its second turns")
    check_cut_cache(made(cls, 0.4))


def check_cut_cache(pruner):
    vlm = tiny_vlm()
    one, two = Turn((picture(140, 196, 5),), "What is it?", is_final=False), Turn((picture(84, 112, 6),))
    session = Session()
    (reply,), _ = pruned(vlm, [Request(session, one, 4)], pruner)
    kept = [k.shape[1] for k in session.keys]
    (_,), logits = pruned(vlm, [Request(session, two, 1)], pruner)
    assert (logits[0, 0] - masked(vlm, pruner, one, list(reply.tokens), two, kept)).abs().max() < TOLERANCE


@torch.inference_mode()
def masked(vlm: LocalModel, pruner: Pruner, one: Turn, reply: list[int], two: Turn, cached: list[int]) -> torch.Tensor:
    chunks, at, visible = [], 0, []  # visible: per layer, the (L,) tokens it may see
    layers = len(vlm.host.decoder.layers)
    stages, (before_decoder, pruner) = pruner.cut_layers(layers), pruner.before_and_inside(layers)
    wanted = before_decoder or pruner  # what looks into the tower
    for session, turn in ((Session(), one), (Session(turns=[one], replies=["x"]), two)):
        views = [pixels(vlm, i) for i in turn.images]
        grids = [g for _, g, _ in views]
        ids = chunk_ids(vlm, session, turn) if not session.turns else reply + chunk_ids(vlm, session, turn)
        seen = see(vlm, [p for p, _, _ in views], grids, wanted)
        seen = [replace(v, seed=vlm.host.image_input(i).seed) for v, i in zip(seen, turn.images, strict=True)]
        chunks.append(replace(embedded(vlm, ids, grids, seen, at), question=vlm.host.question_of(ids)))
        at = chunks[-1].next_position
    embeds = torch.cat([c.embeds for c in chunks])
    rope = vlm.host.decoder.rotary_emb(embeds[None], torch.cat([c.positions for c in chunks], 1)[:, None])
    hidden, alive, offset = embeds[None], torch.ones(len(embeds), dtype=torch.bool), [0, len(chunks[0].embeds)]
    if before_decoder:
        alive = torch.cat([survivors(c, before_decoder, before_decoder.retention) for c in chunks])
    entering = alive.clone()
    for layer in range(layers):
        visible.append(int(alive[: offset[1]].sum()))
        see_before = torch.ones(len(embeds), len(embeds), dtype=torch.bool).tril()
        mask = see_before & (alive[None] | torch.eye(len(embeds), dtype=torch.bool))
        before = hidden
        hidden = vlm.host.decoder.layers[layer](hidden, attention_mask=mask[None, None], position_embeddings=rope)
        if layer not in stages:
            continue
        # queries and keys from the definition: of the layer that has run, or of the next on what came out of it
        rated = vlm.host.decoder.layers[layer + pruner.looks_ahead]
        h, module = rated.input_layernorm(hidden if pruner.looks_ahead else before), rated.self_attn
        q, k = (p(h).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *rope)
        shared = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        weights = (q @ shared.transpose(2, 3) * module.scaling).masked_fill(~mask, -torch.inf).softmax(-1)[0]  # (H, L, L)
        cut = []
        for c, start in zip(chunks, offset, strict=True):
            last = start + len(c.embeds) - 1
            text = slice(start + c.spans[-1].stop, last + 1)
            for span in c.spans:
                there = torch.arange(start + span.start, start + span.stop)[alive[start + span.start : start + span.stop]]
                rows = Defined(weights[:, last, there], torch.cat([k[0, :, there], k[0, :, text]], 1), slice(0, len(there)))
                rows.final_norm = vlm.host.decoder.norm
                places = there - start - span.start
                tokens = VisualTokens(hidden[0, there], span.visual.grid, places, seed=span.visual.seed, decoder_attention=rows)
                tokens = replace(tokens, text=hidden[0, text])
                full = int(entering[start + span.start : start + span.stop].sum())
                _, chosen = pruner.reduce(tokens, pruner.tokens_to_keep(full, stages[layer]))
                cut.append(there[~torch.isin(torch.arange(len(there)), chosen)])
        alive[torch.cat(cut)] = False
    assert [n + len(reply) - (cached[0] - visible[0] != len(reply)) for n in visible] == cached
    return vlm.host.model.lm_head(vlm.host.decoder.norm(hidden[0, -1]))


@dataclass
class Defined:
    """What a pruner may ask about a layer: the last token's attention (H, V), keys (G, V + T, d)."""

    attention: torch.Tensor
    keys: torch.Tensor
    columns: slice

    def per_head(self, divisor=None):
        return self.attention


def survivors(chunk, pruner, share) -> torch.Tensor:
    alive = torch.ones(len(chunk.embeds), dtype=torch.bool)
    for span in chunk.spans:
        alive[span.start : span.stop] = False
        seen = replace(span.visual, text=chunk.embeds[chunk.spans[-1].stop :], question=chunk.question)
        _, chosen = pruner.reduce(seen, pruner.tokens_to_keep(span.full, share))
        alive[span.start + chosen] = True
    return alive


@EVERY
def test_tokens_keep_positions_raster_order_and_text(cls):
    vlm, pruner = tiny_vlm(), made(cls, 0.4)
    turn = TURNS[2]
    views = [pixels(vlm, i) for i in turn.images]
    grids = [g for _, g, _ in views]
    ids = chunk_ids(vlm, Session(), turn)
    chunk = embedded(vlm, ids, grids, see(vlm, [p for p, _, _ in views], grids, pruner))
    cut = chunk.cut(pruner, 0.4, lambda span: image(span.full).decoder_attention)
    assert cut.next_position == chunk.next_position
    text = torch.tensor(ids) != vlm.host.image_token
    kept = text.clone()
    for whole, part in zip(chunk.spans, cut.spans, strict=True):
        places = part.visual.places
        assert torch.equal(places, places.unique(sorted=True)) and 0 < len(places) <= pruner.tokens_to_keep(whole.full, 0.4)
        assert torch.equal(cut.embeds[part.start : part.stop], part.visual.features)
        kept[whole.start + places] = True
    assert torch.equal(cut.positions, chunk.positions[:, kept])
    assert torch.equal(cut.embeds[text[kept]], chunk.embeds[text])


@EVERY
def test_usage_is_the_mean_over_the_layers(cls):
    vlm = tiny_vlm()
    pruner, layers = made(cls, 0.4), len(vlm.host.decoder.layers)
    (reply,), _ = pruned(vlm, [first(TURNS[0])], pruner)
    assert reply.usage.encoded == 64
    stages, v = pruner.cut_layers(layers), 64
    entering = []
    for layer in range(layers):
        entering.append(v)
        v = pruner.tokens_to_keep(64, stages[layer]) if layer in stages else v
    low = high = sum(entering) / layers if stages else pruner.tokens_to_keep(64, 0.4)
    if cls is Pooling:
        low *= 0.8  # cells fill a rectangle
    assert low <= reply.usage.prefill <= high


@EVERY
def test_the_answer_is_the_same_each_time_and_the_model_is_left_as_it_was(cls):
    vlm, pruner = tiny_vlm(), made(cls, 0.3)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.host.model.modules()]
    _, before = ours(vlm, [first(TURNS[0])])
    runs = [pruned(vlm, [first(t) for t in TURNS], pruner)[1].nan_to_num() for _ in range(2)]
    assert torch.equal(*runs)
    broken = made(type("Broken", (cls,), {"reduce": lambda self, image, n: 1 / 0}), 0.3)
    with pytest.raises(ZeroDivisionError):
        vlm.reply([first(TURNS[0])], broken)
    with pytest.raises(RuntimeError):
        see(vlm, [torch.zeros(3, 1176)], [(1, 2, 2)], pruner)
    assert not any(hasattr(b.attn, "probe") for b in vlm.host.tower.blocks)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.host.model.modules()]
    _, after = ours(vlm, [first(TURNS[0])])
    assert torch.equal(before.nan_to_num(), after.nan_to_num())


@EVERY
def test_tiny_images_keep_at_least_one_token_and_text_needs_none(cls):
    vlm, pruner = tiny_vlm(), made(cls, 0.01)
    turn = Turn((picture(28, 28), picture(56, 28), picture(28, 280)), "Which?")
    (reply, text), logits = pruned(vlm, [first(turn), first(TURNS[3])], pruner)
    assert logits[0].isfinite().all()
    assert reply.usage.encoded > reply.usage.prefill >= 3
    assert text.usage.encoded == text.usage.prefill == 0


@EVERY
def test_an_image_with_fewer_tokens_than_the_budget_keeps_them_all(cls):
    """The logits are then those of no pruner, at every stage; the processor makes four tokens of the smallest image."""
    vlm, turn = tiny_vlm(), Turn((picture(28, 28), picture(84, 56, 4)), "Which?")
    greedy = made(type("Greedy", (cls,), {"tokens_to_keep": lambda self, visual, share: 1000}), 0.5)
    _, plain = ours(vlm, [first(turn)])
    (reply,), logits = pruned(vlm, [first(turn)], greedy)
    assert reply.usage.prefill == reply.usage.encoded == 4 + 6
    assert (plain - logits).abs().max() < TOLERANCE


@EVERY
@pytest.mark.parametrize("bad", [0, 0.0, -0.1, 1.5, float("nan"), float("inf"), "70 %", None, True])
def test_a_bad_retention_says_what_is_allowed(cls, bad):
    with pytest.raises(ValueError, match=r"retention is .*; it must be a number above 0 and at most 1"):
        cls(bad)


@EVERY
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kernels_keep_the_same_tokens(cls, attention):
    vlm, pruner = tiny_vlm(), made(cls, 0.4)
    _, right = pruned(vlm, [first(t) for t in TURNS], pruner)
    before = vlm.host.model.config._attn_implementation
    vlm.host.model.set_attn_implementation(attention)
    try:
        _, logits = pruned(vlm, [first(t) for t in TURNS], pruner)
    finally:
        vlm.host.model.set_attn_implementation(before)
    assert (logits - right).nan_to_num().abs().max() < TOLERANCE


# ------------------------------------------------------------------ against oracles


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_column_attention_is_the_mean_of_the_softmax_whatever_the_block(block):
    q, k = torch.randn(3, 7, 8), torch.randn(3, 7, 8)
    right = (q @ k.transpose(1, 2) * 0.3).softmax(-1).mean((0, 1))
    torch.testing.assert_close(column_attention(q, k, 0.3, block), right)


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_attention_rows_are_those_of_the_softmax(block):
    rows = image().decoder_attention
    scores = rows.q @ rows.keys.repeat_interleave(2, 0).transpose(1, 2) * 16**-0.5
    scores[:, torch.arange(53) > rows.rows[:, None]] = -torch.inf
    right, divisor = scores.softmax(-1)[..., 3:48], torch.rand(3, 45) + 1
    torch.testing.assert_close(rows.per_head(block=block), right.mean(1))
    torch.testing.assert_close(rows.per_head(divisor, block), (right / divisor).mean(1))


@pytest.mark.parametrize("grid", [(1, 1), (5, 9), (4, 4), (8, 8), (3, 17), (37, 37)])
def test_window_order_is_that_of_the_tower(grid):
    theirs, _ = get_vision_window_index(
        torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    assert torch.equal(window_order(*grid), theirs)


def test_scores_of_an_image_do_not_depend_on_its_neighbours():
    vlm, pruner = tiny_vlm(), VisionZip(0.5)
    views = [pixels(vlm, picture(w, h, 3)) for w, h in ((140, 252), (224, 224), (140, 252))]
    together = see(vlm, [p for p, _, _ in views], [g for _, g, _ in views], pruner)
    for (p, g, _), seen in zip(views, together, strict=True):
        (alone,) = see(vlm, [p], [g], pruner)
        torch.testing.assert_close(seen.attention, alone.attention, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(seen.vision_keys, alone.vision_keys, atol=1e-5, rtol=1e-4)
    assert together[0].attention.sum().item() == pytest.approx(1 / 4, rel=1e-4)  # a mean over four patches each


def test_divprune_is_the_greedy_max_min_of_the_paper():
    x = normalize(image().features, dim=1)
    distance = 1 - x @ x.T
    chosen = [max(range(45), key=lambda i: min(float(distance[i, j]) for j in range(45) if j != i))]
    while len(chosen) < 11:
        rest = [i for i in range(45) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    assert DivPrune(0.25).select(image(), 11).tolist() == sorted(chosen)


def test_pooling_at_a_quarter_is_the_2x2_average():
    seen = image(48, (6, 8))
    features, indices = Pooling(0.25).reduce(seen, 12)
    blocks = seen.features.view(3, 2, 4, 2, 12).mean((1, 3)).reshape(12, 12)
    torch.testing.assert_close(features, blocks)
    assert indices.tolist() == [r * 8 + c for r in (0, 2, 4) for c in (0, 2, 4, 6)]


def test_a_contextual_token_is_the_mean_of_its_group():
    seen = replace(
        image(8, (2, 4)), attention=torch.tensor([9.0, 8, 0, 0, 0, 0, 0, 0]), vision_keys=torch.eye(8)[[0, 1, 2, 2, 2, 5, 5, 5]]
    )
    features, kept = VisionZip(0.5, 0.25).reduce(seen, 4)
    assert kept.tolist() == [0, 1, 2, 5]
    torch.testing.assert_close(features[2:], torch.stack([seen.features[2:5].mean(0), seen.features[5:].mean(0)]))


def test_holov_gives_the_rest_of_a_full_band_to_the_others_and_pads_nothing():
    attention = torch.cat([torch.full((5,), 100.0), torch.linspace(1, 2, 40)])
    features, kept = HoloV(0.5).reduce(replace(image(), attention=attention), 22)
    assert len(kept) == 22 and (kept[1:] > kept[:-1]).all() and kept[:5].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(features, image().features[kept])


def test_holov_has_no_empty_band():
    for v in range(1, 40):
        seen = replace(image(v, (1, v)), attention=torch.rand(v) + 0.1)
        for n in range(1, v + 1):
            assert len(HoloV(0.5).reduce(seen, n)[1]) == n


def test_equal_scores_keep_the_first():
    @dataclass(frozen=True)
    class Flat(Pruner):
        def score(self, image):
            return torch.zeros(len(image.features))

    assert Flat(0.5).select(image(), 7).tolist() == list(range(7))


@pytest.mark.parametrize("layers", [4, 28, 36])
@pytest.mark.parametrize("retention", [0.05, 0.25, 0.5, 0.7, 0.9])
def test_sparsevlm_keeps_its_retention_as_the_mean_over_the_layers(layers, retention):
    stages, share, shares = SparseVLM(retention).cut_layers(layers), 1.0, []
    for layer in range(layers):
        shares.append(share)
        share = stages.get(layer, share)
    mean = sum(shares) / layers
    if min(stages.values()) > (retention / 2 + 1e-9) ** len(stages):
        assert mean == pytest.approx(retention, abs=1e-6)
    else:  # the layers before the first cut take too much
        assert mean > retention and retention < (min(stages) + 1) / layers * 1.5


@pytest.mark.parametrize("layers", [4, 28, 32, 36])
@pytest.mark.parametrize("retention", [0.05, 0.1, 0.25, 0.33, 0.5, 0.7, 0.9])
def test_pyramiddrop_keeps_its_retention_as_the_mean_over_the_layers(layers, retention):
    stages, share, shares = PyramidDrop(retention).cut_layers(layers), 1.0, []
    for layer in range(layers):
        shares.append(share)
        share = stages.get(layer, share)
    assert max(stages) < layers - 1 and list(stages) == sorted(stages)
    if retention >= 1.01 / layers:  # the first layer sees every token
        assert sum(shares) / layers == pytest.approx(retention, abs=1e-6)
    if retention > 0.34:
        assert list(stages) == [i * layers // 4 - 1 for i in (1, 2, 3)]  # the authors' quarters


@EVERY
@pytest.mark.parametrize("retention", [0.1, 0.25, 0.5, 0.7])
def test_the_achieved_retention_is_the_one_asked_for(cls, retention):
    """Of every picture to a token, by each rule of what the share is of: all layers, or those after the one cut."""
    vlm, pruner = tiny_vlm(), made(cls, retention)
    cuts = pruner.cut_layers(28)
    for turn in (TURNS[0], TURNS[1]):
        (reply,), _ = pruned(vlm, [first(turn)], pruner)
        asked = retention * reply.usage.encoded
        if not cuts:
            kept = reply.usage.prefill
            assert asked - 1 < kept <= asked + 1e-9 or (cls is Pooling and 0.7 * asked < kept <= asked)
        elif len(cuts) == 1:  # FastV's meaning: the share that goes on
            after = (reply.usage.prefill * 3 - 2 * reply.usage.encoded) if pruner.layer == 2 else None
            assert after is None or abs(after - asked) < 1
        elif retention > 0.4:  # what a decoder of three layers can reach
            assert abs(reply.usage.prefill - asked) <= 1.5


OTHER = {
    "scorer": lambda: str(random_scorer(12, 1)),
    "mmr": lambda: 0.5,
    "layer": lambda: 3,
    "draw": lambda: 1,
    "basis": lambda: 3,
    "alpha": lambda: 50.0,
    "text_pivots": lambda: 1,
}
"""Option -> another value than its default, where no rule says one."""


def others(cls: type[Pruner], name: str) -> list:
    """Values of an option that are not its default."""
    hint, default = get_type_hints(cls)[name], options(cls)[name]
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if value != default]
    return [OTHER[name]()] if name in OTHER else [default * 3 if isinstance(default, int) else 0.3]


def decided(pruner: Pruner) -> list:
    """Everything that a pruner decides about some pictures of 45 tokens, as plain numbers."""
    out: list = [sorted(pruner.cut_layers(28).items()), quirks_of(pruner), pruner.tokens_to_keep(45, 0.63)]
    for seed, n in ((0, 20), (1, 20), (2, 5), (3, 5)):
        features, indices = pruner.reduce(replace(image(seed=seed), tower_order=torch.arange(45).flip(0)), n)
        out.append((features.tolist(), indices.tolist()))
    return out


OPTIONS = [(cls, name) for cls in pruner_classes() for name in options(cls) if name != "retention"]


@pytest.mark.parametrize(("cls", "name"), OPTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_every_option_changes_what_is_decided(cls, name):
    given = {"mmr": 0.5} if name == "parallel" else {}
    default = decided(made(cls, 0.45, 12, **given))
    assert decided(made(cls, 0.45, 12, **given)) == default
    for value in others(cls, name):
        assert decided(cls(0.45, **{**pruner_bench.weights_of(cls, 12), **given, name: value})) != default, value


@EVERY
def test_no_pruner_changes_what_it_is_shown(cls):
    seen = image()
    held = [t.clone() for t in (seen.features, seen.attention, seen.middle_attention, seen.unmerged, seen.text, seen.vision_keys)]
    made(cls, 0.4, 12).reduce(seen, 18)
    now = (seen.features, seen.attention, seen.middle_attention, seen.unmerged, seen.text, seen.vision_keys)
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))


# ------------------------------------------------------------------ new pruners, against their definitions


def test_lazy_coverage_is_the_plain_greedy():
    g = torch.Generator().manual_seed(1)
    for v in (1, 2, 17, 60):
        table, weight, bonus = torch.randn(v, 23, generator=g), torch.rand(v, generator=g), torch.rand(v, generator=g)
        best, order = torch.zeros(23), []
        for _ in range(v):
            value = (table - best).clamp(min=0).sum(1).double() * weight + bonus
            value[order] = -torch.inf
            order.append(int(value.argmax()))
            best = torch.maximum(best, table[order[-1]])
        assert cover(table, v, weight, bonus) == order
    assert cover(torch.ones(5, 3), 3) == [0, 1, 2]  # the first of equals


def test_cdpruner_takes_the_largest_determinant_each_time_and_survives_doubles():
    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))
    relevance = torch.linspace(0.1, 1, 30)
    kernel = relevance[:, None] * (normalize(x, dim=1) @ normalize(x, dim=1).T) * relevance
    chosen: list[int] = []
    for _ in range(20):  # so many that tokens which made room for others are chosen too
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]].double()))))
    assert CDPruner(0.5).order(x, relevance, 20).tolist() == chosen
    doubled = torch.cat([x, x])  # past the rank of the kernel nothing is left to choose by
    assert sorted(CDPruner(0.5).order(doubled, torch.ones(60), 60).tolist()) == list(range(60))


def test_hiprune_s_neighbours_stay_in_the_picture():
    around = HiPrune(0.5).around(torch.tensor([0, 8, 22]), (5, 9))
    assert around.tolist() == [0, 1, 7, 8, 9, 13, 17, 21, 22, 23, 31]
    assert HiPrune(0.5, compat="official").around(torch.tensor([8]), (5, 9)).tolist() == [0, 7, 8, 9, 17]  # 9 is in the next row


def test_vispruner_allows_every_budget():
    for v in (1, 2, 3, 7, 12, 19):
        seen = replace(image(v, (1, v)), attention=torch.rand(v))
        for n in range(1, v + 1):
            for important in (0.0, 0.5, 1.0):
                for compat in ("corrected", "angelslim"):
                    assert len(VisPruner(0.5, important, compat).select(seen, n)) == n


def test_apet_blends_the_basis_and_merges_the_rest():
    features, kept = ApET(0.5, 3).reduce(image(), 20)
    x = image().features
    basis = ApET(0.5, 3).basis_of(x, 3)
    order = ApET(0.5).errors(x, x[basis]).argsort(descending=True)
    low, top = order[17:20].sort().values, order[:17].sort().values
    assert torch.equal(kept, torch.cat([low, top]).sort().values)
    torch.testing.assert_close(features[torch.searchsorted(kept, low)], (x[low] + x[basis]) / 2)
    dropped = order[20:]
    home = (normalize(x[dropped], dim=1) @ normalize(x[top], dim=1).T).argmax(1)
    for i, place in enumerate(top):
        group = torch.stack([x[place], *x[dropped[home == i]]])
        torch.testing.assert_close(features[torch.searchsorted(kept, place)], group.mean(0))


def test_the_question_is_found_among_the_tokens_after_the_last_picture():
    vlm = tiny_vlm()
    for turn in (TURNS[0], TURNS[2], Turn((picture(56, 56),), "")):
        ids = chunk_ids(vlm, Session(), turn)
        after = ids[len(ids) - ids[::-1].index(vlm.host.image_token) :]
        assert vlm.tokenizer.decode(after[vlm.host.question_of(ids)]) == turn.text
    seen = replace(image(), question=slice(2, 2))
    assert torch.equal(seen.words, seen.text) and torch.equal(replace(seen, question=slice(1, 3)).words, seen.text[1:3])


def test_the_question_decides_what_is_relevant():
    vlm, words = tiny_vlm(), []

    class Told(CDPruner):
        def relevance(self, features, asked):
            words.append(asked)
            return super().relevance(features, asked)

    vlm.reply([first(TURNS[0])], Told(0.5))
    embedding = vlm.host.model.get_input_embeddings()
    tokens = torch.tensor(vlm.tokenizer(TURNS[0].text, add_special_tokens=False)["input_ids"])
    assert torch.equal(words[0], embedding(tokens))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"q_proj.weight": torch.zeros(2, 3)}, "holds no q_proj.weight; pass a safetensors file with q_proj.weight, q_proj.bias"),
        ({part: torch.zeros(2, 3) if "weight" in part else torch.zeros(3) for part in PARTS}, "biases their height"),
        ({part: torch.full((2, 3) if "weight" in part else (2,), torch.nan) for part in PARTS}, "not finite"),
    ],
)
def test_a_scorer_that_cannot_be_used_says_why(tmp_path, tensors, said):
    save_file(tensors, tmp_path / "scorer.safetensors")
    with pytest.raises(ValueError, match=said):
        load_scorer(str(tmp_path / "scorer.safetensors"))


def test_a_scorer_is_read_from_a_whole_checkpoint_by_its_tensors_alone(tmp_path):
    whole = {f"visual.importance_scorer.{part}": t for part, t in load_file(random_scorer(12)).items()}
    save_file(whole | {"model.q_proj.weight": torch.zeros(1)}, tmp_path / "model-00001.safetensors")
    (tmp_path / "code.py").write_text("raise SystemExit")
    assert load_scorer(str(tmp_path)).fingerprint == load_scorer(str(random_scorer(12))).fingerprint
    assert load_scorer(str(random_scorer(12, 1))).fingerprint != load_scorer(str(random_scorer(12))).fingerprint
    (tmp_path / "broken.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match="is not a safetensors file that can be read"):
        load_scorer(str(tmp_path / "broken.safetensors"))
    for bad, said in (({"mmr": 1.5}, "mmr is 1.5"), ({"parallel": 0}, "parallel is 0"), ({"mmr": "no"}, "mmr is 'no'")):
        with pytest.raises(ValueError, match=said):
            VisionSelector(0.5, **bad)


def test_scores_are_the_mean_products_of_the_definition():
    scorer, x = load_scorer(str(random_scorer(12))), image().features
    q, k = x @ scorer.query.T + scorer.query_bias, x @ scorer.key.T + scorer.key_bias
    torch.testing.assert_close(scorer.scores(x), (q @ k.T).mean(1) / len(scorer.query) ** 0.5)


def test_a_layer_that_the_model_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="this model has 3 layers, so the last place is 1"):
        tiny_vlm().reply([first(TURNS[0])], FastV(0.5, 9))
    with pytest.raises(ValueError, match="layer is 0"):
        FastV(0.5, 0)
    with pytest.raises(ValueError, match=r"version is '2'; allowed: '1\.5', 'plus'"):
        SparseVLM(0.5, "2")
    with pytest.raises(ValueError, match=r"contextual is 1\.0"):
        VisionZip(0.5, 1.0)
    windowed = type("Windowed", (VisionZip,), {"vision_block": 0})
    with pytest.raises(ValueError, match=r"attends within windows only; blocks that see the whole image: \[1, 3\]"):
        tiny_vlm().reply([first(TURNS[0])], windowed(0.5))


def test_the_bench_times_every_pruner_on_as_many_pictures_as_asked(capsys):
    result = pruner_bench.run("nano", tokens=16, batch=2, repeats=1)
    told, costs = capsys.readouterr().out, result["pruners"]
    assert {c["pruner"] for c in costs} == {c.__module__.rsplit(".", 1)[1] for c in pruner_classes()}
    assert all(c["pruner"] in told and 0 < c["visual"] <= 8 for c in costs)
    assert all(c["share"] == pytest.approx(c["seconds"] / result["prefill_seconds"]) for c in costs)  # of one round
    assert all(0 < c["scoring_seconds"] < c["seconds"] for c in costs)
    assert "2 at a time of 16 visual" in told
    with pytest.raises(ValueError, match="batch is 0"):
        pruner_bench.run("nano", batch=0)


@pytest.mark.slow
def test_deciding_takes_at_most_100_MiB_at_4096_tokens_of_7B():
    meter = Meter(tiny_vlm(), memory=True)
    v, text = 4096, 200
    features, g = torch.randn(v, 3584), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        q, k = torch.randn(1, 16, 4 * v, 80), torch.randn(1, 16, 4 * v, 80)
        probe = VisionProbe(True, True, middle=VisionProbe(True, False))
        probe.unmerged = torch.randn(4 * v, 1280)
        for each in (probe, probe.middle):
            meter(each, q, k, 80**-0.5, torch.tensor([0, 4 * v]))
        rows = AttentionRows(
            torch.randn(28, text, 128, generator=g), torch.randn(4, v + text, 128), torch.arange(v, v + text), slice(0, v),
            torch.rand(2, v + text, 128).unbind(),
        )  # fmt: skip
        (seen,) = meter(runs_of, features, [image_input(meter.vlm, torch.zeros(1, 1176), (1, 128, 128))], probe, (), 4)
        for pruner in [made(c, r, 3584) for c in pruner_classes() for r in (0.1, 0.7)] + [SparseVLM(0.5, "plus")]:
            meter(pruner.raters, features, torch.randn(text, 3584))
            meter(
                pruner.reduce,
                replace(seen, decoder_attention=rows, text=torch.randn(text, 3584)),
                pruner.tokens_to_keep(v, pruner.retention),
            )
            assert meter.peak <= 100 * 2**20, f"{pruner}: {meter.peak / 2**20:.0f} MiB"
    print(f"{meter.peak / 2**20:.0f} MiB at most, {sum(meter.seconds):.0f} s")
