"""Every family of ``models``: the contract of ``HostModel`` on a tiny random model; and a family that is made here, in one class."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from awares_bench.awares import AwaRes
from awares_bench.baselines.dart import Dart
from awares_bench.baselines.divprune import DivPrune
from awares_bench.baselines.fastv import FastV
from awares_bench.baselines.full import Full
from awares_bench.baselines.hiprune import HiPrune
from awares_bench.baselines.holov import HoloV
from awares_bench.baselines.mmtok import MMTok
from awares_bench.baselines.pyramiddrop import PyramidDrop
from awares_bench.baselines.sparsevlm import SparseVLM
from awares_bench.baselines.visionselector import VisionSelector
from awares_bench.baselines.visionzip import VisionZip
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Sample, Turn, chat_messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.methods.pruner import Pruner, VisualTokens
from awares_bench.models.base import HostModel, ImageInput, joined
from awares_bench.models.families import families
from awares_bench.models.scorer import PARTS
from awares_bench.models.smolvlm import Idefics3
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.recipe import check
from awares_bench.training.rendering import render
from awares_bench.training.rollouts import banned_tokens, rollouts
from awares_bench.training.token_scorer import ScorerRecipe, SoftSelection, write

from ..helpers.tiny import picture, tiny_vlm
from ..helpers.tiny_tiles import internvl, smolvlm
from . import tiny_families

TOLERANCE = 1e-4
SPARSE = SparseVLM(0.5)
SIZES = [(224, 168), (56, 56), (28, 84), (200, 97), (20, 2000)]
TURN = Turn((picture(112, 84),), "Which way?")


class Strips(HostModel):
    """The smallest family: a picture is the mean colours of its four strips, positions are plain, the decoder is a Llama."""

    model_types = ("strips",)
    model_class = LlamaForCausalLM
    provides = frozenset({"decoder_attention", "seed"})
    lora_targets = r".*\.(q|k|v|o|gate|up|down)_proj"
    decoder_layer = "LlamaDecoderLayer"

    @classmethod
    def count_tokens(cls, processor, limits, image, share=1.0):
        return 4

    def image_input(self, image, key="", share=1.0):
        strips = torch.from_numpy(np.asarray(image.resize((1, 4)), dtype=np.float32)[:, 0] / 255)
        return ImageInput({"strips": strips}, ((4, 1),), self.placeholder * 4, key=key)

    @torch.no_grad()
    def encode(self, images, needs=(), block=-1):
        seeds = [image.seed if "seed" in needs else 0 for image in images]
        features = [self.tower(image.inputs["strips"].to(self.device)) for image in images]
        return [VisualTokens(f, (4, 1), torch.arange(4), seed=s) for f, s in zip(features, seeds, strict=True)]

    @property
    def decoder(self):
        return self.model.model

    @property
    def tower(self):
        return self.model.strips


def strips() -> HostModel:
    torch.manual_seed(0)
    processor = tiny_vlm().host.processor
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(processor.tokenizer) + 8, **sizes)).float()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    model.strips = torch.nn.Linear(3, 64)
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return Strips(model, processor)


TINY = {
    "qwen2_5_vl": lambda: tiny_vlm().host,
    "qwen2_vl": tiny_families.qwen2_vl,
    "qwen3_vl": tiny_families.qwen3_vl,
    "qwen3_vl_moe": tiny_families.qwen3_vl_moe,
    "glm4v": tiny_families.glm4v,
    "internvl": internvl,
    "idefics3": lambda: smolvlm("idefics3"),
    "smolvlm": smolvlm,
    "strips": strips,
}
"""A tiny random model of every family, and of the one made here."""


LIKE_ANOTHER = ("qwen3_vl_moe", "idefics3", "glm4v")
"""Families that differ from another here by a router or norms, or have files of their own (test_tiles.py, test_glm4v.py): slow, for a short suite."""


# smolvlm is Idefics3's class with other names: test_tiles.py compares the two
@pytest.fixture(params=[pytest.param(f, marks=[pytest.mark.slow] * (f in LIKE_ANOTHER)) for f in TINY if f != "smolvlm"])
def vlm(request) -> LocalModel:
    return LocalModel(TINY[request.param](), constrained=False)


def name_of(pruner) -> str:
    return type(pruner).__name__ if pruner else "plain"


def scores(vlm: LocalModel, requests: list[Request], pruner=None) -> torch.Tensor:
    """(steps, B, vocabulary) of the replies."""
    vlm.trace = []
    try:
        vlm.reply(requests, pruner)
        return torch.stack(vlm.trace)
    finally:
        vlm.trace = None


def test_every_family_has_a_tiny_model_here():
    assert set(families()) <= {*TINY, "glm46v"}  # GLM-4.6V has the modules of GLM-4.1V


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # GLM's processor (transformers 5.24) and NumPy 2
def test_scores_are_those_of_generate(vlm):
    host, images = vlm.host, [vlm.host.image_input(i) for i in TURN.images]
    ids = torch.tensor([host.render([TURN], [], images)])
    features = torch.cat([run.features for run in host.encode(images)])
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if isinstance(host, Strips):
        out = host.model.generate(inputs_embeds=host.embed(ids, features), **how)
    else:
        text = host.processor.apply_chat_template(chat_messages([TURN], []), tokenize=False, add_generation_prompt=True)
        images = [list(TURN.images)] if isinstance(host, Idefics3) else list(TURN.images)
        out = host.model.generate(**host.processor(text=[text], images=images, return_tensors="pt"), **how)
    theirs, ours = torch.stack(out.logits), scores(vlm, [Request(Session(), TURN, 5)])
    steps = min(len(theirs), len(ours))
    assert steps and (theirs[:steps] - ours[:steps]).abs().max() < TOLERANCE


def test_a_second_turn_is_a_fresh_prefill_of_everything(vlm):
    one = Turn((half(picture(224, 168)),), "q?", system=PAPER_GRID.prompt, is_final=False)
    two, session, host = Turn((picture(84, 56),), "and?"), Session(), vlm.host
    (reply,) = vlm.reply([Request(session, one, 4)])
    kept = scores(vlm, [Request(session, two, 1)])[0, 0]
    images = [[host.image_input(i) for i in turn.images] for turn in (one, two)]
    ids = [*host.render([one], [], images[0]), *reply.tokens, *host.render([one, two], ["x"], images[1])]
    every = [*images[0], *images[1]]
    visual, tokens = host.encode(every), torch.tensor([ids])
    chunk = host.chunk(ids, every, visual, 0)
    hidden = host.hidden_states(tokens, joined(visual), chunk.positions[:, None], torch.ones_like(tokens))
    assert (host.model.get_output_embeddings()(hidden[0, -1]) - kept).abs().max() < TOLERANCE


EACH_NEED = [DivPrune(0.5), FastV(0.5), VisionZip(0.5), HoloV(0.5), SPARSE, HiPrune(0.5), MMTok(0.5), PyramidDrop(0.5), Dart(0.5)]
"""Pruners that together ask for all that a family may provide."""


@pytest.mark.parametrize("pruner", [None, *EACH_NEED], ids=name_of)
def test_a_mixed_batch_is_each_row_alone(vlm, layout, pruner):
    if pruner and set(pruner.needs) - {"question"} - vlm.host.provides:
        pytest.skip("not provided")
    turns = [TURN, Turn((picture(224, 168), picture(56, 56)), "Same?"), Turn((), "No picture?")]
    together = scores(vlm, [Request(Session(), t, 4) for t in turns], pruner)
    for b, turn in enumerate(turns):
        alone = scores(vlm, [Request(Session(), turn, 4)], pruner)[:, 0]
        assert (together[: len(alone), b] - alone).abs().max() < TOLERANCE


@dataclass(frozen=True)
class Spread(Pruner):
    """Keeps tokens that are spread evenly, before the decoder or after its layers."""

    after: tuple[int, ...] = ()

    def select(self, image, n):
        return torch.linspace(0, len(image.features) - 1, n).long()

    def cut_layers(self, layers):
        return {layer: self.retention / (1 + i) for i, layer in enumerate(self.after)}


@pytest.mark.parametrize("after", [(), (0,), (1,), (0, 1)], ids=str)
def test_a_cut_is_the_same_tokens_hidden_from_every_layer_behind_it(vlm, after, layout):
    """Against the family's own decoder in transformers, on all tokens, with a mask a layer."""
    turn, host, pruner = Turn((picture(224, 168), picture(168, 224)), "Same?"), vlm.host, Spread(0.5, after)
    cut = scores(vlm, [Request(Session(), turn, 1)], pruner)[0, 0]
    images = [host.image_input(i) for i in turn.images]
    ids, visual = host.render([turn], [], images), host.encode(images)
    spans = host.chunk(ids, images, visual, 0).spans
    visible = torch.ones(host.layers, len(ids), dtype=torch.bool)
    for span in spans:
        kept = torch.arange(span.start, span.stop)
        for first, share in {layer + 1: share for layer, share in pruner.cut_layers(host.layers).items()}.items() or [(0, 0.5)]:
            kept = kept[pruner.select(replace(span.visual, features=kept), max(1, int(share * span.full)))]
            visible[first:, span.start : span.stop] = False
            visible[first:, kept] = True
    hooks = []
    for layer, seen in zip(host.decoder.layers, visible, strict=True):
        allowed = torch.eye(len(ids), dtype=torch.bool) | torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & seen

        def masked(module, args, kwargs, allowed=allowed):
            return args, {**kwargs, "attention_mask": allowed[None, None]}

        hooks.append(layer.register_forward_pre_hook(masked, with_kwargs=True))
    tokens, (positions, _) = torch.tensor([ids]), host.positions(ids, images)
    uncut = host.hidden_states(tokens, joined(visual), positions[:, None], torch.ones_like(tokens))
    for hook in hooks:
        hook.remove()
    other = scores(vlm, [Request(Session(), turn, 1)])[0, 0]
    assert (host.model.get_output_embeddings()(uncut[0, -1]) - cut).abs().max() < TOLERANCE < (other - cut).abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_counted_as_they_are_encoded(vlm, size):
    made = vlm.host.image_input(picture(*size))
    assert vlm.visual_tokens(picture(*size)) == made.tokens == sum(len(run.features) for run in vlm.host.encode([made]))


