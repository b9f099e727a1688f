"""The authors' own outputs. ``AWARES_GOLDEN`` names another folder of the same layout; cases are found by file name there.

What follows a case's kind in its file name is free, and so are sizes, ratios and budgets: they are read from the files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from awares_bench.baselines.fastv import FastV
from awares_bench.baselines.holov import HoloV
from awares_bench.baselines.sparsevlm import SparseVLM, cluster, recycled
from awares_bench.baselines.visionzip import VisionZip
from awares_bench.inference.layerwise_batch import LayerwiseBatch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.session import Session
from awares_bench.methods.pruner import Pruner, ReleasedQuirks, VisualTokens
from awares_bench.models.prompt_chunk import ImageSpan, PromptChunk
from awares_bench.models.qwen2_5_vl import Qwen2_5_VL

from .tiny import embedded, see

GOLDEN = Path(os.environ.get("AWARES_GOLDEN") or Path(__file__).parent / "golden")
TOLERANCE = 2e-4


def cases(method: str, kind: str):
    """Parametrise over ``<method>/<kind>_*``: a skip where the folder has none."""
    files = sorted((GOLDEN / method).glob(f"{kind}_*.safetensors"))
    return pytest.mark.parametrize("path", files, ids=lambda p: p.stem)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert (ours.float() - theirs.float()).abs().max() <= tolerance


@lru_cache(maxsize=4)
def model(name: str, attention: str = "sdpa") -> LocalModel:
    """A golden checkpoint without a tokenizer: prompts are token ids."""
    config = Qwen2_5_VLConfig.from_pretrained(GOLDEN / name)
    weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        GOLDEN / name, config=config, dtype=torch.float32, attn_implementation=attention
    )
    tokenizer = SimpleNamespace(eos_token_id=245, pad_token_id=243, convert_ids_to_tokens=str)
    return LocalModel(Qwen2_5_VL(weights, SimpleNamespace(tokenizer=tokenizer)))


def prompt(vlm: LocalModel, name: str, pruner: Pruner | None = None) -> tuple[PromptChunk, VisualTokens]:
    """An input file -> the unpruned chunk and its image."""
    with np.load(GOLDEN / name) as file:
        ids, grids = file["input_ids"][0].tolist(), [tuple(g) for g in file["image_grid_thw"].tolist()]
        patches = torch.from_numpy(file["pixel_values_x2"]).float() / 2
    images = see(vlm, [patches], grids, pruner)
    return embedded(vlm, ids, grids, images), images[0]


@dataclass
class Run:
    """A prefill: hidden states (L, D) after the last layer and entering each, and the batch to go on with."""

    vlm: LocalModel
    batch: PaddedBatch
    hidden: Tensor
    entering: list[Tensor]

    def logits(self, last: int) -> Tensor:
        return self.vlm.host.model.lm_head(self.vlm.host.decoder.norm(self.hidden[-last:]))

    def greedy(self, steps: int, below: int) -> tuple[list[int], Tensor]:
        """Tokens of a greedy continuation among ids under ``below``, and the logits after the last of them."""
        written, scores = [], self.logits(1)[-1]
        for step in range(steps):
            written.append(int(scores[:below].argmax()))
            self.batch.mask = torch.cat([self.batch.mask, torch.ones_like(self.batch.mask[:, :1])], 1)
            embeds = self.vlm.host.decoder.get_input_embeddings()(torch.tensor([written[-1:]]))
            hidden = self.batch.run_layers(embeds, (self.batch.starts + step)[None, :, None].expand(3, -1, -1))
            scores = self.vlm.host.logits(hidden).flatten()
        return written, scores


@torch.inference_mode()
def prefill(vlm: LocalModel, chunk: PromptChunk, pruner: Pruner | None = None) -> Run:
    stages = vlm.cut_layers(pruner)
    batch = (
        LayerwiseBatch(vlm.host, [Session()], [chunk], pruner, stages) if stages else PaddedBatch(vlm.host, [Session()], [chunk])
    )
    into: list[Tensor] = []

    def remember(module, args):
        into.append(args[0][0])

    hooks = [layer.register_forward_pre_hook(remember) for layer in vlm.host.decoder.layers]
    hooks.append(vlm.host.decoder.layers[-1].register_forward_hook(lambda _, args, out: into.append(out[0])))
    try:
        batch.prefill()
    finally:
        for hook in hooks:
            hook.remove()
    return Run(vlm, batch, into[-1], into[:-1])


def test_the_folder_holds_cases():
    assert list(GOLDEN.glob("*/*_*.safetensors")), f"no golden cases in {GOLDEN}"


# ------------------------------------------------------------------ the model without a pruner


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("tiny-qwen2_5_vl", "vanilla")
def test_vanilla(path, attention):
    want, _ = read(path)
    vlm = model("tiny-qwen2_5_vl", attention)
    chunk, image = prompt(vlm, f"tiny-qwen2_5_vl/inputs_{path.stem.removeprefix('vanilla_')}.npz")
    close(image.features, want["image_features"])
    assert torch.equal(chunk.positions, want["position_ids"][:, 0])
    assert chunk.next_position == len(chunk.embeds) + int(want["rope_deltas"])
    run = prefill(vlm, chunk)
    close(run.logits(12), want["logits_last12"])
    with torch.inference_mode():
        assert run.greedy(8, 240)[0] == want["greedy8"].tolist()


# ------------------------------------------------------------------ VisionZip


def visionzip(meta: dict[str, str]) -> VisionZip:
    dominant, contextual = float(meta["dominant_ratio"]), float(meta["contextual_ratio"])
    return VisionZip(round(dominant + contextual, 10), contextual, "official")


@cases("visionzip", "select_qwen25")
def test_visionzip_select_qwen25(path):
    want, meta = read(path)
    pruner, n = visionzip(meta), len(want["scores"])
    assert n == int(meta["N"])
    image = VisualTokens(want["image_embeds"], (1, n), attention=want["scores"], vision_keys=want["metric"])
    dominant, contextual = pruner.counts(n, pruner.tokens_to_keep(n, pruner.retention))
    assert torch.equal(pruner.select(image, dominant), want["dominant_sorted"])
    assert contextual == len(want["contextual"])
    features, kept = pruner.reduce(image, pruner.tokens_to_keep(n, pruner.retention))
    assert torch.equal(kept, want["kept"])
    close(features, want["kept_embeds"])
    close(features[torch.isin(kept, want["contextual"])], want["contextual_embeds"])
    places = torch.arange(n) * torch.tensor([[1], [2], [3]])
    shift = want["kept_image_positions"][:, :1] - places[:, kept[:1]]
    assert torch.equal(places[:, kept] + shift, want["kept_image_positions"])


class Counted(VisionZip):
    """VisionZip with given numbers of tokens."""

    given = (0, 0)

    def counts(self, visual, n):
        return self.given


@cases("visionzip", "select_llava")
def test_visionzip_select_llava(path):
    want, meta = read(path)
    pruner = Counted(0.5, compat="official")
    dominant, contextual = int(meta["dominant_excluding_cls"]), int(meta["contextual"])
    object.__setattr__(pruner, "given", (dominant, contextual))
    for b in range(len(want["cls_attention"])):
        attention, hidden = want["cls_attention"][b].sum(0), want["hidden_states"][b]
        image = VisualTokens(hidden[1:], (1, len(attention)), attention=attention, vision_keys=want["metric"][b, 1:])
        top = pruner.select(image, dominant)
        assert torch.equal(top + 1, want["all_indices_sorted"][b, 1:])
        features, kept = pruner.reduce(image, dominant + contextual)
        is_top = torch.isin(kept, top)
        close(torch.cat([hidden[:1], features[is_top], features[~is_top]]), want["output_tokens"][b])


@cases("visionzip", "select_effivlm")
def test_visionzip_select_effivlm(path):
    want, meta = read(path)
    n, budget = len(want["merged_tokens"]), float(meta["budget"])
    pruner = Counted(0.5, compat="official")
    object.__setattr__(pruner, "given", (max(1, int(n * budget * 5.4 / 6.4)), max(1, int(n * budget / 6.4))))
    metric = want["metric"].mean(0).unflatten(0, (n, 4)).mean(1)
    image = VisualTokens(
        want["merged_tokens"], (1, n), attention=want["column_mean"].unflatten(0, (n, 4)).mean(1), vision_keys=metric
    )
    features, kept = pruner.reduce(image, sum(pruner.given))
    assert torch.equal(kept, want["kept"])
    close(features, want["output_tokens"], 5e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("visionzip", "e2e")
def test_visionzip_e2e(path, attention):
    want, meta = read(path)
    pruner, vlm = visionzip(meta), model("tiny-qwen2_5_vl", attention)
    chunk, image = prompt(vlm, meta["inputs"], pruner)
    n, start = len(image.features), chunk.spans[0].start
    close(image.features, want["image_features"])
    close(image.attention * 4 * n, want["scores"])  # theirs is summed over queries
    close(image.vision_keys, want["metric"])
    cut = chunk.cut(pruner, pruner.retention)
    assert torch.equal(cut.spans[0].visual.places, want["kept"])
    assert torch.equal(cut.positions, want["position_ids"][:, 0])
    assert start == cut.spans[0].start
    close(cut.embeds, want["inputs_embeds"][0])
    run = prefill(vlm, cut)
    close(run.logits(12), want["logits_last12"])
    with torch.inference_mode():
        assert run.greedy(8, 240)[0] == want["greedy8"].tolist()
    assert cut.next_position == len(chunk.embeds) + int(want["rope_deltas"])


# ------------------------------------------------------------------ HoloV


class Banded(HoloV):
    """HoloV with a given number of bands."""

    given = 1

    def bands(self, visual, n):
        return self.given


@cases("holov", "select_qwen")
def test_holov_select_qwen(path):
    want, meta = read(path)
    n, keep, start = len(want["attention"]), int(meta["keep"]), int(meta["image_token_start"])
    pruner = HoloV(float(meta["ratio"]), "fixed")
    assert pruner.tokens_to_keep(n, pruner.retention) == keep and pruner.bands(n, keep) == int(meta["num_patches"])
    positions = torch.arange(start + n + 3) * torch.tensor([[1], [2], [3]])
    embeds = torch.zeros(start + n + 3, want["image_tokens"].shape[1])
    embeds[start : start + n] = want["image_tokens"]
    image = VisualTokens(want["image_tokens"], (1, n), attention=want["attention"])
    cut = PromptChunk(embeds, positions, 0, (ImageSpan(start, image, n),)).cut(pruner, pruner.retention)
    _, kept = pruner.reduce(image, keep)
    assert torch.equal(kept, want["final_positions"])
    close(cut.embeds[start : start + keep], want["output_tokens"])
    assert torch.equal(cut.positions, want["adjusted_positions"][:, 0])


@cases("holov", "select_llava")
def test_holov_select_llava(path):
    want, meta = read(path)
    pruner = Banded(0.5, "fixed")
    object.__setattr__(pruner, "given", int(meta["num_patches"]))
    for tokens, attention, output in zip(want["image_tokens"], want["attention"], want["output_tokens"], strict=True):
        features, _ = pruner.reduce(VisualTokens(tokens, (1, len(tokens)), attention=attention), int(meta["keep"]))
        close(features, output)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("holov", "e2e")
def test_holov_e2e(path, attention):
    want, meta = read(path)
    pruner = HoloV(float(meta["prune_rate"]), "official" if "asis" in path.stem.split("_") else "fixed")
    vlm = model("tiny-qwen2_5_vl", attention)
    chunk, image = prompt(vlm, meta["inputs"], pruner)
    keep = pruner.tokens_to_keep(len(image.features), pruner.retention)
    assert (keep, pruner.bands(len(image.features), keep)) == (int(meta["keep_num"]), int(meta["num_patches"]))
    close(pruner.score(image), want["attention"])
    assert torch.equal(pruner.reduce(image, keep)[1], want["final_positions"])
    cut = chunk.cut(pruner, pruner.retention)
    close(cut.embeds, want["inputs_embeds"][0])
    assert torch.equal(cut.positions, want["position_ids"][:, 0])
    run = prefill(vlm, cut)
    close(run.logits(12), want["logits_last12"])
    with torch.inference_mode():
        assert run.greedy(8, 240)[0] == want["greedy8"].tolist()
    assert cut.next_position == len(chunk.embeds) + int(want["rope_deltas"])


# ------------------------------------------------------------------ FastV


@dataclass
class Given:
    """Attention rows from a file: (H, R, V)."""

    attention: Tensor

    def rotary_kernel(self) -> None:
        return None

    def per_head(self, divisor=None) -> Tensor:
        return self.attention.mean(1)


@cases("fastv", "select")
def test_fastv_select(path):
    want, meta = read(path)
    start, n = int(meta["image_start"]), int(meta["image_len"])
    pruner, row = FastV(1 - float(meta["R_prune"])), want["last_row_per_head"]
    image = VisualTokens(torch.zeros(n, 1), (1, n), torch.arange(n), decoder_attention=Given(row[:, None, start : start + n]))
    assert torch.equal(pruner.select(image, pruner.tokens_to_keep(n, pruner.retention)), want["kept_image"])
    length = row.shape[1]
    chunk = PromptChunk(torch.zeros(length, 1), torch.arange(length).expand(3, -1), length, (ImageSpan(start, image, n),))
    assert torch.equal(chunk.cut(pruner, pruner.retention).positions[0], want["keep_sequence"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("fastv", "lm")
def test_fastv_lm(path, attention):
    want, meta = read(path)
    start, n, layer = int(meta["image_start"]), int(meta["image_len"]), int(meta["K"])
    vlm, pruner = model("sparsevlm/tiny-lm", attention), Recorded(FastV(1 - float(meta["R_prune"]), layer))
    run = prefill(vlm, text_chunk(want["inputs_embeds"], start, n), pruner)
    close(pruner.scores[0], want["last_row_head_mean"][start : start + n])
    assert torch.equal(run.batch.chunks[0].spans[0].visual.places, want["kept_image"])
    assert torch.equal(run.batch.chunks[0].positions[0], want["keep_sequence"])
    close(run.entering[layer], want["hidden_into_layer_K"])
    assert [x.keys.shape[2] for x in run.batch.cache.layers] == want["kv_lengths"].tolist()
    close(run.logits(10), want["logits_last10"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("fastv", "e2e")
def test_fastv_e2e(path, attention):
    want, meta = read(path)
    layer = int(meta["prune_before_layer"])
    vlm, pruner = model("tiny-qwen2_5_vl", attention), FastV(1 - float(meta["prune_rate"]), layer)
    run = prefill(vlm, prompt(vlm, meta["inputs"])[0], pruner)
    assert torch.equal(run.batch.chunks[0].spans[0].visual.places, want["kept"])
    close(run.entering[layer], want["hidden_into_layer"])
    close(run.logits(12), want["logits_last12"])


# ------------------------------------------------------------------ SparseVLM


class Recorded:
    """A pruner that remembers its scores and the raters it chose."""

    def __init__(self, pruner: Pruner):
        self.pruner, self.scores, self.chosen = pruner, [], []
        self.original = type(pruner).score
        object.__setattr__(pruner, "score", self.score)

    def __getattr__(self, name):
        return getattr(self.pruner, name)

    def score(self, image: VisualTokens) -> Tensor:
        self.scores.append(self.original(self.pruner, image))
        return self.scores[-1]

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        self.chosen = self.pruner.raters(visual, text)
        return self.chosen


class Scheduled(SparseVLM):
    """SparseVLM with given stages, tokens and positions."""

    schedule, tokens, packed = {}, (), None

    def cut_layers(self, layers):
        return self.schedule

    def tokens_to_keep(self, visual, share):
        return int(share)

    @property
    def quirks(self):
        return super().quirks if self.packed is None else ReleasedQuirks(renumber_positions=self.packed)


def scheduled(schedule: dict[int, int], version: str = "1.5", packed: bool | None = None) -> Scheduled:
    pruner = Scheduled(0.5, version, "official")
    object.__setattr__(pruner, "schedule", schedule)
    object.__setattr__(pruner, "packed", packed)
    return pruner


def text_chunk(embeds: Tensor, start: int, n: int) -> PromptChunk:
    """Embeddings with an image in them and plain positions."""
    embeds, length = embeds.float(), len(embeds)
    image = VisualTokens(embeds[start : start + n], (1, n), torch.arange(n))
    return PromptChunk(embeds, torch.arange(length).expand(3, -1), length, (ImageSpan(start, image, n),))


@cases("sparsevlm", "stage")
def test_sparsevlm_stage(path):
    want, meta = read(path)
    start, n, keep = int(meta["image_start"]), int(meta["image_len"]), int(meta["keep"])
    pruner, chunk = scheduled({0: keep}), text_chunk(want["hidden_states"], start, n)
    image, text = chunk.spans[0].visual, chunk.embeds[start + n :]
    assert torch.equal(pruner.raters(image.features, text), want["rater_idx"])
    seen = replace(image, decoder_attention=Given(want["rater_attention"]))
    score = pruner.score(seen)
    close(score, want["score"])
    assert torch.equal(pruner.select(seen, keep), want["keep_idx"])
    again, clusters = recycled(n - keep)
    assert clusters == int(meta["cluster_num"])
    assert torch.equal(score.argsort(descending=True, stable=True)[keep:][:again], want["recycled_idx_by_score"])
    close(cluster(image.features[want["recycled_idx_by_score"]], clusters)[1], want["cluster_tokens"])
    cut = chunk.cut(pruner, keep, lambda span: seen.decoder_attention)
    close(cut.embeds, want["output_hidden"])
    assert torch.equal(torch.arange(len(cut.embeds)), want["output_positions_v1"])


@cases("sparsevlm", "cluster")
def test_sparsevlm_cluster(path):
    want, meta = read(path)
    close(cluster(want["x"], int(meta["cluster_num"]))[1], want["merged"])


@cases("sparsevlm", "headsel")
def test_sparsevlm_headsel(path):
    want, meta = read(path)
    pruner, rows = SparseVLM(0.5, "plus", "official"), Given(want["rater_attention"])
    assert int(meta["k"]) == len(pruner.heads(rows.per_head()))
    assert torch.equal(pruner.heads(rows.per_head()).sort().values, want["selected_heads"].sort().values)
    image = VisualTokens(torch.zeros(want["mean_selected"].shape[1], 1), (1, 1), decoder_attention=rows)
    close(pruner.score(image), want["mean_selected"].mean(0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("sparsevlm", "lm")
def test_sparsevlm_lm(path, attention):
    want, meta = read(path)
    start, n = int(meta["image_start"]), int(meta["image_len"])
    schedule = dict(zip(json.loads(meta["pruning_layers"]), json.loads(meta["budgets"]), strict=True))
    pruner = Recorded(scheduled(schedule, "1.5" if meta["version"] == "v1" else "plus"))
    run = prefill(model("sparsevlm/tiny-lm", attention), text_chunk(want["inputs_embeds"], start, n), pruner)
    assert torch.equal(pruner.chosen, want["raters_in_text"])
    for i, budget in enumerate(schedule.values()):
        score = want[f"stage{i}_score"]
        close(pruner.scores[i], score, TOLERANCE * float(score.abs().max().clamp(min=1)))
        kept = pruner.scores[i].argsort(descending=True, stable=True)[:budget].sort().values
        assert torch.equal(kept, want[f"stage{i}_keep_mask"].nonzero().squeeze(1))
        if f"stage{i}_cluster_out" in want:
            after, clusters = run.entering[list(schedule)[i] + 1], want[f"stage{i}_cluster_out"]
            close(after[start + budget : start + budget + len(clusters)], clusters)
    assert [x.keys.shape[2] for x in run.batch.cache.layers] == want["kv_lengths"].tolist()
    assert [len(x) for x in run.entering] == [len(want[f"layer{i}_position_ids"]) for i in range(len(run.entering))]
    close(run.logits(10), want["logits_last10"])
    with torch.inference_mode():
        written, after = run.greedy(len(want["greedy6"]), 1 << 20)
    assert written == want["greedy6"].tolist()
    close(after, want["logits_after6"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("sparsevlm", "e2e")
def test_sparsevlm_e2e(path, attention):
    want, meta = read(path)
    vlm, layer = model("tiny-qwen2_5_vl", attention), int(meta["prune_after_layer"])
    chunk, image = prompt(vlm, meta["inputs"])
    keep = round(float(meta["keep_fraction"]) * len(image.features))
    pruner = Recorded(scheduled({layer: keep}, packed=False))
    run = prefill(vlm, chunk, pruner)
    assert torch.equal(pruner.chosen, want["rater_idx"])
    close(pruner.scores[0], want["score"])
    places = run.batch.chunks[0].spans[0].visual.places
    assert torch.equal(places[:keep], want["kept"])
    assert torch.equal(places[keep:], want["cluster_centre_tokens"]) and len(places) == keep + int(meta["cluster_num"])
    close(run.entering[layer + 1], want["hidden_after_stage"])
    close(run.logits(12), want["logits_last12"])
