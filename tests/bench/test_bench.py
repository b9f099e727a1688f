"""The bench: published sizes, operations against PyTorch's own counter, and a run whose ratios come from its own rows."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from awares_bench.bench.contestants import Pages
from awares_bench.bench.engine_bench import Settings, constrained, run
from awares_bench.bench.synthetic_models import geometry, random_model
from awares_bench.cli import main
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Turn
from awares_bench.models import qwen_vision
from awares_bench.models.cpu_kernels import ONEDNN
from awares_bench.models.families import host_of
from awares_bench.models.flops import decoder_flops, vision_flops

from ..helpers.tiny import encode, picture, pixels
from ..inference.test_vlm import TOLERANCE, ours
from ..models import tiny_families


@pytest.mark.parametrize(("name", "billions"), [("3b", 3.7546), ("7b", 8.2922)])
def test_geometries_have_the_published_number_of_parameters(name, billions):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(geometry(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-4)


def test_an_unknown_geometry_lists_the_known():
    with pytest.raises(ValueError, match="known: nano, 3b, 7b"):
        geometry("72b")
    with pytest.raises(ValueError, match="at least 1"):
        geometry("3b", 0)


@pytest.fixture(scope="module")
def vlm():
    return LocalModel(host_of(*random_model(geometry("nano"), torch.float32, "cpu")))


@pytest.mark.parametrize("matmul_attention", [False, True], ids=["fused", "products"])  # with AMX, and without it
@pytest.mark.parametrize("size", [(336, 224), (448, 336)])  # below and above the patches that attend by products
def test_operations_are_those_that_pytorch_counts(vlm, monkeypatch, size, matmul_attention):
    monkeypatch.setattr(qwen_vision, "USE_MATMUL_ATTENTION", matmul_attention and qwen_vision.ONEDNN)
    patches, grid, _ = pixels(vlm, picture(*size))
    with counted() as counter:
        encode(vlm, [patches], [grid])
    config = vlm.host.model.config.vision_config.to_dict()
    assert vision_flops(grid[1] * grid[2] // 4, config) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_operations_of_other_families_are_those_that_pytorch_counts(family):
    host = getattr(tiny_families, family)()
    image = host.image_input(picture(416, 256))
    with counted() as counter:
        host.encode([image])
    config = host.model.config.vision_config.to_dict()
    assert vision_flops(image.tokens, config) == pytest.approx(counter.get_total_flops(), rel=0.02)
    text, new = host.model.config.text_config, 300
    masked = text.num_hidden_layers * 2 * text.num_attention_heads * host.decoder.layers[0].self_attn.head_dim * new * (new - 1)
    if family == "qwen3_vl_moe":
        host.model.set_experts_implementation("eager")  # the counter does not know the grouped products
    with torch.no_grad(), counted() as counter:
        hidden = host.decoder(inputs_embeds=torch.randn(1, new, text.hidden_size), use_cache=False).last_hidden_state
        host.model.lm_head(hidden[:, -1])
    assert decoder_flops(new, text.to_dict()) + masked == pytest.approx(counter.get_total_flops(), rel=0.02)


@contextmanager
def counted():
    """PyTorch's counter. It knows neither the CPU's fused attention, in whose place the plain products run, nor oneDNN's product."""
    onednn = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x) * w[0]} if ONEDNN else {}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        yield counter


def test_operations_of_the_decoder_are_those_that_pytorch_counts(vlm):
    text = vlm.host.model.config.text_config
    config = text.to_dict()
    for new in (40, 400):
        embeds = torch.zeros(1, new, text.hidden_size)
        with torch.no_grad(), counted() as counter:
            hidden = vlm.host.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
            vlm.host.model.lm_head(hidden[:, -1])
        masked = text.num_hidden_layers * 2 * text.hidden_size * new * (new - 1)  # the half that a causal kernel skips
        assert decoder_flops(new, config) + masked == pytest.approx(counter.get_total_flops(), rel=0.02)
    whole = decoder_flops(300, config)
    parts = decoder_flops(200, config) + decoder_flops(100, config, 200)
    assert parts - whole == pytest.approx(2 * text.hidden_size * text.vocab_size)  # the scores, once more


def test_forced_replies_are_made_of_the_forced_tokens_and_scored_by_the_model(vlm):
    turn = Turn((picture(112, 112),), "Which?")
    _, free = ours(vlm, [Request(Session(), turn, 4)])
    (reply,), forced = ours(vlm, [Request(Session(), turn, 4, forced_tokens=(5, 6))])
    assert reply.tokens == (5, 6) and reply.complete
    assert (free[0] - forced[0]).abs().max() < TOLERANCE


