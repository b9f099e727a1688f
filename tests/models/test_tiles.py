"""Families that cut pictures into tiles: what a share is, counts, pruning, pooling, training; beside the models' own code and per-layer masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from awares_bench.awares import AwaRes
from awares_bench.baselines.all_crops import AllCrops
from awares_bench.baselines.cares import Cares
from awares_bench.baselines.cropvlm import CropVLM
from awares_bench.baselines.divprune import DivPrune
from awares_bench.baselines.fastv import FastV
from awares_bench.baselines.full import Full
from awares_bench.baselines.holov import HoloV
from awares_bench.baselines.low import Low
from awares_bench.baselines.oracle_crop import OracleCrop
from awares_bench.baselines.pooling import Pooling
from awares_bench.baselines.random_crop import RandomCrop
from awares_bench.baselines.sparsevlm import SparseVLM
from awares_bench.baselines.visionthink import VisionThink
from awares_bench.baselines.visionzip import VisionZip
from awares_bench.errors import CheckpointError, RunError
from awares_bench.inference.engine import Engine, Job, Scripted
from awares_bench.inference.generic_model import GenericModel
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.openai_server import Endpoint
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Sample, Turn
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.methods.resolution_gate import Gate
from awares_bench.models.generic import GenericHost
from awares_bench.models.internvl import InternVL
from awares_bench.models.smolvlm import Idefics3
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rendering import render
from awares_bench.training.rollouts import banned_tokens, rollouts

from ..helpers.openai_fake import start
from ..helpers.tiny import picture, tiny_vlm
from ..helpers.tiny_tiles import SMOLVLM_MARKS, internvl, internvl_processor, smolvlm, smolvlm_processor, tokenizer

TINY = {"internvl": lambda: internvl("qwen2"), "idefics3": lambda: smolvlm("idefics3")}
"""InternVL with the decoder and the norms in its tower that the contract of hosts has not; SmolVLM, which is there, is Idefics3 by another name."""

PAGE = (1700, 2200)


def count(family, processor, image: Image.Image, share: float = 1.0) -> int:
    """Visual tokens under the processor's own limits."""
    limits = dict(zip(("shortest_edge", "longest_edge"), family.own_limits(processor), strict=True))
    return family.count_tokens(processor, limits, image, share)


@pytest.fixture(params=TINY)
def vlm(request) -> LocalModel:
    return LocalModel(TINY[request.param](), constrained=False)


def traced(vlm: LocalModel, request: Request, pruner=None):
    """A reply, and the (steps, vocabulary) scores that it was chosen by."""
    vlm.trace = []
    try:
        (reply,) = vlm.reply([request], pruner)
        return reply, torch.stack(vlm.trace)[:, 0]
    finally:
        vlm.trace = None


# ------------------------------------------------------------------ shares


def shares(policy, script: list[str], image: Image.Image, **sample) -> list[tuple[float, ...]]:
    """The shares of every turn of a method that is given these replies."""
    ((_, outcome),) = Engine(Scripted({"q?": script}), policy).run([Job(Sample((image,), "q?", "k", **sample), 8)])
    return [turn.shares for turn in outcome.turns]


@pytest.mark.parametrize("size", [(112, 84), (113, 85), (57, 57)])
def test_every_method_says_what_its_pictures_stand_for(size):
    image, near = picture(*size), pytest.approx(0.25, abs=0.02)
    assert shares(Full(), ["a"], image) == [()]
    assert shares(Low(), ["a"], image) == [(0.25,)]
    assert shares(AwaRes(), ["GET_CROPS: ['3', '5']", "a"], image) == [(0.25,), (near, pytest.approx(0.5, abs=0.02))]
    assert shares(AwaRes(), ["GET_CROPS: ['all']", "a"], image) == [(0.25,), (1.0,)]
    assert shares(RandomCrop(), ["GET_CROPS: ['3']", "a"], image) == [(0.25,), (near,)]
    assert shares(AllCrops("quadrants", "plain"), ["a"], image) == [(0.25, near, near, near, near)]
    assert shares(OracleCrop("always", "regions", "plain"), ["a"], image, evidence=((1, 1, 9, 9),)) == [(0.25, near)]
    assert next(VisionThink().turns(Sample((image,), "q?", "k"))).shares == (0.25,)
    asked = CropVLM("pretrained", longest=1024).turns(Sample((image,), "q?", "k"))
    assert next(asked).shares == (0.25,)  # a quarter of the authors' 2,048 squared
    assert next(CropVLM("pretrained").turns(Sample((image,), "q?", "k"))).shares == (1.0,)


