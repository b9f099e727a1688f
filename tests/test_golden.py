"""The authors' own outputs. ``AWARES_GOLDEN`` names another folder of the same layout; cases are found by file name there.

What follows a case's kind in its file name is free, and so are sizes, ratios and budgets: they are read from the files. Tensors that
``tests/golden`` leaves out, since another file has them, are compared where a folder has them.
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
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from awares_bench.baselines.apet import ApET
from awares_bench.baselines.cdpruner import CDPruner
from awares_bench.baselines.dart import Dart
from awares_bench.baselines.fastv import FastV
from awares_bench.baselines.hiprune import HiPrune
from awares_bench.baselines.holov import HoloV
from awares_bench.baselines.mmtok import MMTok
from awares_bench.baselines.pyramiddrop import PyramidDrop
from awares_bench.baselines.scope import Scope
from awares_bench.baselines.sparsevlm import SparseVLM, cluster, recycled
from awares_bench.baselines.visionselector import VisionSelector
from awares_bench.baselines.visionzip import VisionZip
from awares_bench.baselines.vispruner import VisPruner
from awares_bench.inference.layerwise_batch import LayerwiseBatch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.session import Session
from awares_bench.methods.pruner import Pruner, ReleasedQuirks, VisualTokens
from awares_bench.models import scorer
from awares_bench.models.attention_scores import AttentionRows
from awares_bench.models.prompt_chunk import ImageSpan, PromptChunk
from awares_bench.models.qwen2_5_vl import Qwen2_5_VL

from .helpers.golden import checkpoint, named, plain
from .helpers.tiny import embedded, see

GOLDEN = Path(os.environ.get("AWARES_GOLDEN") or Path(__file__).parent / "golden")
TOLERANCE = 2e-4


def cases(method: str, kind: str):
    """Parametrise over ``<method>/<kind>_*``: a skip where the folder has none."""
    files = named(GOLDEN / method, f"{kind}_*.safetensors")
    return pytest.mark.parametrize("path", files, ids=lambda p: p.stem)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(plain(path), "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert (ours.float() - theirs.float()).abs().max() <= tolerance


@lru_cache(maxsize=4)
def model(name: str, attention: str = "sdpa") -> LocalModel:
    """A golden checkpoint without a tokenizer: prompts are token ids."""
    config = Qwen2_5_VLConfig.from_pretrained(GOLDEN / name)
    weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint(GOLDEN / name), config=config, dtype=torch.float32, attn_implementation=attention
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
    assert named(GOLDEN, "*/*_*.safetensors"), f"no golden cases in {GOLDEN}"


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
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
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
    if "image_features" in want:
        close(image.features, want["image_features"])
    close(image.attention * 4 * n, want["scores"])  # theirs is summed over queries
    close(image.vision_keys, want["metric"])
    cut = chunk.cut(pruner, pruner.retention)
    assert torch.equal(cut.spans[0].visual.places, want["kept"])
    assert torch.equal(cut.positions, want["position_ids"][:, 0])
    assert start == cut.spans[0].start
    if "inputs_embeds" in want:
        close(cut.embeds, want["inputs_embeds"][0])
    run = prefill(vlm, cut)
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
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
    if "inputs_embeds" in want:
        close(cut.embeds, want["inputs_embeds"][0])
    assert torch.equal(cut.positions, want["position_ids"][:, 0])
    run = prefill(vlm, cut)
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
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
    close(run.logits(len(want["logits_last10"])), want["logits_last10"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases("fastv", "e2e")
def test_fastv_e2e(path, attention):
    want, meta = read(path)
    layer = int(meta["prune_before_layer"])
    vlm, pruner = model("tiny-qwen2_5_vl", attention), FastV(1 - float(meta["prune_rate"]), layer)
    run = prefill(vlm, prompt(vlm, meta["inputs"])[0], pruner)
    assert torch.equal(run.batch.chunks[0].spans[0].visual.places, want["kept"])
    if "hidden_into_layer" in want:
        close(run.entering[layer], want["hidden_into_layer"])
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])


# ------------------------------------------------------------------ SparseVLM


class Recorded:
    """A pruner that remembers its scores, the attention it was shown, and the raters it chose."""

    def __init__(self, pruner: Pruner):
        self.pruner, self.scores, self.rows, self.chosen = pruner, [], [], []
        self.original, self.reduced = type(pruner).score, type(pruner).reduce
        object.__setattr__(pruner, "score", self.score)

    def __getattr__(self, name):
        return getattr(self.pruner, name)

    def score(self, image: VisualTokens) -> Tensor:
        self.scores.append(self.original(self.pruner, image))
        return self.scores[-1]

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        self.rows.append(image.decoder_attention)
        return self.reduced(self.pruner, image, n)

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
    close(run.logits(len(want["logits_last10"])), want["logits_last10"])
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
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])


# ------------------------------------------------------------------ pruners of 2025 and 2026


def keeping(pruner: Pruner, n: int) -> Pruner:
    """The same pruner with a given number of tokens, where it was counted by another rule."""
    object.__setattr__(pruner, "tokens_to_keep", lambda visual, share: n)
    return pruner


def check_before_the_decoder(path: Path, attention: str, pruner: Pruner) -> VisualTokens:
    """The whole model with a cut before the decoder -> the uncut image, and the text after it."""
    want, meta = read(path)
    vlm = model("tiny-qwen2_5_vl", attention)
    chunk, image = prompt(vlm, meta["inputs"], pruner)
    if "image_features" in want:
        close(image.features, want["image_features"])
    cut = chunk.cut(pruner, pruner.retention)
    assert torch.equal(cut.spans[0].visual.places, want["kept"])
    assert torch.equal(cut.positions, want["position_ids"][:, 0])
    if "output_tokens" in want:
        close(cut.spans[0].visual.features, want["output_tokens"])
    run = prefill(vlm, cut)
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
    with torch.inference_mode():
        assert run.greedy(8, 240)[0] == want["greedy8"].tolist()
    assert cut.next_position == len(chunk.embeds) + int(want["rope_deltas"])
    return replace(image, text=chunk.embeds[chunk.spans[0].stop :])


BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@cases("scope", "select_official")
def test_scope_select_official(path):
    want, meta = read(path)
    image = VisualTokens(want["features"], (1, len(want["saliency"])), attention=want["saliency"] / (16 * len(want["saliency"])))
    pruner, keep = Scope(0.5, float(meta["alpha"]), meta["combined"]), int(meta["keep"])
    assert pruner.order(image, keep) == want["order"].tolist()
    assert torch.equal(pruner.select(image, keep), want["kept"])


@cases("scope", "select_llava")
def test_scope_select_llava(path):
    want, meta = read(path)
    keep = int(meta["token_num"]) // int(meta["pictures"])
    for hidden, attention, order, output in zip(
        want["hidden_states"], want["cls_attention"], want["order"], want["output_tokens"], strict=True
    ):
        image = VisualTokens(hidden[1:], (1, len(hidden) - 1), attention=attention.sum(0))
        assert Scope(0.5).order(image, keep) == order.tolist()
        assert torch.equal(Scope(0.5).reduce(image, keep)[0], output)


@BOTH
@cases("scope", "e2e_angelslim")
def test_scope_e2e_angelslim(path, attention):
    want, meta = read(path)
    pruner = keeping(Scope(float(meta["retention"]), float(meta["alpha"])), int(meta["keep"]))
    image = check_before_the_decoder(path, attention, pruner)
    close(image.attention * 16 * len(image.features), want["saliency"])


@cases("vispruner", "select_official")
def test_vispruner_select_official(path):
    check_vispruner(path, "corrected")


@cases("vispruner", "select_angelslim")
def test_vispruner_select_angelslim(path):
    check_vispruner(path, "angelslim")


def check_vispruner(path, compat):
    want, meta = read(path)
    pruner, keep = VisPruner(0.5, float(meta["important_ratio"]), compat), int(meta["keep"])
    image = VisualTokens(want["features"], (1, len(want["features"])), attention=want["attention"])
    important = image.attention.argsort(descending=True, stable=True)[: pruner.counts(len(image.features), keep)]
    assert torch.equal(important, want["important"])
    assert torch.equal(pruner.select(image, keep), want["kept"])


@BOTH
@cases("vispruner", "e2e_llmc")
def test_vispruner_e2e_llmc(path, attention):
    check_vispruner_e2e(path, attention, "corrected", 4)


@BOTH
@cases("vispruner", "e2e_angelslim")
def test_vispruner_e2e_angelslim(path, attention):
    check_vispruner_e2e(path, attention, "angelslim", 16)


def check_vispruner_e2e(path, attention, compat, scale):
    want, meta = read(path)
    pruner = VisPruner(float(meta["retention"]), float(meta["important_ratio"]), compat)
    image = check_before_the_decoder(path, attention, keeping(pruner, int(meta["keep"])))
    close(image.attention * scale * len(image.features), want["attention"])
    assert pruner.counts(len(image.features), int(meta["keep"])) == int(meta["important"])


class Flat(HiPrune):
    """HiPrune with neighbours by number, as AngelSlim has them."""

    def around(self, anchors, grid):
        return HiPrune(0.5, compat="official").around(anchors, grid)


@cases("hiprune", "select_official")
def test_hiprune_select_official(path):
    want, meta = read(path)
    pruner, v = HiPrune(float(meta["retention"]), float(meta["alpha"]), "official"), len(want["deep"])
    grid = int(meta["rows"]), int(meta["columns"])
    image = VisualTokens(torch.zeros(v, 1), grid, attention=want["deep"] / (4 * v), middle_attention=want["shallow"])
    keep = pruner.tokens_to_keep(v, pruner.retention)
    assert (keep, pruner.anchors(keep)) == (int(meta["keep"]), int(meta["anchors"]))
    anchors = want["shallow"].argsort(descending=True, stable=True)[: pruner.anchors(keep)]
    assert torch.equal(pruner.around(anchors, grid), want["anchors_and_buffers"])
    kept = pruner.select(image, keep)
    assert torch.equal(kept, want["kept"]) and len(kept) == keep - int(meta["counted_twice"])
    assert len(HiPrune(0.5, float(meta["alpha"])).select(image, keep)) == keep


@BOTH
@cases("hiprune", "e2e_official")
def test_hiprune_e2e_official(path, attention):
    _, meta = read(path)
    pruner = HiPrune(float(meta["retention"]), float(meta["alpha"]), "official")
    image = check_hiprune(path, attention, pruner, 4)
    assert pruner.tokens_to_keep(len(image.features), pruner.retention) == int(meta["keep"])


@BOTH
@cases("hiprune", "e2e_angelslim")
def test_hiprune_e2e_angelslim(path, attention):
    _, meta = read(path)
    check_hiprune(path, attention, keeping(Flat(float(meta["retention"]), float(meta["alpha"])), int(meta["keep"])), 16)


def check_hiprune(path, attention, pruner, scale) -> VisualTokens:
    want, meta = read(path)
    image = check_before_the_decoder(path, attention, pruner)
    assert pruner.anchors(int(meta["keep"])) == int(meta["anchors"])
    close(image.attention * scale * len(image.features), want["deep"])
    close(image.middle_attention * scale * len(image.features), want["shallow"])
    return image


class Started(ApET):
    """ApET from a given token."""

    first = 0

    def start(self, x):
        return torch.tensor(self.first)


def apet(meta: dict[str, str]) -> Started:
    pruner = Started(float(meta["retention"]), int(meta["basis_num"]))
    object.__setattr__(pruner, "first", int(meta["start"]))
    return pruner


@cases("apet", "select_official")
def test_apet_select_official(path):
    want, meta = read(path)
    pruner, x = apet(meta), want["features"]
    basis = pruner.basis_of(x, pruner.basis)
    assert torch.equal(basis, want["basis"])
    close(pruner.errors(x, x[basis]), want["errors"])
    keep = pruner.tokens_to_keep(len(x), pruner.retention)
    features, kept = pruner.reduce(VisualTokens(x, (1, len(x))), keep)
    assert torch.equal(kept, want["kept"]) and keep == int(meta["keep"])
    close(features, want["output_tokens"])


@BOTH
@cases("apet", "e2e_official")
def test_apet_e2e_official(path, attention):
    want, meta = read(path)
    image = check_before_the_decoder(path, attention, apet(meta))
    assert torch.equal(apet(meta).basis_of(image.features, int(meta["basis_num"])), want["basis"])


SIGNS = {"negative": "official", "positive": "corrected"}


@cases("cdpruner", "select_official")
def test_cdpruner_select_official(path):
    want, meta = read(path)
    pruner = CDPruner(float(meta["retention"]), SIGNS[meta["sign"]])
    relevance = pruner.relevance(want["relevance_features"], want["text"])
    close(relevance, want["relevance"])
    order = pruner.order(want["features"], relevance, int(meta["keep"]))
    assert torch.equal(order, want["order"]) and torch.equal(order.sort().values, want["kept"])


@BOTH
@cases("cdpruner", "e2e")
def test_cdpruner_e2e(path, attention):
    want, meta = read(path)
    pruner = CDPruner(float(meta["retention"]), SIGNS[meta["sign"]])
    image = check_before_the_decoder(path, attention, pruner)
    close(image.words, want["text"])
    relevance = pruner.relevance(image.features, image.words)
    close(relevance, want["relevance"])
    assert torch.equal(pruner.order(image.features, relevance, int(meta["keep"])), want["order"])


@cases("mmtok", "select_official")
def test_mmtok_select_official(path):
    want, meta = read(path)
    names = ("alpha", "text_temperature", "vision_temperature")
    pruner = MMTok(float(meta["retention"]), *(float(meta[name]) for name in names))
    image = VisualTokens(want["features"], (1, len(want["features"])), text=want["text"], unmerged=want["unmerged"])
    assert pruner.order(image, int(meta["keep"])) == want["order"].tolist()
    assert torch.equal(pruner.select(image, int(meta["keep"])), want["kept"])


@BOTH
@cases("mmtok", "e2e_official")
def test_mmtok_e2e_official(path, attention):
    want, meta = read(path)
    names = ("alpha", "text_temperature", "vision_temperature")
    pruner = MMTok(float(meta["retention"]), *(float(meta[name]) for name in names), "official")
    image = check_before_the_decoder(path, attention, pruner)
    close(image.words, want["text"])
    close(image.unmerged, want["unmerged"])
    assert pruner.order(image, int(meta["keep"])) == want["order"].tolist()
    assert pruner.tokens_to_keep(64, 0.1) == 64  # small images stay whole


@cases("visionselector", "select_official")
def test_visionselector_select_official(path, tmp_path):
    want, meta = read(path)
    save_file({part: want[part] for part in scorer.PARTS}, tmp_path / "scorer.safetensors")
    pruner = VisionSelector(float(meta["retention"]), str(tmp_path / "scorer.safetensors"))
    image = VisualTokens(want["features"], (1, len(want["features"])))
    close(pruner.score(image), want["scores"])
    keep = pruner.tokens_to_keep(len(image.features), pruner.retention)
    assert keep == int(meta["keep"]) and torch.equal(pruner.select(image, keep), want["kept"])


@cases("visionselector", "select_idpruner")
def test_visionselector_select_idpruner(path):
    want, meta = read(path)
    pruner = VisionSelector(0.5, "", float(meta["mmr_lambda"]), int(meta["parallel"]))
    object.__setattr__(pruner, "score", lambda image: want["scores"])
    image = VisualTokens(want["features"], (1, len(want["features"])))
    order = pruner.order(image, int(meta["keep"]), float(meta["mmr_lambda"]))
    assert torch.equal(order, want["order"]) and torch.equal(order.sort().values, want["kept"])


@BOTH
@cases("visionselector", "e2e_official")
def test_visionselector_e2e_official(path, attention):
    want, meta = read(path)
    pruner = VisionSelector(float(meta["retention"]), str(plain(GOLDEN / meta["scorer"])))
    close(pruner.score(check_before_the_decoder(path, attention, pruner)), want["scores"])


@BOTH
@cases("visionselector", "e2e_angelslim")
def test_visionselector_e2e_angelslim(path, attention):
    want, meta = read(path)
    mmr = None if meta["mmr_lambda"] == "none" else float(meta["mmr_lambda"])
    pruner = keeping(VisionSelector(float(meta["retention"]), str(plain(GOLDEN / meta["scorer"])), mmr), int(meta["keep"]))
    image = check_before_the_decoder(path, attention, pruner)
    close(pruner.score(image), want["scores"])
    if "order" in want:
        assert torch.equal(pruner.order(image, int(meta["keep"]), mmr), want["order"])


# ------------------------------------------------------------------ those that cut inside the decoder


class Pyramid(PyramidDrop):
    """PyramidDrop with given cuts: tokens to keep by layer, of the whole image."""

    schedule = {}

    def cut_layers(self, layers):
        return self.schedule

    def tokens_to_keep(self, visual, share):
        return int(share)


def pyramid(layers: list[int], keep: list[int], compat: str) -> Pyramid:
    """The goldens name the layers before which is cut."""
    pruner = Pyramid(0.5, compat)
    object.__setattr__(pruner, "schedule", {layer - 1: n for layer, n in zip(layers, keep, strict=True)})
    return pruner


@torch.inference_mode()
def ahead(layer: int, chunks: list[PromptChunk], pruner: Pruner) -> list[PromptChunk]:
    """States that enter ``layer`` of the text model, all rows in one batch -> what a cut before it leaves of them."""
    host = model("sparsevlm/tiny-lm").host
    batch = LayerwiseBatch(host, [Session() for _ in chunks], chunks, pruner, pruner.cut_layers(host.layers))
    hidden, positions, _ = batch.padded(chunks)
    rope = batch.look_ahead(layer, hidden, positions)
    return [batch.cut(layer - 1, b, hidden[b], positions[:, b], rope) for b in range(len(chunks))]


@cases("pyramiddrop", "stage_official")
def test_pyramiddrop_stage_official(path):
    want, meta = read(path)
    start, n, layer, full = (int(meta[name]) for name in ("image_start", "image_len", "layer", "image_full"))
    keep = PyramidDrop(0.5, "official").tokens_to_keep(full, float(meta["ratio"]))
    assert keep == int(meta["keep"])
    pruner = Recorded(pyramid([layer], [keep], "official"))
    (cut,) = ahead(layer, [text_chunk(want["hidden_states"], start, n)], pruner)
    close(pruner.rows[0].per_head(), want["last_row_per_head"])
    close(pruner.scores[0], want["score"])
    assert torch.equal(cut.spans[0].visual.places, want["kept"])
    assert torch.equal(torch.arange(len(cut.embeds)), want["position_ids"])


@cases("pyramiddrop", "batch_official")
def test_pyramiddrop_batch_official(path):
    want, meta = read(path)
    starts, sizes, layer = json.loads(meta["image_start"]), json.loads(meta["image_len"]), int(meta["layer"])
    chunks = [
        text_chunk(hidden[:length], start, n)
        for hidden, length, start, n in zip(want["hidden_states"], want["lengths"].tolist(), starts, sizes, strict=True)
    ]
    pruner = PyramidDrop(0.5, "official")
    object.__setattr__(pruner, "cut_layers", lambda layers: {layer - 1: float(meta["ratio"])})
    for b, cut in enumerate(ahead(layer, chunks, pruner)):
        assert torch.equal(cut.spans[0].visual.places, want[f"kept{b}"])
        assert len(cut.embeds) == int(want["attention_mask_after"][b].sum())


@BOTH
@cases("pyramiddrop", "lm_official")
def test_pyramiddrop_lm_official(path, attention):
    want, meta = read(path)
    start, n = int(meta["image_start"]), int(meta["image_len"])
    keep = [PyramidDrop(0.5, "official").tokens_to_keep(n, ratio) for ratio in json.loads(meta["ratios"])]
    assert keep == json.loads(meta["keep"])
    pruner = Recorded(pyramid(json.loads(meta["pruning_layers"]), keep, "official"))
    run = prefill(model("sparsevlm/tiny-lm", attention), text_chunk(want["inputs_embeds"], start, n), pruner)
    check_pyramid(run, pruner, want, len(keep))
    close(run.entering[-1], want["hidden_last_layer_in"])
    close(run.logits(len(want["logits_last10"])), want["logits_last10"])
    check_written(run, want, 1 << 20)


@BOTH
@cases("pyramiddrop", "e2e_vscan")
def test_pyramiddrop_e2e_vscan(path, attention):
    want, meta = read(path)
    vlm, keep = model("tiny-qwen2_5_vl", attention), json.loads(meta["keep"])
    pruner = Recorded(pyramid(json.loads(meta["pruning_layers"]), keep, "vscan"))
    run = prefill(vlm, prompt(vlm, meta["inputs"])[0], pruner)
    check_pyramid(run, pruner, want, len(keep))
    assert torch.equal(run.batch.chunks[0].positions, want[f"stage{len(keep) - 1}_position_ids"][:, 0])
    close(run.entering[-1], want["hidden_into_last_layer"])
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
    check_written(run, want, 240)


def check_pyramid(run: Run, pruner: Recorded, want: dict[str, Tensor], stages: int) -> None:
    places = torch.arange(len(pruner.scores[0]))
    for i in range(stages):
        close(pruner.scores[i], want[f"stage{i}_score"])
        kept = pruner.scores[i].argsort(descending=True, stable=True)[: len(want[f"stage{i}_kept"])].sort().values
        own = want.get(f"stage{i}_kept_of_previous", want[f"stage{i}_kept"])
        assert torch.equal(kept, own) or torch.equal(places[kept], own)
        places = places[kept]
    assert torch.equal(run.batch.chunks[0].spans[0].visual.places, places)
    assert [x.keys.shape[2] for x in run.batch.cache.layers] == want["kv_lengths"].tolist()


def check_written(run: Run, want: dict[str, Tensor], below: int) -> None:
    with torch.inference_mode():
        written, after = run.greedy(len(want["greedy6"]), below)
    assert written == want["greedy6"].tolist()
    close(after, want["logits_after6"])


def rows_of(keys: Tensor, columns: slice) -> AttentionRows:
    """Keys of a layer, of which nobody asks the attention."""
    none = torch.zeros(1, 1, keys.shape[2])
    return AttentionRows(none, keys, torch.zeros(1, dtype=torch.long), columns, (none, none))


def pivot_order(pruner: Dart, image: VisualTokens) -> list[int]:
    """Places in the sequence in the order of a set of them."""
    own, text = pruner.pivots(image)
    rows = image.decoder_attention
    return list({*(own + rows.columns.start).tolist(), *(text + rows.keys.shape[1] - len(image.text)).tolist()})


@cases("dart", "select_official")
def test_dart_select_official(path):
    want, meta = read(path)
    start, n = int(meta["image_start"]), int(meta["image_len"])
    share, counts = 1 - float(meta["reduction_ratio"]), (int(meta["pivot_image"]), int(meta["pivot_text"]))
    pruner, states, columns = Dart(share, 2, *counts, "official"), want["hidden_normed"], slice(start, start + n)
    rows = rows_of(want["keys"], columns)
    image = VisualTokens(states[columns], (1, n), text=states[columns.stop :], decoder_attention=rows)
    own, text = pruner.pivots(image)
    assert torch.equal(own + start, want["image_pivots"]) and torch.equal(text + start + n, want["text_pivots"])
    assert torch.equal(pruner.select(image, pruner.tokens_to_keep(n, share)), want["kept"])


@BOTH
@cases("dart", "e2e_official")
def test_dart_e2e_official(path, attention):
    want, meta = read(path)
    layer, counts = int(meta["prune_before_layer"]), (int(meta["pivot_image"]), int(meta["pivot_text"]))
    vlm = model("tiny-qwen2_5_vl", attention)
    pruner = Recorded(Dart(1 - float(meta["reduction_ratio"]), layer, *counts, "official"))
    run = prefill(vlm, prompt(vlm, meta["inputs"])[0], pruner)
    close(pruner.rows[0].keys.abs().sum((0, 2)), want["key_l1"])
    assert torch.equal(run.batch.chunks[0].spans[0].visual.places, want["kept"])
    assert torch.equal(run.batch.chunks[0].positions, want["position_ids"][:, 0])
    assert [x.keys.shape[2] for x in run.batch.cache.layers] == want["kv_lengths"].tolist()
    close(run.entering[layer], want["hidden_into_layer"])
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
    check_written(run, want, 240)


@dataclass(frozen=True)
class Chosen(Pruner):
    """Given tokens go on after a given layer."""

    after: int = 0
    kept: Tensor | None = None

    def cut_layers(self, layers):
        return {self.after: self.retention}

    def reduce(self, image, n):
        return image.features[self.kept], self.kept


@BOTH
@cases("dart", "e2e_angelslim")
def test_dart_e2e_angelslim(path, attention):
    """AngelSlim's features are what enters the attention, and its pivots those of the whole prompt; the choice is the same."""
    want, meta = read(path)
    start, n, layer, keep = (int(meta[name]) for name in ("image_start", "image_len", "prune_after_layer", "keep"))
    states, columns, vlm = want["features"], slice(start, start + n), model("tiny-qwen2_5_vl", attention)
    others = torch.cat([torch.arange(start), torch.arange(start + n, len(states))])
    keys = torch.cat([want["key_l1"][columns], want["key_l1"][others]])[None, :, None]
    image = VisualTokens(states[columns], (1, n), text=states[others], decoder_attention=rows_of(keys, slice(0, n)))
    pruner = Dart(0.5, layer + 1, int(meta["pivot_image"]), int(meta["pivot_text"]))
    own, text = pruner.pivots(image)
    assert torch.equal(torch.cat([own + start, others[text]]), want["pivots"])
    assert torch.equal(pruner.select(image, keep), want["kept"])
    run = prefill(vlm, prompt(vlm, meta["inputs"])[0], Chosen(0.5, layer, want["kept"]))
    with torch.inference_mode():
        close(vlm.host.decoder.layers[layer].input_layernorm(run.entering[layer]), states)
    close(run.batch.cache.layers[layer].keys[0].abs().sum((0, 2)), want["key_l1"])
    close(run.logits(len(want["logits_last12"])), want["logits_last12"])