def test_everything_again_feeds_the_conversation_that_one_cache_holds(vlm):
    pages = Pages(vlm, tokens=64, documents=4, call_rate=0.5, answer_length=3)
    assert pages.calls == [False, True, False, True] and pages.images[0].size == (168, 280)
    vlm.trace = []
    kept = pages.low_then_crop()
    one = vlm.trace[-len(pages.answer) - 1 :]
    vlm.trace = []
    again = pages.low_then_everything()
    two = vlm.trace[-len(pages.answer) - 1 :]
    vlm.trace = None
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(one, two, strict=True))
    assert len(kept[1]) == len(again[1]) == 2 and again[1][0].encoded == 2 * kept[1][0].encoded
    assert pages.difference() < TOLERANCE


def test_a_run_prints_rows_and_figures_and_writes_them(tmp_path, capsys):
    path = tmp_path / "bench.json"
    run(Settings(geometry="nano", layers=2, tokens=64, answer=3, repeats=2, parts=("turns", "stock"), json_file=path))
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert result["about"]["layers_cut_to"] == 2 and "layers_cut_to" in printed
    rows, figures = {r["name"]: r for r in result["rows"]}, {f["name"]: f for f in result["figures"]}
    assert set(rows) == {
        "full: ours",
        "AwaRes: ours, one cache",
        "AwaRes: ours, everything again",
        "full: model.generate",
        "AwaRes: model.generate twice",
    }
    for row in rows.values():
        assert row["seconds"] > 0 and row["floor_seconds"] > 0 and row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert sum(sum(p.values()) for p in row["phases"]) == pytest.approx(row["seconds"], rel=0.5)
    full, kept = rows["full: ours"], rows["AwaRes: ours, one cache"]
    assert rows["full: model.generate"]["text_tokens"] == full["text_tokens"]
    assert figures["AwaRes over full resolution, tokens (RTR)"]["value"] == kept["visual_tokens"] / full["visual_tokens"]
    assert figures["AwaRes over full resolution, seconds"]["value"] == pytest.approx(kept["seconds"] / full["seconds"])
    assert figures["decode passes of the first turn, grammar (2) over none (6)"]["met"]
    assert figures["largest difference of a score from model.generate"]["met"]
    with pytest.raises(ValueError, match="call rate is 2"):
        Settings(call_rate=2)
    with pytest.raises(ValueError, match=r"--parts holds 'towers'; known: vision, turns, stock, suite"):
        Settings(parts=("towers",))


def test_a_part_of_the_bench_refuses_the_flags_that_it_does_not_read(capsys):
    for words in (
        ["pruners", "--call-rate", "0.5"],
        ["pruners", "--pretrained", "nano"],
        ["grpo", "--tokens", "64"],
        ["engine", "--group", "2"],
    ):
        with pytest.raises(SystemExit):
            main(["bench", *words])
        assert f"unrecognized arguments: {words[1]}" in capsys.readouterr().err


def test_a_model_is_left_as_it_was_after_its_grammar_was_switched(vlm):
    with pytest.raises(KeyError), constrained(vlm, False):
        assert not vlm.constrained
        raise KeyError
    assert vlm.constrained


def test_a_server_is_measured_on_the_same_documents_each_round_new_to_every_cache(server, capsys):
    server.state["seconds"] = 0
    about = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "served_model": "m"}
    result = run(Settings(pretrained="nano", parts=("served",), documents=3, repeats=1, **about))
    figures = {f["name"]: f for f in result["figures"]}
    for method in ("full", "awares"):
        ratio = figures[f"nano suite, {method}, documents per second, ours over served"]
        assert ratio["value"] > 0 and ratio["aim"] == ">= 1"
        assert (
            figures[f"nano suite, {method}, share of equal answers, ours and served"]["met"] is False
        )  # the fake says what it says
    pictures = [
        part["image_url"]["url"]
        for body in server.state["bodies"]
        if len(body["messages"]) == 1
        for part in body["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert len(set(pictures)) == len(pictures) == 1 + 2 * 3  # the first question, and full twice


def test_parts_that_need_something_say_what():
    with pytest.raises(ValueError, match=r"pass --base-url .* --served-model NAME"):
        Settings(pretrained="nano", parts=("served",))
    for given in ({"vllm_options": {}}, {"base_url": "http://localhost:8000/v1"}, {"served_model": "m"}):
        with pytest.raises(ValueError, match=r"is read by --parts \w+ only; add that part, or leave it out"):
            Settings(pretrained="nano", parts=("suite",), **given)
    with pytest.raises(ValueError, match="--parts contention needs a checkpoint"):
        Settings(geometry="3b", parts=("contention",))


@pytest.mark.slow
def test_the_engine_beside_busy_processes_is_measured_in_processes_of_its_own(capsys):
    result = run(Settings(pretrained="nano", parts=("contention",), documents=4, repeats=1))
    figures = {f["name"]: f["value"] for f in result["figures"]}
    assert len(figures) == 16 and all(value > 0 for value in figures.values())
    assert max(value for name, value in figures.items() if name.startswith("cores that it got")) < 2.1