def test_shares_that_cannot_be_are_refused():
    image = picture(56, 56)
    with pytest.raises(ValueError, match=r"a turn of 1 images has 2 shares; give one each, or none"):
        Turn((image,), "q", shares=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"the share of an image is 0; it is a part of the original, above 0 and at most 1"):
        Turn((image,), "q", shares=(0,))
    assert Turn((image,), "q").shown == ((image, 1.0),)


def test_native_resolution_does_not_read_the_share():
    host, image = tiny_vlm().host, picture(112, 84)
    assert host.visual_tokens(image, 0.1) == host.visual_tokens(image) and host.image_key(image, 0.1) == host.image_key(image)
    assert torch.equal(host.image_input(image, share=0.1).inputs["pixel_values"], host.image_input(image).inputs["pixel_values"])


def test_a_picture_of_another_share_is_another_input(vlm):
    image, known = picture(224, 224), {}
    made = [vlm.image_input(image, known, share) for share in (1.0, 0.25, 1.0)]
    assert made[0] is made[2] and made[0].key != made[1].key and made[0].tokens > 3 * made[1].tokens


RELEASED = {  # longest edge, pixels and tokens of a tile -> full, half-size view, two quarter crops of a page
    "SmolVLM2-2.2B": ((1536, 384, 81), (1377, 405, 810)),
    "SmolVLM2-500M": ((2048, 512, 64), (1088, 320, 640)),
    "Idefics3-8B": ((1456, 364, 169), (2873, 845, 1690)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_page_under_the_released_settings_of_smolvlm(name):
    settings, expected = RELEASED[name]
    processor, page = smolvlm_processor("idefics3", tokenizer(*SMOLVLM_MARKS), *settings), Image.new("RGB", PAGE)
    shown = [(page, 1.0), (half(page), 0.25), *((crop, 0.25) for crop in PAPER_GRID.cut(page, ("top-left", "bottom-right")))]
    full, view, *quarters = (count(Idefics3, processor, image, share) for image, share in shown)
    assert (full, view, sum(quarters)) == expected
    out = processor.image_processor(images=[[page]], return_tensors="pt")  # the processor as it is
    assert out["pixel_values"].shape[1] * settings[2] == expected[0]


def test_pages_under_the_released_settings_of_internvl():
    processor = internvl_processor(internvl().tokenizer, 448, 256)
    sizes = {PAGE: (3328, 256), (1920, 1080): (2304, 768), (640, 480): (3328, 256), (224, 224): (256, 256)}
    for size, expected in sizes.items():
        page = Image.new("RGB", size)
        counts = [count(InternVL, processor, i, s) for i, s in ((page, 1.0), (half(page), 0.25))]
        assert tuple(counts) == expected
    out = processor.image_processor(images=[Image.new("RGB", (640, 480))], return_tensors="pt", crop_to_patches=True)
    assert len(out["pixel_values"]) * 256 == 3328


SIZES = [(1, 1), (1, 200), (401, 2), (113, 225), (97, 33), (500, 333), (448, 448), (449, 447)]


@pytest.mark.parametrize("share", [1.0, 0.25, 0.5, 0.01])
def test_counted_is_made_for_odd_tiny_and_long_pictures(vlm, share):
    for size in SIZES:
        made = vlm.host.image_input(Image.new("RGB", size, (9, 99, 199)), share=share)
        assert vlm.visual_tokens(Image.new("RGB", size), share) == made.tokens == len(made.inputs["pixel_values"]) * 16
        ids = vlm.tokenizer(made.text, add_special_tokens=False)["input_ids"]
        assert ids.count(vlm.host.image_token) == made.tokens


def test_counts_hold_where_the_longest_edge_is_not_whole_tiles():
    processor = smolvlm_processor("idefics3", tokenizer(*SMOLVLM_MARKS), edge=400)
    for size in [*SIZES, *((w, h) for w in range(20, 60, 7) for h in range(20, 60, 7))]:
        out = processor.image_processor(images=[[Image.new("RGB", size)]], return_tensors="pt")
        assert count(Idefics3, processor, Image.new("RGB", size)) == out["pixel_values"].shape[1] * 16, size


def test_at_half_size_a_tiling_model_is_fed_a_share_of_its_tokens(vlm):
    samples = [Sample((picture(448, 448, i), picture(300, 448, i))[: 1 + i], f"Which, {i}?", str(i)) for i in range(2)]
    for policy, most in ((Full(), 1.0), (Low(), 0.35), (AllCrops("quadrants", "plain"), 1.6)):
        outcomes = dict(Engine(vlm, policy, 2).run(Job(s, 4) for s in samples))
        for i, outcome in outcomes.items():
            shown = [vlm.visual_tokens(image, share) for turn in outcome.turns for image, share in turn.shown]
            full = sum(vlm.visual_tokens(image) for image in samples[i].images)
            assert outcome.usage.encoded == sum(shown) and outcome.rtr == sum(shown) / full and outcome.full_tokens == full
            assert outcome.rtr <= most if len(samples[i].images) == 1 or policy != AllCrops("quadrants", "plain") else True


def test_max_pixels_lowers_the_tiles_and_what_cannot_be_is_refused():
    host, page = internvl(), Image.new("RGB", (300, 400))
    fewer, more = (InternVL(host.model, host.processor, max_pixels=tiles * 112**2) for tiles in (6, 20))
    assert host.visual_tokens(page) == 13 * 16 and fewer.visual_tokens(page) == 7 * 16 == fewer.image_input(page).tokens
    assert more.visual_tokens(page) == 13 * 16 and more.visual_tokens(Image.new("RGB", (500, 400))) == 21 * 16
    assert host.limits == {"shortest_edge": 112**2, "longest_edge": 12 * 112**2} and host.limits_name == "hf"
    smol = smolvlm("idefics3")
    less = Idefics3(smol.model, smol.processor, max_pixels=300**2)  # a longest edge of 2 tiles
    assert smol.visual_tokens(page) == 13 * 16 and less.visual_tokens(page) == 5 * 16 == less.image_input(page).tokens
    for pixels in ((1, 100), (112**2 + 1, 2**20)):
        with pytest.raises(ValueError, match=r"in tiles of 12,544 pixels, one at the least, which must lie between the two"):
            InternVL(host.model, host.processor, *pixels)
    with pytest.raises(CheckpointError, match="the processor writes 25 image tokens a tile, and the model makes 16"):
        InternVL(host.model, internvl_processor(host.tokenizer, 112, 25))


# ------------------------------------------------------------------ inside the tower


def test_the_patches_of_a_token_are_those_of_the_models_own_pixel_shuffle(vlm):
    host, tiles = vlm.host, 3
    index = torch.arange(tiles * 64, dtype=torch.float).view(tiles, 64, 1)
    if isinstance(host, InternVL):
        theirs = host.model.model.pixel_shuffle(index.view(tiles, 8, 8, 1), 0.5).reshape(tiles, 16, -1)
        index = torch.cat([torch.full((tiles, 1, 1), -1e6), index], 1)  # CLS
    else:
        theirs = host.model.model.connector.pixel_shuffle(index, 2)
    assert torch.equal(host._per_token(index)[..., 0], theirs.mean(-1))
    assert torch.equal(host._per_token(index[..., 0]), theirs.mean(-1))


@pytest.mark.parametrize("block", [-1, 0])
def test_attention_and_keys_are_those_of_the_eager_tower(vlm, block):
    host = vlm.host
    image = host.image_input(picture(300, 200))
    seen = host.encode(
        [image, host.image_input(picture(56, 56))], ("attention", "vision_keys", "middle_attention", "seed"), block
    )
    tower, pixels = host.tower, image.inputs["pixel_values"]
    before, tower.config._attn_implementation = tower.config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            weights = tower(pixel_values=pixels, output_attentions=True).attentions  # of every block (T, H, P, P)
    finally:
        tower.config._attn_implementation = before
    received, middle = (host._per_token(of_block.mean((1, 2))) for of_block in (weights[block], weights[1]))
    for tile, between, run in zip(received, middle, seen, strict=False):
        assert (run.attention - tile).abs().max() < 1e-6 and (run.middle_attention - between).abs().max() < 1e-6
        assert torch.equal(run.tower_order, torch.arange(16))
        assert run.vision_keys.shape == (16, 32) and run.grid == (4, 4)
    assert len(seen) == len(pixels) + len(host.image_input(picture(56, 56)).runs) and len({run.seed for run in seen}) == len(seen)
    plain = host.encode([image])
    assert all(torch.equal(a.features, b.features) for a, b in zip(plain, seen, strict=False)) and plain[0].attention is None
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tower.modules()]  # transformers leaves some of its own
    host.encode([image], ("attention", "middle_attention", "unmerged"))
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tower.modules()]
    with pytest.raises(RunError, match="vision block 9 is asked for, and this tower has 3"):
        host.encode([image], ("attention",), 9)


