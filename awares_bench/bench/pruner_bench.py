"""``awares-bench bench pruners``: what it costs to decide, against the prefill without a pruner; time and memory, in one run.

Counted as scoring: attention and keys collected in the tower, their way to raster order, a picture's seed, raters, attention
rows, scores, the choice and what it merges. Beside it, the same with the cut: joining the text around the pictures with what is
left of them, and its positions, which is the same work for every pruner. Counted as prefill: patches, vision blocks, merger and
decoder layers of the same pictures, uncut; not preprocessing, embedding, the vocabulary's scores or what runs between layers.
Pictures are the only ones of their round, so their first decision meets cold caches: with one small picture that is most of it,
with several it is shared.
Models have published sizes and random weights. One layer of each kind is timed and counted as often as the model has it, so
that a 7B fits a laptop; a pruner's own work is done in full: every cut at its real share, on the real number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from awares_bench.evaluation.provenance import provenance
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.session import Session
from awares_bench.methods.options import options
from awares_bench.methods.pruner import OF_THE_TOWER, Pruner, VisualTokens
from awares_bench.methods.registry import pruner_classes
from awares_bench.models.base import HostModel, ImageInput
from awares_bench.models.cpu_kernels import onednn_linears
from awares_bench.models.families import host_of
from awares_bench.models.packaged import NANO
from awares_bench.models.qwen2_5_vl import Qwen2_5_VL, runs_of
from awares_bench.models.qwen_vision import probed, windowed_attention

from .meter import Meter, MeteredBatch, clock, metered
from .synthetic_models import NAMES, geometry, random_model, random_scorer

TEXT = 64
"""Text tokens after the image: a question and the template."""

LIMIT_SHARE, LIMIT_BYTES = 0.05, 100 * 2**20


@dataclass
class Cost:
    """A pruner's own work on one batch of pictures."""

    pruner: str
    visual: int = 0
    """Tokens after the last cut, of one picture."""
    seconds: float = 0.0
    """With the cut, median over the rounds."""
    share: float = 0.0
    """Of the prefill of the same round, median."""
    scoring_seconds: float = 0.0
    """Without the cut."""
    scoring_share: float = 0.0
    extra_bytes: int | None = None
    """The most held at a time beside its inputs; None where the system does not say."""
    rounds: list[float] = field(default_factory=list)
    """Seconds of each round, with the cut."""
    scoring_rounds: list[float] = field(default_factory=list)
    """Without the cut."""