def test_the_end_of_a_turn_is_found_by_rendering(vlm):
    assert vlm.host.end_of_turn in vlm.host.stop and vlm.host.end_of_turn not in banned_tokens(vlm.host)


def test_the_model_is_left_as_it_was(vlm):
    before = vlm.host.attention, {name for name, _ in vlm.host.model.named_modules()}
    scores(vlm, [Request(Session(), TURN, 2)], FastV(0.5))
    vlm.host.decoder.layers[-1].register_forward_pre_hook(broken := lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlm.reply([Request(Session(), TURN, 2)], FastV(0.5))
    assert broken and before == (vlm.host.attention, {name for name, _ in vlm.host.model.named_modules()})
    vlm.host.decoder.layers[-1]._forward_pre_hooks.clear()
    assert not any("forward" in vars(module) for module in vlm.host.model.modules())


def test_policies_pruners_scoring_and_rollouts_run_on_it(vlm):
    samples = [Sample((picture(224, 168, i),), f"Which, {i}?", str(i)) for i in range(2)]
    for policy, pruner in ((Full(), None), (AwaRes(), None), (Full(), DivPrune(0.5)), (Full(), FastV(0.5))):
        outcomes = dict(Engine(vlm, policy, 2, pruner=pruner).run(Job(s, 4) for s in samples))
        assert all(o.rtr <= 1 for o in outcomes.values()) and len(outcomes) == 2
    groups, _ = rollouts(vlm, Full(), samples, 2, 6)
    packed = pack([[r.conversation for r in g] for g in groups], vlm.host)
    with torch.no_grad():
        scored, _ = Scorer(vlm.host, banned_tokens(vlm.host))(packed, vlm.encode(packed.images))
    sampled = torch.tensor([x for g in groups for r in g for x in r.logprobs])
    assert (scored - sampled).abs().max() < TOLERANCE


def test_one_row_of_many_continuations_scores_as_each_alone(vlm):
    samples = [Sample((picture(224, 168),), "Which?", "0")]
    (group,), _ = rollouts(vlm, Full(), samples, 3, 6)
    talks = [r.conversation for r in group]
    score, packed = Scorer(vlm.host, banned_tokens(vlm.host)), pack([talks], vlm.host)
    with torch.no_grad():
        together, _ = score(packed, vlm.encode(packed.images))
        alone = [pack([[talk]], vlm.host) for talk in talks]
        apart = torch.cat([score(p, vlm.encode(p.images))[0] for p in alone])
    assert (together - apart).abs().max() < 1e-5


@pytest.mark.parametrize("weighs", ["features", "attention"])
def test_a_scorer_of_tokens_learns_on_it_and_nothing_else_does(vlm, weighs, tmp_path):
    """VisionSelector's: the loss falls, gradients reach the scorer alone, and the pruner keeps what training ends with."""
    said = {"start": "", "data": "", "out": "", "weighs": weighs, "hidden": 8, "spread": 0.02, "retention": 0.5}
    host = vlm.host
    wanted = [(p, p.requires_grad) for p in host.model.parameters()]
    host.model.requires_grad_(False)
    module = SoftSelection(host, check(ScorerRecipe, said))
    talk = render(vlm, Full(), Sample((picture(112, 84),), "Which?", "0"), ["42"])
    packed, runs = pack([[talk]], host), host.encode(talk.images)
    optimizer, losses = torch.optim.Adam(module.parameters(), 1e-3), []
    for _ in range(12):
        out, _, _ = module(packed, joined(runs))
        losses.append(-out.mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert min(losses) < losses[0] - 1e-4
    assert {n for n, _ in module.named_parameters()} == set(PARTS)
    assert all(p.grad.any() for n, p in module.named_parameters() if n != "q_proj.bias")  # which shifts all scores alike
    assert all(p.grad is None for p in host.model.parameters())
    write(module, tmp_path / "scorer.safetensors")
    pruner, at = VisionSelector(0.5, str(tmp_path / "scorer.safetensors")), 0
    _, kept = module.choose(torch.cat([run.features for run in runs]), talk.images)
    for run in runs:
        n = pruner.tokens_to_keep(len(run.features), 0.5)
        assert kept[at : at + len(run.features)].nonzero()[:, 0].tolist() == pruner.select(run, n).tolist()
        at += len(run.features)
    for parameter, grad in wanted:
        parameter.requires_grad_(grad)


def test_training_finds_the_layers_that_it_adapts_and_shares_out(vlm):
    host = vlm.host
    assert {type(layer).__name__ for layer in host.decoder.layers} == {host.decoder_layer}
    linear = [
        name for name, m in host.model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(host.lora_targets, name)
    ]
    in_decoder = [name for name, m in host.decoder.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == len(in_decoder) >= 4 * host.layers


def test_what_a_family_does_not_provide_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="VisionZip needs attention, vision_keys, which a strips host does not provide"):
        Engine(LocalModel(strips()), Full(), pruner=VisionZip(0.5))