def test_keys_are_the_mean_over_heads_and_patches(vlm):
    host = vlm.host
    image, kept = host.image_input(picture(112, 84)), []
    module = host.attention_modules[-1]
    norm = module.k_norm if isinstance(host, InternVL) else torch.nn.Identity()
    hook = module.k_proj.register_forward_hook(lambda _, __, out: kept.append(norm(out).unflatten(-1, (2, -1)).mean(2)))
    try:
        (first, *_) = host.encode([image], ("vision_keys", "unmerged"))
    finally:
        hook.remove()
    assert torch.allclose(first.vision_keys, host._per_token(kept[0])[0], atol=1e-6)
    with torch.no_grad():
        leaves = host.tower(pixel_values=image.inputs["pixel_values"]).last_hidden_state
    assert torch.allclose(first.unmerged, host._per_token(leaves)[0], atol=1e-5)


# ------------------------------------------------------------------ pruners


@pytest.mark.parametrize("pruner", [DivPrune(0.4), HoloV(0.4), FastV(0.4), FastV(0.6, 1)], ids=repr)
def test_two_turns_on_the_cut_cache_are_what_masks_over_the_whole_conversation_give(vlm, pruner):
    """The oracle drops nothing: a mask per layer hides what was cut, ranked by transformers' own eager attention, and nothing is cached."""
    one = Turn((picture(300, 200, 5), picture(100, 112)), "What is it?", is_final=False)
    two = Turn((picture(150, 224, 6),), shares=(0.25,))
    session = Session()
    reply, _ = traced(vlm, Request(session, one, 4), pruner)
    _, kept = traced(vlm, Request(session, two, 1), pruner)
    assert (kept[0] - masked(vlm, pruner, one, list(reply.tokens), two)).abs().max() < 1e-4
    session = Session()
    reply, _ = traced(vlm, Request(session, one, 4))
    _, uncut = traced(vlm, Request(session, two, 1))
    assert (kept[0] - uncut[0]).abs().max() > 1e-2  # the cut is felt