def small(size: str):
    """The config of a geometry with three vision blocks (one within windows, two over the whole image) and four decoder layers."""
    config = geometry(size)
    tower, text = config.vision_config, config.text_config
    tower.depth = 3
    if hasattr(tower, "fullatt_block_indexes"):
        tower.fullatt_block_indexes = [1, 2]
    if hasattr(tower, "deepstack_visual_indexes"):
        tower.deepstack_visual_indexes = [0, 1]
    text.num_hidden_layers, text.layer_types = 4, ["full_attention"] * 4
    text.vocab_size = min(text.vocab_size, 1024)
    config.vocab_size = text.vocab_size
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", default=NANO, choices=NAMES, help="published sizes with random weights (default: nano)")
    parser.add_argument("--tokens", type=int, default=1200, help="visual tokens of a picture")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time")
    parser.add_argument("--retention", type=float, default=0.5, help="of the pruners")
    parser.add_argument("--pruners", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result there")


def main(args: argparse.Namespace) -> int:
    run(args.geometry, args.tokens, args.batch, args.retention, args.repeats, args.device, args.dtype, args.json, args.pruners)
    return 0


@torch.inference_mode()
def run(
    size: str = NANO, tokens: int = 1200, batch: int = 1, retention: float = 0.5, repeats: int = 5, device: str = "auto",
    dtype: str = "auto", json_file: Path | None = None, only: str = "",
) -> dict:  # fmt: skip
    """Measure every pruner on ``batch`` pictures of about ``tokens`` visual tokens -> what is printed, as a dictionary."""
    if min(tokens, batch, repeats) < 1:
        raise ValueError(f"tokens is {tokens}, batch is {batch} and repeats is {repeats}; each must be at least 1")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = getattr(torch, ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype)
    vlm, config = LocalModel(host_of(*random_model(small(size), kind, device))), geometry(size)
    width = config.text_config.hidden_size
    contestants = [cls(retention, **weights_of(cls, width)) for cls in pruner_classes() if wanted(cls, only)]
    if not contestants:
        raise ValueError(f"pruners is {only!r}; known: {', '.join(map(name_of, pruner_classes()))}")

    # one conversation a picture: a system message, the picture, a question
    side = max(1, math.isqrt(tokens))
    grid = (1, 2 * side, 2 * max(1, round(tokens / side)))
    visual = grid[1] * grid[2] // 4
    generator = torch.Generator().manual_seed(0)
    values = 3 * 2 * vlm.host.model.config.vision_config.patch_size**2  # of a patch
    pictures = [_picture(torch.randn(grid[1] * grid[2], values, generator=generator), grid) for _ in range(batch)]
    marks = vlm.host.model.config.vision_start_token_id, vlm.host.model.config.vision_end_token_id
    ids = [20] * 16 + [marks[0]] + [vlm.host.image_token] * visual + [marks[1]] + [*range(20, 20 + TEXT)]

    # every round: a prefill without a pruner, then the work of each pruner
    layers, costs = _Layers(vlm), [Cost(name_of(type(p))) for p in contestants]
    with onednn_linears(vlm.host.decoder):  # as where it answers
        for round_ in range(repeats + 1):  # the first warms up, and looks at memory instead of the clock; the others alternate
            chunks = [vlm.host.chunk(ids, pictures[:1], [image], 0) for image in vlm.see(pictures)]
            PaddedBatch(vlm.host, [Session() for _ in chunks], chunks).prefill()
            layers.close_round(config)
            seen: dict[tuple, tuple[Meter, list[VisualTokens]]] = {}  # what the tower gives is the same for equal needs
            for pruner, cost in zip(contestants, costs, strict=True):
                meter = Meter(vlm, memory=round_ == 0)
                if pruner.needs not in seen:
                    seen[pruner.needs] = meter, _see(vlm.host, pruner, pictures, meter)
                before, images = seen[pruner.needs]
                meter = replace(before, seconds=[*before.seconds])
                cost.visual = _decide(meter, pruner, config, pictures, images, ids)
                if meter.memory:
                    cost.extra_bytes = meter.peak
                else:
                    cost.rounds.append(sum(meter.seconds))
                    cost.scoring_rounds.append(meter.scored)
                layers.forget()
    layers.remove()

    # shares are of the prefill of the same round
    prefills = layers.rounds[1:]
    for cost in costs:
        cost.seconds, cost.scoring_seconds = median(cost.rounds), median(cost.scoring_rounds)
        cost.share = median(s / p for s, p in zip(cost.rounds, prefills, strict=True))
        cost.scoring_share = median(s / p for s, p in zip(cost.scoring_rounds, prefills, strict=True))
    prefill = median(prefills)
    result = {
        "geometry": size,
        "visual_tokens": visual,
        "text_tokens": len(ids) - visual,
        "batch": batch,
        "retention": retention,
        "device": torch.cuda.get_device_name(vlm.device) if vlm.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(kind).removeprefix("torch."),
        "repeats": repeats,
        "prefill_seconds": prefill,
        "pruners": [asdict(c) for c in costs],
    }
    _print(result)
    if json_file:
        Path(json_file).write_text(json.dumps(result | {"provenance": provenance()}, indent=1))
    return result


def name_of(cls: type[Pruner]) -> str:
    return cls.__module__.rsplit(".", 1)[-1]


def wanted(cls: type[Pruner], only: str) -> bool:
    """Whether a pruner is among the names, or none are named."""
    return not only or name_of(cls) in only.replace(" ", "").split(",")


def weights_of(cls: type[Pruner], width: int) -> dict[str, str]:
    """Options that a pruner cannot run without: a scorer with random weights where it needs one."""
    return {"scorer": str(random_scorer(width))} if "scorer" in options(cls) else {}


class _Layers:
    """Seconds of the vision blocks and decoder layers that ran in a round, by hooks, and of a whole model made of them."""

    def __init__(self, vlm: LocalModel):
        self.now, self.hooks = clock(vlm), []
        self.rounds: list[float] = []
        self.forget()
        tower = vlm.host.tower
        named = [("patch", tower.patch_embed), ("window", tower.blocks[0]), ("full", tower.blocks[1]), ("merger", tower.merger)]
        for name, module in [*named, *(("decoder", layer) for layer in vlm.host.decoder.layers)]:
            self.hooks += [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop(name))]

    def _start(self, *_) -> None:
        self.start = self.now()

    def _stop(self, name: str) -> Callable:
        def stop(*_) -> None:
            self.seconds.setdefault(name, []).append(self.now() - self.start)

        return stop

    def forget(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def close_round(self, config) -> None:
        """Add the seconds of encoding and prefill of the model of this config, its layers at the median of their kind."""
        once = {name: median(s) for name, s in self.seconds.items()}
        tower, full = config.vision_config, len(config.vision_config.fullatt_block_indexes)
        vision = once["patch"] + once["merger"] + (tower.depth - full) * once["window"] + full * once["full"]
        self.rounds.append(vision + config.text_config.num_hidden_layers * once["decoder"])
        self.forget()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _picture(patches: Tensor, grid: tuple[int, int, int]) -> ImageInput:
    """Patches of noise as the processor would give them."""
    return ImageInput({"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}, ((grid[1] // 2, grid[2] // 2),), "")


def _decide(meter: Meter, pruner: Pruner, whole, pictures: list[ImageInput], images: list[VisualTokens], ids: list[int]) -> int:
    """Meter what ``pruner`` adds to what it asked of the tower: the cut before the decoder, or raters, attention rows and cuts inside it."""
    vlm, stages, pruner = meter.vlm, pruner.cut_layers(whole.text_config.num_hidden_layers), metered(pruner, meter)
    chunks = [vlm.host.chunk(ids, pictures[:1], [image], 0) for image in images]
    if not stages:
        return [meter.cutting(chunk.cut, pruner, pruner.retention) for chunk in chunks][-1].visual
    batch = MeteredBatch(meter, vlm.host, [Session() for _ in chunks], chunks, pruner, dict(enumerate(stages.values())))
    batch.prefill()
    return batch.chunks[-1].visual


def _see(host: HostModel, pruner: Pruner, pictures: list[ImageInput], meter: Meter) -> list[VisualTokens]:
    """As the host encodes, with what the pruner asks of the tower metered."""
    assert isinstance(host, Qwen2_5_VL)  # the family of the published sizes
    looks = [need for need in pruner.needs if need in OF_THE_TOWER]
    with windowed_attention(host.tower), probed(host.tower, -1, looks) as probe:
        for module in (block.attn for block in host.tower.blocks):
            if looks and (observe := getattr(module, "probe", None)):
                module.probe = lambda *args, observe=observe: meter(observe, *args)
        patches = torch.cat([p.inputs["pixel_values"] for p in pictures]).to(host.device, host.dtype)
        features = host.tower(
            patches, grid_thw=torch.cat([p.inputs["image_grid_thw"] for p in pictures]).to(host.device)
        ).pooler_output
    if not (looks or "seed" in pruner.needs):
        return runs_of(features, pictures, None, (), host.window)
    return meter(runs_of, features, pictures, probe if looks else None, pruner.needs, host.window)


def _print(result: dict) -> None:
    print(
        f"{result['geometry']} geometry, random weights, {result['batch']} at a time of {result['visual_tokens']} visual and "
        f"{result['text_tokens']} text tokens, {result['device']}, {result['dtype']}, {result['threads']} threads, retention {result['retention']}"
    )
    clocked = "CPU seconds of all threads" if result["device"] == "cpu" else "seconds"
    print(f"prefill without a pruner: patches, vision blocks, merger, decoder layers: {result['prefill_seconds']:.4f} {clocked}")
    print(
        "scoring: attention and keys from the tower, seeds, raters, attention rows, scores, choice, merges; shares are of prefill\n"
    )
    print(f"{'pruner':<15} {'kept':>6} {'scoring':>9} {'share':>7} {'with the cut':>13} {'share':>7} {'extra MiB':>10}")
    for c in result["pruners"]:
        extra = "" if c["extra_bytes"] is None else f"{c['extra_bytes'] / 2**20:.0f}"
        over = [
            w for w, bad in (("time", c["scoring_share"] > LIMIT_SHARE), ("memory", (c["extra_bytes"] or 0) > LIMIT_BYTES)) if bad
        ]
        print(
            f"{c['pruner']:<15} {c['visual']:>6} {c['scoring_seconds']:>9.4f} {c['scoring_share']:>7.2%} {c['seconds']:>13.4f} "
            f"{c['share']:>7.2%} {extra:>10}  "
            f"{'over its limit: ' + ', '.join(over) if over else ''}"
        )
    print(
        f"\nLimits: scoring {LIMIT_SHARE:.0%} of prefill, {LIMIT_BYTES >> 20} MiB at 4,096 visual tokens. Kept: after the last cut."
    )
