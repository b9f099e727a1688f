"""Our loop against transformers' own: logits, not tokens, because an off-by-one position changes no greedy token."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from awares_bench.baselines.full import Full
from awares_bench.errors import CheckpointError
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.image_features import FeatureStore
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.ragged_batch import RaggedBatch
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Sample, Trajectory, Turn, chat_messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.methods.pruner import VisualTokens
from awares_bench.models import qwen_vision
from awares_bench.models.cpu_kernels import FEWEST_ROWS, linear_onednn, onednn_linears
from awares_bench.models.families import host_of
from awares_bench.models.qwen_vision import grouped_windows, matmul_attention, varlen_windows
from awares_bench.training.nano import model as nano

from ..helpers.tiny import chunk_ids, encode, picture, pixels, positions, tiny_vlm

TOLERANCE = 1e-4


def ours(vlm, requests):
    """-> (replies, logits of every choice as (steps, B, vocabulary), NaN after a row's last)."""
    vlm.trace = []
    try:
        replies = vlm.reply(requests)
        return replies, torch.stack(vlm.trace)
    finally:
        vlm.trace = None


def fresh(session, turn, budget=6):
    return Request(session, turn, budget)


def first(turn, budget=6):
    return Request(Session(), turn, budget)


TURNS = [
    Turn((picture(224, 224),), "What is the value of the red bar?"),
    Turn((picture(300, 84, 1),), "Is there a star in a red frame?\nAnswer the question using a single word or phrase."),
    Turn((picture(112, 112, 2), picture(56, 140, 3)), "Compare the two.", system=PAPER_GRID.prompt),
    Turn((), "No picture at all: what is two and two?"),
]


BOTH = pytest.mark.usefixtures("layout")


@BOTH
@pytest.mark.parametrize("turn", TURNS, ids=["square", "wide", "two-images", "text-only"])
def test_one_turn_has_the_logits_of_generate(turn):
    vlm = tiny_vlm()
    _, logits = ours(vlm, [first(turn)])
    text = vlm.host.processor.apply_chat_template(chat_messages([turn], []), tokenize=False, add_generation_prompt=True)
    inputs = vlm.host.processor(text=[text], images=list(turn.images) or None, return_tensors="pt")
    out = vlm.host.model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    theirs = torch.stack(out.logits)
    steps = min(len(theirs), len(logits))
    assert steps >= 1
    assert (logits[:steps] - theirs[:steps]).abs().max() < TOLERANCE


def test_a_position_off_by_one_would_be_seen():
    vlm = tiny_vlm()
    turn = TURNS[0]
    _, right = ours(vlm, [first(turn)])
    _, grid, _ = pixels(vlm, turn.images[0])
    ids = chunk_ids(vlm, Session(), turn)
    placed, _ = positions(ids, [grid], vlm.host.image_token)
    patches, _, _ = pixels(vlm, turn.images[0])
    embeds = vlm.host.decoder.get_input_embeddings()(torch.tensor([ids]))
    where = (torch.tensor([ids]) == vlm.host.image_token)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(where, encode(vlm, [patches], [grid]))
    for shift, equal in ((0, True), (1, False)):
        moved = placed.clone()
        moved[:, -1] += shift
        with torch.no_grad():
            hidden = vlm.host.decoder(inputs_embeds=embeds, position_ids=moved[:, None], use_cache=False).last_hidden_state[:, -1]
        close = (vlm.host.model.lm_head(hidden) - right[0]).abs().max() < TOLERANCE
        assert bool(close) is equal


def test_positions_are_those_of_the_model():
    vlm = tiny_vlm()
    for turn in TURNS[:3]:
        grids = [pixels(vlm, i)[1] for i in turn.images]
        ids = torch.tensor([chunk_ids(vlm, Session(), turn)])
        theirs, delta = vlm.host.model.model.get_rope_index(
            ids, image_grid_thw=torch.tensor(grids), mm_token_type_ids=(ids == vlm.host.image_token).int()
        )
        mine, after = positions(ids[0].tolist(), grids, vlm.host.image_token)
        assert torch.equal(mine, theirs[:, 0])
        assert after == int(delta) + ids.shape[1]


@BOTH
@pytest.mark.parametrize("budget", [6, 2], ids=["ended-or-not", "cut-by-its-budget"])
def test_a_second_turn_on_the_kept_cache_has_the_logits_of_a_fresh_prefill(budget):
    vlm = tiny_vlm()
    image = picture(280, 224, 5)
    session = Session()
    one = Turn((half(image),), "What is the value of the red bar?", system=PAPER_GRID.prompt, is_final=False)
    (reply,), _ = ours(vlm, [fresh(session, one, budget)])
    two = Turn(tuple(PAPER_GRID.cut(image, ("top-left", "right"))))
    _, kept = ours(vlm, [fresh(session, two)])

    grids = [pixels(vlm, i)[1] for turn in (one, two) for i in turn.images]
    head = chunk_ids(vlm, Session(), one)
    tail = chunk_ids(vlm, Session(turns=[one], replies=["x"]), two)
    ids = head + list(reply.tokens) + tail
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    patches = torch.cat([pixels(vlm, i)[0] for turn in (one, two) for i in turn.images])
    with torch.no_grad():
        whole = vlm.host.model(
            **inputs,
            pixel_values=patches,
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(inputs["input_ids"] == vlm.host.image_token).int(),
        ).logits[0, -1]
    assert (kept[0, 0] - whole).abs().max() < TOLERANCE


def test_the_second_chunk_continues_the_rendered_conversation():
    vlm = tiny_vlm()
    one = Turn((picture(112, 112),), "q?", system=PAPER_GRID.prompt, is_final=False)
    two = Turn((picture(56, 56),))
    reply = "GET_CROPS: ['3']"
    ids = chunk_ids(vlm, Session(), one) + vlm.tokenizer(reply)["input_ids"]
    ids += chunk_ids(vlm, Session(turns=[one], replies=[reply]), two)
    text = vlm.host.processor.apply_chat_template(chat_messages([one, two], [reply]), tokenize=False, add_generation_prompt=True)
    whole = vlm.host.processor(text=[text], images=[*one.images, *two.images], return_tensors="pt")["input_ids"][0].tolist()
    assert ids == whole


@BOTH
def test_a_mixed_batch_has_the_logits_of_each_row_alone():
    vlm = tiny_vlm()
    image = picture(252, 252, 7)
    one = Turn((half(image),), "Which way?", system=PAPER_GRID.prompt, is_final=False)

    def second_turn():
        session = Session()
        vlm.reply([Request(session, one, 4)])
        return Request(session, Turn(tuple(PAPER_GRID.cut(image, ("bottom",)))), 6)

    alone = [ours(vlm, [first(t)]) for t in TURNS] + [ours(vlm, [second_turn()])]
    replies, logits = ours(vlm, [*map(first, TURNS), second_turn()])
    for b, ((reply,), single) in enumerate(alone):
        assert replies[b].text == reply.text
        steps = len(reply.tokens)
        assert (logits[:steps, b] - single[:steps, 0]).abs().max() < TOLERANCE


def test_a_cache_stays_where_it_is_and_another_layout_goes_on_from_it():
    vlm, image = tiny_vlm(), picture(280, 224, 5)
    one = Turn((half(image),), "What is the value of the red bar?", system=PAPER_GRID.prompt, is_final=False)
    crops = tuple(PAPER_GRID.cut(image, ("top-left",)))
    other = Turn((picture(112, 112),), "q?", is_final=False)

    def begun(kind):
        sessions = [Session(), Session()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalModel, "_batch", lambda v, s, c: kind(v.host, s, c))
            vlm.reply([Request(sessions[0], one, 4), Request(sessions[1], other, 2)])
        return sessions[0]

    line, rectangle = begun(RaggedBatch), begun(PaddedBatch)
    held, length = [b.data_ptr() for b in line.storage], line.length
    assert held and not rectangle.storage and length == rectangle.length
    for kind in ("keys", "values"):
        for a, b in zip(getattr(line, kind), getattr(rectangle, kind), strict=True):
            assert (a - b).abs().max() < TOLERANCE
    second = Turn(crops, is_final=False)
    _, kept = ours(vlm, [Request(line, second, 4)])
    _, moved = ours(vlm, [Request(rectangle, second, 4)])
    assert (kept - moved).abs().max() < TOLERANCE
    assert [b.data_ptr() for b in line.storage] == held and line.length > length
    assert rectangle.storage and rectangle.length == line.length


def test_usage_counts_what_was_fed():
    vlm = tiny_vlm()
    (reply,), _ = ours(vlm, [first(TURNS[0])])
    assert reply.usage.encoded == reply.usage.prefill == 64  # 224 / 28 = 8 a side
    (reply,), _ = ours(vlm, [first(TURNS[2])])
    assert reply.usage.encoded == 16 + 10  # 4 x 4 and 2 x 5
    assert vlm.visual_tokens(picture(1120, 840)) == 1200  # 40 x 30
    for size in ((1, 1), (3, 2000), (57, 400), (1700, 2200)):
        _, grid, _ = pixels(vlm, picture(*size))
        assert vlm.visual_tokens(picture(*size)) == grid[1] * grid[2] // 4


def test_tokens_are_counted_under_the_limits_that_pictures_are_made_with():
    vlm = LocalModel(host_of(tiny_vlm().host.model, tiny_vlm().host.processor, 64 * 28 * 28, 100 * 28 * 28))
    for size in ((112, 112), (224, 252), (1120, 840)):  # below, within, above
        patches, _, _ = pixels(vlm, picture(*size))
        assert 64 <= vlm.visual_tokens(picture(*size)) == len(patches) // 4 <= 100


def test_the_tower_is_left_as_it_was_also_after_an_exception():
    vlm = tiny_vlm()
    before = vlm.host.tower.config._attn_implementation
    vlm.reply([first(TURNS[0])])
    with pytest.raises(RuntimeError):
        encode(vlm, [torch.zeros(3, 1176)], [(1, 2, 2)])
    assert vlm.host.tower.config._attn_implementation == before


@pytest.mark.parametrize("sizes", [[(224, 224)] * 3, [(300, 84), (112, 112), (140, 420)]], ids=["equal-windows", "mixed"])
def test_the_tower_has_the_features_of_transformers_window_by_window(sizes):
    vlm = tiny_vlm()
    views = [pixels(vlm, picture(*size, seed=i))[:2] for i, size in enumerate(sizes)]
    patches, grids = [p for p, _ in views], [g for _, g in views]
    with torch.no_grad():
        stock = vlm.host.tower(torch.cat(patches), grid_thw=torch.tensor(grids)).pooler_output
    assert (encode(vlm, patches, grids) - stock).abs().max() < TOLERANCE


@pytest.mark.parametrize("sizes", [[(224, 224)] * 3, [(300, 84), (112, 112), (140, 420)]], ids=["equal-windows", "mixed"])
def test_the_tower_has_the_same_features_in_parts_and_by_products(sizes, monkeypatch):
    vlm = tiny_vlm()
    views = [pixels(vlm, picture(*size, seed=i))[:2] for i, size in enumerate(sizes)]
    patches, grids = [p for p, _ in views], [g for _, g in views]
    whole, tower, seen = encode(vlm, patches, grids), vlm.host.tower, []
    with torch.no_grad():
        stock = tower(torch.cat(patches), grid_thw=torch.tensor(grids)).pooler_output
    for name, value in {"FEW": 0, "ROWS": 48, "LONG": 1, "USE_MATMUL_ATTENTION": True}.items():
        monkeypatch.setattr(qwen_vision, name, value)
    hook = tower.blocks[0].mlp.up_proj.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    parts = encode(vlm, patches, grids)
    hook.remove()
    assert max(seen) == 48 and sum(seen) == sum(len(p) for p in patches)
    assert (parts - stock).abs().max() < TOLERANCE and (parts - whole).abs().max() < TOLERANCE
    assert not torch.equal(parts, whole)  # or attention did not go by products
    assert not any("forward" in vars(m) for m in tower.modules())


def test_attention_by_products_in_half_precision_is_as_near_to_float32_as_the_fused_one():
    q, k, v = torch.randn(3, 1, 2, 700, 40, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    fused, true = (scaled_dot_product_attention(*(t.to(kind) for t in (q, k, v))) for kind in (torch.bfloat16, torch.float32))
    with torch.inference_mode():
        ours = torch.stack([matmul_attention(*head) for head in zip(q[0], k[0], v[0], strict=True)])[None]
    assert ours.dtype == torch.bfloat16
    assert (ours - true).abs().mean() <= (fused - true).abs().mean()


@pytest.mark.parametrize("smallest", [0, 2**20], ids=["oneDNN", "MKL"])
def test_products_in_the_engine_differ_by_rounding_and_leave_the_model_as_it_was(smallest, monkeypatch):
    monkeypatch.setattr("awares_bench.models.cpu_kernels.FEWEST_WEIGHTS", smallest)
    layer, other = torch.nn.Linear(40, 24), torch.nn.Linear(40, 24, bias=False)
    halved, x = torch.nn.Linear(40, 24).bfloat16(), torch.randn(64, 40).bfloat16()
    with torch.inference_mode():
        true = torch.nn.functional.linear(x.double(), halved.weight.double(), halved.bias.double())
        assert (linear_onednn(x, halved.weight, halved.bias) - true).abs().mean() <= 1.01 * (halved(x) - true).abs().mean()
    for rows in (FEWEST_ROWS - 1, FEWEST_ROWS, 300):
        x = torch.randn(2, rows, 40)
        with torch.inference_mode(), onednn_linears(layer):
            assert "forward" in vars(layer) and "forward" not in vars(other)
            assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
            assert torch.allclose(linear_onednn(x, other.weight), other(x), atol=1e-5)
    with pytest.raises(ZeroDivisionError), onednn_linears(layer):
        layer(x).sum().backward()  # with gradients it is PyTorch's own
        assert layer.weight.grad is not None
        _ = 1 / 0
    assert "forward" not in vars(layer)


def test_features_of_a_picture_seen_before_are_reused_and_change_nothing():
    vlm, seen = tiny_vlm(), []
    turns = [Turn((picture(112, 84),), "Which?"), Turn((picture(112, 84, 4), picture(112, 84)), "Same?")]
    _, plain = ours(vlm, [first(turns[1])])
    hook = vlm.host.tower.register_forward_hook(lambda _, args, out: seen.append(len(args[0]) // 4))
    vlm.features = FeatureStore(2**20)
    try:
        requests = [first(t) for t in (turns[0], turns[1], turns[1])]
        scores = [ours(vlm, [r])[1] for r in requests]
        vlm.features.capacity = 1
        vlm.features.put("x", [VisualTokens(torch.zeros(1, 1), (1, 1))])
        assert vlm.features.used == 0
    finally:
        hook.remove()
        vlm.features = None
    assert seen == [12, 12]
    assert (scores[1] - plain).abs().max() < TOLERANCE and torch.equal(scores[1], scores[2])
    assert [[e.kind for e in r.session.events] for r in requests] == [[], ["features_reused"], ["features_reused"]]


def test_one_call_for_segments_of_any_length_is_the_grouped_calls():
    lengths = torch.tensor([5, 16, 16, 3])
    ends = torch.cat([torch.zeros(1, dtype=int), lengths.cumsum(0)])
    q, k, v = torch.randn(3, 1, 2, int(lengths.sum()), 8).unbind()

    def kernel(q, k, v, starts, _, longest, __):  # what a variable-length kernel computes, one segment at a time
        assert longest == 16 and starts.dtype == torch.int32
        some = [slice(a, b) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
        weights = [(q[s].transpose(0, 1) @ k[s].permute(1, 2, 0) * q.shape[-1] ** -0.5).softmax(-1) for s in some]
        return torch.cat([(w @ v[s].transpose(0, 1)).transpose(0, 1) for w, s in zip(weights, some, strict=True)])

    grouped = grouped_windows(q, k, v, ends)
    assert (varlen_windows(kernel, q, k, v, ends, 16) - grouped).abs().max() < 1e-6


def test_an_image_mark_in_a_question_fails_that_document_only():
    jobs = [Job(Sample((picture(56, 56),), q, q), 4) for q in ("one?", "what is <|image_pad|>?", "", "long " * 4000)]
    outcomes = dict(Engine(tiny_vlm(), Full(), 4).run(jobs))
    assert isinstance(outcomes[1], Failure) and "remove it from the question" in outcomes[1].error
    assert all(isinstance(outcomes[i], Trajectory) for i in (0, 2, 3))
    assert outcomes[3].usage.text > 4000


def test_checkpoints_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder at"):
        LocalModel.load(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"llama checkpoint; known families: .*qwen2_5_vl"):
        LocalModel.load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read a model config"):
        LocalModel.load(str(tmp_path))
    folder = tmp_path / "whole"
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        LocalModel.load(str(folder))
    with pytest.raises(ValueError, match="allowed: auto, float32"):
        LocalModel.load(str(folder), dtype="float3")
    with pytest.raises(ValueError, match="min_pixels <= max_pixels"):
        host_of(tiny_vlm().host.model, tiny_vlm().host.processor, 10, 5)