@torch.no_grad()
def masked(vlm: LocalModel, pruner, one: Turn, reply: list[int], two: Turn) -> torch.Tensor:
    host, chunks, at = vlm.host, [], 0
    for turns, said, opening in (([one], [], []), ([one, two], ["x"], reply)):
        images = [host.image_input(image, share=share) for image, share in turns[-1].shown]
        chunks.append(host.chunk([*opening, *host.render(turns, said, images)], images, host.encode(images, pruner.needs), at))
        at = chunks[-1].next_position
    embeds, starts = torch.cat([c.embeds for c in chunks]), [0, len(chunks[0].embeds)]
    spans = [
        (start + s.start, start + s.stop, s, start + len(c.embeds) - 1)
        for c, start in zip(chunks, starts, strict=True)
        for s in c.spans
    ]
    length, alive, cuts = len(embeds), torch.ones(len(embeds), dtype=torch.bool), pruner.cut_layers(host.layers)
    if not cuts:
        for start, stop, span, _ in spans:
            _, chosen = pruner.reduce(span.visual, pruner.tokens_to_keep(span.full, pruner.retention))
            alive[start:stop] = False
            alive[start + chosen] = True
    rope = host.rope(embeds[None], torch.cat([c.positions for c in chunks], 1)[:, None])
    hidden, weights = embeds[None], []
    config, before = host.decoder.config, host.decoder.config._attn_implementation
    hooks = [host.decoder.layers[k].self_attn.register_forward_hook(lambda _, __, out: weights.append(out[1])) for k in cuts]
    config._attn_implementation = "eager"
    try:
        for layer in range(host.layers):
            allowed = torch.ones(length, length, dtype=torch.bool).tril() & (alive[None] | torch.eye(length, dtype=torch.bool))
            mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
            hidden = host.layer(layer, hidden, rope, attention_mask=mask)
            if layer in cuts:
                for start, stop, span, last in spans:
                    ranked = weights[-1][0, :, last, start:stop].mean(0).argsort(descending=True, stable=True)
                    alive[start + ranked[pruner.tokens_to_keep(span.full, cuts[layer]) :]] = False
    finally:
        config._attn_implementation = before
        for hook in hooks:
            hook.remove()
    return host.logits(hidden[0, -1])


@pytest.mark.parametrize("pruner", [VisionZip(0.4), SparseVLM(0.4), HoloV(0.5, "official")], ids=repr)
@pytest.mark.parametrize("kind", ["internvl", "idefics3"])
def test_pruners_that_merge_hold_in_batches_and_second_turns(kind, layout, pruner):
    vlm = LocalModel(TINY[kind](), constrained=False)

    def first() -> Request:
        return Request(Session(), Turn((picture(112, 84),), "Which?"), 2)

    def second() -> Request:
        session = Session()
        vlm.reply([Request(session, Turn((picture(224, 112),), "q", is_final=False), 2)], pruner)
        return Request(session, Turn((picture(112, 150),), shares=(0.5,)), 2)

    alone = [traced(vlm, make(), pruner) for make in (first, second)]
    requests, vlm.trace = [first(), second()], []
    together = vlm.reply(requests, pruner)
    scores, vlm.trace = torch.stack(vlm.trace), None
    for b, (reply, single) in enumerate(alone):
        assert together[b].usage.prefill == pytest.approx(reply.usage.prefill)
        assert (scores[: len(single), b] - single).abs().max() < 1e-4


def test_pooling_averages_within_a_tile(vlm):
    seen = vlm.host.encode([vlm.host.image_input(picture(300, 200))])
    for tile in seen:
        pooled, at = Pooling(0.25).reduce(tile, 4)
        whole = tile.features.view(2, 2, 2, 2, -1)
        assert torch.allclose(pooled, whole.mean((1, 3)).flatten(0, 1), atol=1e-6) and at.tolist() == [0, 2, 8, 10]
    reply, _ = traced(vlm, Request(Session(), Turn((picture(300, 200),), "q"), 1), Pooling(0.25))
    assert reply.usage.prefill * 4 == reply.usage.encoded == 16 * len(seen)


# ------------------------------------------------------------------ training


def test_a_tree_of_two_turns_has_the_log_probabilities_of_its_conversations_one_by_one(vlm):
    sample = Sample((picture(224, 168, 3),), "Which way?", "k")
    replies = (["GET_CROPS: ['3']", "42"], ["GET_CROPS: ['3']", "7"], ["GET_CROPS: ['1', '6']", "no"], ["yes"])
    group = [render(vlm, AwaRes(), sample, list(said)) for said in replies]
    scorer, tree = Scorer(vlm.host), pack([group], vlm.host)
    assert tree.tokens < sum(len(c.ids) for c in group)
    with torch.no_grad():
        together, _ = scorer(tree, vlm.encode(tree.images))
        for i, c in enumerate(group):
            alone = pack([[c]], vlm.host)
            single, _ = scorer(alone, vlm.encode(alone.images))
            assert (together[tree.conversation_index == i] - single).abs().max() < 1e-5


def test_a_greedy_rollout_is_the_engines_answer(vlm):
    samples = [Sample((picture(224, 168, i),), f"Number {i}?", f"s{i}") for i in range(2)]
    groups, _ = rollouts(vlm, AwaRes(), samples, 2, 6, temperature=0)
    outcomes = dict(Engine(vlm, AwaRes(), 2).run(Job(s, 6) for s in samples))
    for i, group in enumerate(groups):
        for rollout in group:
            assert [r.tokens for r in rollout.trajectory.replies] == [r.tokens for r in outcomes[i].replies]
            assert rollout.trajectory.rtr == outcomes[i].rtr
    assert not set(banned_tokens(vlm.host)) & {vlm.host.end_of_turn}


def test_a_reply_begins_as_the_template_writes_it(vlm):
    """SmolVLM's template has a space between ``Assistant:`` and the reply: the model writes it, and so does who writes for the model."""
    space = " " if isinstance(vlm.host, Idefics3) else ""
    assert vlm.host.opening == GenericHost(vlm.host.model, vlm.host.processor).opening == space
    said = PAPER_GRID.format(("left",))
    ids = vlm.tokenizer(space + said, add_special_tokens=False)["input_ids"]
    assert vlm.text(ids) == said and vlm.text(ids, ("[",)) == said.split("[")[0] and vlm.host.reply_tokens(said) == ids
    sample = Sample((picture(224, 168),), "Which way?", "k")
    conversation = render(vlm, AwaRes(), sample, [said, "42"])
    assert conversation.ids[slice(*conversation.replies[0])] == [*ids, vlm.host.end_of_turn]
    whole = vlm.tokenizer.decode(conversation.ids)
    assert ("Assistant: GET" in whole and "Assistant: 42<end_of_utterance>" in whole) == bool(space)
    ((_, outcome),) = Engine(vlm, AllCrops(), 1).run([Job(sample, 2)])
    assert outcome.replies[0].text == PAPER_GRID.format(("all",))


def test_all_that_runs_before_the_decoder_is_left_out_of_training(vlm):
    host = vlm.host
    every, before = (
        {id(p) for p in module.parameters()} for module in (host.model.model, torch.nn.ModuleList(host.vision_parts))
    )
    assert every - before == {id(p) for p in host.decoder.parameters()}


# ------------------------------------------------------------------ checkpoints


def saved(host, folder):
    host.model.save_pretrained(folder)
    host.processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["internvl", "idefics3"])
def test_a_checkpoint_folder_is_loaded_and_answers_alike(kind, tmp_path):
    host = TINY[kind]()
    turn = Turn((picture(224, 112),), "Which way?")
    loaded = LocalModel.load(saved(host, tmp_path), device="cpu", constrained=False)
    assert type(loaded.host) is type(host) and loaded.host.tiles
    ours, theirs = (traced(vlm, Request(Session(), turn, 3))[1] for vlm in (loaded, LocalModel(host, constrained=False)))
    assert (ours - theirs).abs().max() < 1e-5


def test_who_cannot_be_told_a_share_says_so_and_counts_what_is_shown(tmp_path):
    host = TINY["idefics3"]()
    folder, samples = saved(host, tmp_path), [Sample((picture(448, 448),), "Which?", "k")]
    server = start()
    server.state["more"] = None  # it counts no tokens
    served = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", folder)
    try:
        for model in (served, GenericModel(GenericHost(host.model, host.processor), constrained=False)):
            ((_, outcome),) = Engine(model, Low(), 1).run([Job(samples[0], 64)])
            assert {e.kind for e in outcome.events} >= {"low_view_not_a_quarter", "share_not_told"} and outcome.rtr == 1.0
            ((_, outcome),) = Engine(model, Full(), 1).run([Job(samples[0], 64)])
            assert "share_not_told" not in {e.kind for e in outcome.events}
            assert outcome.full_tokens == outcome.usage.encoded == host.visual_tokens(samples[0].images[0])
    finally:
        server.shutdown()


def test_proxies_that_cut_pictures_into_tiles(tmp_path):
    """CropVLM's cropper and CARES' proxy are SmolVLMs in the authors' releases."""
    target, proxy = tiny_vlm(), LocalModel(TINY["idefics3"](), constrained=False)
    sample = Sample((picture(224, 224),), "Which?", "k")
    for longest, tiles in ((2048, 17), (1024, 5), (512, 1)):  # the authors' --longest_edge
        engine = Engine(target, CropVLM("other", longest=longest), 1, models={"cropper": proxy})
        ((_, outcome),) = engine.run([Job(sample, 4)])
        assert outcome.turns[0].model == "cropper" and outcome.usage.aux_encoded == 16 * tiles and outcome.rtr >= 1
    gate = Gate(np.ones((2, 64)), np.zeros(2), (112, 224), 112, 0.5)
    gate.save(tmp_path / "gate.safetensors")
    for vlm in (proxy, target):
        engine = Engine(vlm, Cares(str(tmp_path / "gate.safetensors"), "other"), 1, models={"proxy": proxy})
        ((_, outcome),) = engine.run([Job(sample, 4)])
        assert outcome.usage.aux_encoded == 5 * 16 and outcome.turns[0].shares == (0.25,) and outcome.rtr <= 1


def test_smolvlm_is_idefics3_by_another_name():
    pytest.importorskip("num2words")
    smol, idefics = smolvlm(), smolvlm("idefics3")
    one, two = Turn((picture(300, 200),), "Which way?", system=PAPER_GRID.prompt, is_final=False), Turn((picture(112, 84),))
    found = []
    for host in (smol, idefics):
        session, vlm = Session(), LocalModel(host, constrained=False)
        found.append((traced(vlm, Request(session, one, 4))[1], traced(vlm, Request(session, two, 4), FastV(0.5))[1]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    image = smol.image_input(one.images[0])
    ids = torch.tensor([smol.render([one], [], [image])])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image.inputs["pixel_values"][None]}
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs = torch.stack(smol.model.generate(**inputs, **how).logits)[:, 0]
    assert (theirs - found[0][0][: len(theirs)]).abs().max() < 1e-4


def test_a_decoder_that_is_not_known_is_refused(monkeypatch):
    host = TINY["internvl"]()
    monkeypatch.setattr(host.decoder.config, "layer_types", ["full_attention", "sliding_attention"])
    with pytest.raises(CheckpointError, match=r"has a qwen2 decoder with sliding_attention; known decoders: llama, qwen2, qwen3"):
        host.on(host.model)
    monkeypatch.setattr(host.decoder.config, "model_type", "granite")
    with pytest.raises(CheckpointError, match=r"this internvl checkpoint has a granite decoder.*engine=generic runs it"):
        host.on(host.model)


def test_smolvlm_without_num2words_is_refused_with_the_packages_name(tmp_path, monkeypatch):
    pytest.importorskip("num2words")
    folder = saved(smolvlm(), tmp_path)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(CheckpointError, match=r"cannot load the processor of .*pip install num2words"):
        LocalModel.load(folder, device="cpu")
