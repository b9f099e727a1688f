"""``awares-bench bench engine``: runs the contestants of ``contestants.py``, prints them and the ratios they make, writes JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.resources import files
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from PIL import Image

from awares_bench.evaluation.provenance import cpu_name, provenance
from awares_bench.evaluation.run_options import mapping
from awares_bench.inference.batch import Batch
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import Failure, Sample, Trajectory
from awares_bench.methods.registry import build
from awares_bench.methods.usage import Usage
from awares_bench.models.flops import vision_flops
from awares_bench.models.packaged import NANO

from .contention import BUSY, contention
from .contestants import PHASES, Contestant, Pages, alternate, load, matmul_rates, nano_samples
from .synthetic_models import NAMES

BATCH = 8
"""Documents in a batch of the nano suite."""

IN_FLIGHT = 16
"""Conversations that are answered together where this engine is measured beside a server, or vLLM in this process: as many on both sides."""


PARTS = ("vision", "turns", "stock", "suite")
"""Measured where nothing else is asked for."""

MORE_PARTS = ("contention", "served", "vllm")
"""What is measured only when it is asked for."""


@dataclass(frozen=True)
class Ratio:
    """A number that two contestants make, and what it should be."""

    name: str
    value: float
    aim: str
    """In words; empty where there is nothing to hold it to."""
    met: bool | None
    """None where there is nothing to hold it to."""


@dataclass(frozen=True)
class Settings:
    """What is measured, on what. Raises ValueError for what cannot be."""

    pretrained: str | None = None
    """Checkpoint; None for random weights of ``geometry``."""
    geometry: str | None = None
    """Published sizes: nano (None), 3b, 7b."""
    layers: int | None = None
    """Cut decoder and tower of a geometry to so many layers; None for all."""
    dtype: str = "auto"
    device: str = "auto"
    tokens: int = 1200
    """Visual tokens of a page, about."""
    batch: int = 1
    """Pages at a time."""
    call_rate: float = 1.0
    """Share of the pages that call for one quadrant."""
    answer: int = 8
    """Tokens of an answer."""
    repeats: int = 5
    parts: tuple[str, ...] = PARTS
    """Which of the contestants; ``suite`` needs a checkpoint."""
    documents: int = 48
    """Of the nano suite."""
    base_url: str | None = None
    """Server of ``served``, which serves the checkpoint."""
    served_model: str | None = None
    """The checkpoint's name there."""
    vllm_options: dict[str, Any] | None = None
    """Arguments of ``LLM`` by name, for ``vllm``."""
    json_file: Path | None = None

    def __post_init__(self):
        if not 0 <= self.call_rate <= 1:
            raise ValueError(f"call rate is {self.call_rate}; it must be from 0 to 1")
        for name in ("tokens", "batch", "answer", "repeats", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if unknown := [part for part in self.parts if part not in PARTS + MORE_PARTS]:
            raise ValueError(f"--parts holds {unknown[0]!r}; known: {', '.join(PARTS + MORE_PARTS)}")
        if "served" in self.parts and not (self.base_url and self.served_model):
            raise ValueError("--parts served needs a server: pass --base-url http://localhost:8000/v1 --served-model NAME")
        given = {"--base-url": ("served", self.base_url), "--served-model": ("served", self.served_model)}
        for name, (part, value) in (given | {"--vllm-options": ("vllm", self.vllm_options)}).items():
            if value is not None and part not in self.parts:
                raise ValueError(f"{name} is read by --parts {part} only; add that part, or leave it out")
        if needy := [part for part in MORE_PARTS if part in self.parts and not self.pretrained]:
            raise ValueError(f"--parts {needy[0]} needs a checkpoint; pass --pretrained and leave --geometry out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--pretrained", help="checkpoint folder, hub name, nano or nano-base (default: nano)")
    model.add_argument("--geometry", choices=NAMES, help="published sizes with random weights, nothing to download")
    parser.add_argument("--layers", type=int, help="cut decoder and tower to so many layers; printed with the result")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=1200, help="visual tokens of a page")
    parser.add_argument("--batch", type=int, default=1, help="pages at a time")
    parser.add_argument("--call-rate", type=float, default=1.0, help="share of the pages that call for one quadrant")
    parser.add_argument("--answer", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--documents", type=int, default=48, help="of the nano suite")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated; known: {', '.join(PARTS + MORE_PARTS)}")
    parser.add_argument("--base-url", help="address of a server with the same checkpoint, for the part served")
    parser.add_argument("--served-model", help="the checkpoint's name on that server")
    parser.add_argument(
        "--vllm-options", help="arguments of vLLM's LLM for the part vllm: a mapping, or a YAML file that holds one"
    )
    parser.add_argument("--json", type=Path, dest="json_file", help="write the result there")


def main(args: argparse.Namespace) -> int:
    values = {f.name: getattr(args, f.name) for f in fields(Settings)}
    pretrained = args.pretrained or (None if args.geometry else NANO)
    more = {"vllm_options": mapping("--vllm-options", args.vllm_options), "parts": tuple(args.parts.split(","))}
    run(Settings(**values | {"pretrained": pretrained} | more))
    return 0


def run(settings: Settings) -> dict:
    """One run of the bench -> what it prints, as a dictionary."""
    tower_only = set(settings.parts) == {"vision"} and not settings.pretrained
    size = settings.geometry, settings.layers
    return measure(settings, load(settings.pretrained, *size, settings.dtype, settings.device, 1 if tower_only else None))


def measure(settings: Settings, vlm: LocalModel, layouts: dict[str, type[Batch]] | None = None, twice: bool = True) -> dict:
    """The same on a model that is loaded already.

    layouts: name -> another layout, in which AwaRes' turns are timed too. twice: with ``stock`` also time two calls of ``generate``, which
    take one page at a time whatever the batch.
    """
    rates = matmul_rates(vlm, settings.tokens, settings.batch)
    about = _about(settings, vlm, rates)
    print("\n".join(f"{k:<16} {v}" for k, v in about.items()))
    contestants: list[Contestant] = []
    ratios: list[Ratio] = []
    notes: list[str] = []
    if "vision" in settings.parts:
        _vision(vlm, settings.repeats, contestants, ratios)
    if "turns" in settings.parts:
        pages = Pages(vlm, settings.tokens, settings.batch, settings.call_rate, settings.answer)
        _turns(pages, "stock" in settings.parts, settings.repeats, contestants, ratios, layouts or {}, twice)
    if "suite" in settings.parts and settings.pretrained:
        notes = _suite(vlm, settings.pretrained, settings.documents, settings.repeats, contestants, ratios)
    if "contention" in settings.parts:
        _contention(str(settings.pretrained), settings.documents, settings.repeats, ratios)
    if {"served", "vllm"} & set(settings.parts):
        notes += _external(vlm, settings, contestants, ratios)
    result = {
        "about": about,
        "rows": [c.as_dict(rates) for c in contestants],
        "figures": [asdict(r) for r in ratios],
        "notes": notes,
        "peak_memory_bytes": vlm.peak_memory(),
    }
    _print(result)
    if settings.json_file:
        Path(settings.json_file).write_text(json.dumps(result | {"provenance": provenance()}, indent=1))
    return result


def _about(settings: Settings, vlm: LocalModel, rates: tuple[float, float]) -> dict:
    """Model, machine and settings, as they are printed above everything."""
    text, tower = vlm.host.model.config.text_config, vlm.host.model.config.vision_config
    if vlm.device.type == "cuda":
        device = torch.cuda.get_device_name(vlm.device)
    else:
        device = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "model": settings.pretrained or f"{settings.geometry or 'nano'} geometry, random weights, nano's tokenizer",
        "decoder_layers": text.num_hidden_layers,
        "vision_layers": tower.depth,
        "layers_cut_to": settings.layers,
        "dtype": str(vlm.host.dtype).removeprefix("torch."),
        "device": device,
        "torch": f"{torch.__version__}, transformers {transformers.__version__}",
        "threads": torch.get_num_threads(),
        "layout": (vlm.layout or vlm.own_layout()).__name__,
        "matmul_gflops": {"prompt": rates[0] / 1e9, "one_token_each": rates[1] / 1e9},
        "tokens": settings.tokens,
        "batch": settings.batch,
        "call_rate": settings.call_rate,
        "repeats": settings.repeats,
    }


def _ratio(top: Contestant, bottom: Contestant, turn: int | None = None, phases: tuple[str, ...] = PHASES) -> float:
    return median(top.seconds(turn, phases)) / median(bottom.seconds(turn, phases))


def _vision(vlm: LocalModel, repeats: int, contestants: list[Contestant], ratios: list[Ratio]) -> None:
    """The tower with one attention call per window size, and as transformers runs it."""
    for name, sides in ((f"{BATCH} pictures of 224x224", [224] * BATCH), ("one picture of 1036x1036", [1036])):
        views = [vlm.host.image_input(Image.effect_noise((side, side), 64).convert("RGB")) for side in sides]
        tokens = [view.tokens for view in views]

        def timed(call, visual: int = sum(tokens)) -> list[list[Usage]]:
            vlm.synchronise()
            start = time.perf_counter()
            call()
            vlm.synchronise()
            return [[Usage(encoded=visual, encode_seconds=time.perf_counter() - start)]]

        @torch.inference_mode()
        def looped(views: list = views):
            patches, grids = (torch.cat([v.inputs[name] for v in views]) for name in ("pixel_values", "image_grid_thw"))
            return vlm.host.tower(patches.to(vlm.device, vlm.host.dtype), grid_thw=grids.to(vlm.device))

        flops = (float(sum(vision_flops(n, vlm.host.model.config.vision_config.to_dict()) for n in tokens)), 0.0, 0.0)
        ours = Contestant(f"ours, {name}", partial(timed, partial(vlm.host.encode, views)), flops)
        stock = Contestant(f"transformers, {name}", partial(timed, looped), flops)
        alternate([ours, stock], repeats)
        contestants += [ours, stock]
        ratio = _ratio(stock, ours)
        ratios.append(Ratio(f"vision encode, {name}: per-window loop over ours", ratio, ">= 1.3", ratio >= 1.3))
        features = torch.cat([run.features for run in vlm.host.encode(views)])
        difference = float((features - looped().pooler_output).abs().max())
        ratios.append(Ratio(f"vision encode, {name}: largest difference of a feature", difference, *_exact(vlm, difference)))


def _exact(vlm: LocalModel, difference: float) -> tuple[str, bool | None]:
    """Aim and whether it is met, of a difference that is rounding alone."""
    return ("<= 1e-4", difference <= 1e-4) if vlm.host.dtype == torch.float32 else ("1e-4 holds in float32", None)


def _turns(
    pages: Pages,
    stock: bool,
    repeats: int,
    contestants: list[Contestant],
    ratios: list[Ratio],
    layouts: dict[str, type[Batch]],
    twice: bool,
) -> None:
    """One turn at full resolution and two of AwaRes: by the engine, and with ``stock`` by ``model.generate``; the two of AwaRes also in
    other layouts."""
    full = Contestant("full: ours", pages.full, pages.flops("full"))
    kept = Contestant("AwaRes: ours, one cache", pages.low_then_crop, pages.flops("kept"))
    again = Contestant("AwaRes: ours, everything again", pages.low_then_everything, pages.flops("again"))
    stock_full = Contestant("full: model.generate", pages.generate_full, pages.flops("full"))
    stock_twice = Contestant("AwaRes: model.generate twice", pages.generate_low_then_everything, pages.flops("again"))
    others = [
        Contestant(f"{kept.name}, {name}", partial(pages.laid_out, layout, kept.run), kept.flops)
        for name, layout in layouts.items()
    ]
    runners = [full, kept, again, *others, *([stock_full] if stock else []), *([stock_twice] if stock and twice else [])]
    alternate(runners, repeats, vlm=pages.vlm)
    contestants += runners

    # is the clock proportional to the tokens?
    rtr = sum(kept.turns[0], Usage()).prefill / sum(full.turns[0], Usage()).prefill
    clock = _ratio(kept, full)
    ratios.append(Ratio("AwaRes over full resolution, tokens (RTR)", rtr, "", None))
    ratios.append(Ratio("AwaRes over full resolution, seconds", clock, f"<= RTR + 0.15 = {rtr + 0.15:.3f}", clock <= rtr + 0.15))
    if any(pages.calls):
        # what the second turn saves by going on with the cache of the first
        ratio, fed, refed = _ratio(kept, again, 1, PHASES[:3]), kept.turns[0][1], again.turns[0][1]
        share = (fed.prefill + fed.text) / (refed.prefill + refed.text)
        bound = 1.25 * share
        ratios.append(Ratio("second turn to its first token, kept cache over everything again", ratio, "<= 0.7", ratio <= 0.7))
        ratios.append(Ratio("the same against its share of the tokens", ratio, f"<= 1.25 x {share:.3f}", ratio <= bound))
        ratios.append(Ratio("second turn with its answer, the same", _ratio(kept, again, 1), "", None))
        # what the grammar saves: tokens of a call that have no alternative share a pass
        passes = {}
        for by_grammar in (False, True):
            with constrained(pages.vlm, by_grammar):
                passes[by_grammar] = sum(pages.low_then_crop()[0], Usage()).passes
        ratio = passes[True] / passes[False]
        name = f"decode passes of the first turn, grammar ({passes[True]}) over none ({passes[False]})"
        ratios.append(Ratio(name, ratio, "<= 0.5", ratio <= 0.5))
    for other in others:
        ratios.append(Ratio(f"{other.name} over the device's own layout, seconds", _ratio(other, kept), "", None))
    if stock:
        ratios.append(Ratio("full resolution, model.generate over ours, seconds", _ratio(stock_full, full), "", None))
        if twice:
            ratios.append(Ratio("AwaRes, model.generate twice over ours, seconds", _ratio(stock_twice, kept), "", None))
        difference = pages.difference()
        ratios.append(Ratio("largest difference of a score from model.generate", difference, *_exact(pages.vlm, difference)))


@contextmanager
def constrained(vlm: LocalModel, by_grammar: bool) -> Iterator[None]:
    """The model with calls held to their grammar, or not, and afterwards as it was."""
    before, vlm.constrained = vlm.constrained, by_grammar
    try:
        yield
    finally:
        vlm.constrained = before


def _suite(
    vlm: LocalModel, pretrained: str, documents: int, repeats: int, contestants: list[Contestant], ratios: list[Ratio]
) -> list[str]:
    """Documents per second on the nano suite at full resolution, beside lmms-eval's own model on the same weights."""
    folder, answers = Path(str(files("awares_bench.tasks.nano") / "nano_chart.yaml")).parent, {}
    samples = nano_samples(folder, documents)
    policy = build("full", {}).policy

    def outcomes_of(samples: list[Sample]) -> dict:
        return dict(Engine(vlm, policy, BATCH).run(Job(s, 16) for s in samples))

    def ours() -> list[list[Usage]]:
        start = time.perf_counter()
        outcomes = outcomes_of(samples)
        taken = time.perf_counter() - start
        answers["ours"] = [outcomes[i].answer for i in range(len(samples))]
        usage = sum((outcomes[i].usage for i in range(len(samples))), Usage())
        seconds = {f"{phase}_seconds": 0.0 for phase in PHASES} | {"decode_seconds": taken}
        return [[replace(usage, **seconds)]]

    own = Contestant(f"nano suite: ours, batch {BATCH}", ours)
    try:
        from awares_bench.evaluation.lmms_run import stock_answers

        stock = stock_answers(pretrained, vlm, BATCH)
    except ImportError as error:  # optional packages of lmms-eval
        alternate([own], repeats)
        contestants.append(own)
        return [f"lmms-eval's own qwen2_5_vl cannot run here ({error}), so it has no row"]

    def theirs() -> list[list[Usage]]:
        start = time.perf_counter()
        answers["theirs"] = stock([(s.images[0], s.question) for s in samples], 16)
        return [[Usage(decode_seconds=time.perf_counter() - start)]]

    other = Contestant(f"nano suite: lmms-eval's qwen2_5_vl, batch {BATCH}", theirs)
    alternate([own, other], repeats)
    contestants += [own, other]
    ratio = _ratio(other, own)
    ratios.append(Ratio("nano suite, documents per second, ours over lmms-eval's qwen2_5_vl", ratio, ">= 1.5", ratio >= 1.5))
    equal = _alike(answers["ours"], answers["theirs"])
    ratios.append(Ratio("nano suite, share of equal answers", equal, "= 1", equal == 1))
    odd = [replace(s, images=tuple(i.resize((i.width + 9, i.height - 5)) for i in s.images)) for s in samples]
    outcomes, texts = outcomes_of(odd), stock([(s.images[0], s.question) for s in odd], 16)
    equal = _alike([outcomes[i].answer for i in range(len(odd))], texts)
    ratios.append(Ratio("the same with sides that are no multiples of 28, share of equal answers", equal, "", None))
    return [
        "nano suite: whole seconds of a round stand under decode; lmms-eval's model is cast to the same dtype",
        "lmms-eval resizes pictures whose sides are no multiples of 28 with Pillow (qwen_vl_utils), the processor with torchvision",
    ]


def _contention(pretrained: str, documents: int, repeats: int, ratios: list[Ratio]) -> None:
    """Documents per second on a quiet machine and beside two busy processes, with OpenMP's spin as it is set here and as it comes."""
    found = contention(pretrained, documents, BATCH, repeats)
    for name, states in found.items():
        for state, rate in states.items():
            beside = f"beside {BUSY} busy processes" if state == "busy" else "nothing beside"
            fast = rate.documents >= 20
            aim, met = (">= 20", fast) if (name, state) == ("ours", "busy") and pretrained == NANO else ("", None)
            ratios.append(Ratio(f"nano suite, documents per second, OpenMP's spin {name}, {beside}", rate.documents, aim, met))
            ratios.append(Ratio(f"cores that it got, OpenMP's spin {name}, {beside}", rate.cores, "", None))
            ratios.append(Ratio(f"documents per CPU second, OpenMP's spin {name}, {beside}", rate.per_core, "", None))
        kept = states["busy"].documents / states["quiet"].documents
        ratios.append(
            Ratio(f"documents per second, beside {BUSY} busy processes over nothing beside, OpenMP's spin {name}", kept, "", None)
        )
    ours, other = found["ours"], found["as OpenMP comes"]
    for state, beside in (("quiet", "nothing beside"), ("busy", "busy")):
        ratio = ours[state].documents / other[state].documents
        ratios.append(Ratio(f"documents per second, ours over as OpenMP comes, {beside}", ratio, "", None))


def _external(vlm: LocalModel, settings: Settings, contestants: list[Contestant], ratios: list[Ratio]) -> list[str]:
    """Documents per second of this engine, and of a server or of vLLM in this process, on the same weights and documents.

    Before each round every picture is changed a little, so that no cache knows it.
    """
    samples = nano_samples(Path(str(files("awares_bench.tasks.nano") / "nano_chart.yaml")).parent, settings.documents)
    engines: dict[str, Any] = {"ours": vlm}
    if "served" in settings.parts:
        from awares_bench.inference.openai_server import Endpoint

        served = Endpoint(str(settings.base_url), str(settings.served_model), str(settings.pretrained), IN_FLIGHT)
        served.warm_up()
        engines["served"] = served
    if "vllm" in settings.parts:
        from awares_bench.inference.vllm_model import VllmModel

        dtype = str(vlm.host.dtype).removeprefix("torch.")
        engines["vllm in this process"] = VllmModel(
            str(settings.pretrained), IN_FLIGHT, dtype=dtype, options=settings.vllm_options
        )
    notes = [f"same documents, {IN_FLIGHT} conversations in flight on every side; whole seconds stand under decode"]
    for method in ("full", "awares"):
        policy, runners = build(method, {}).policy, []
        answers: dict[str, list[str]] = {}
        for name, model in engines.items():
            rounds = count()

            def timed(name=name, model=model, rounds=rounds, policy=policy, answers=answers) -> list[list[Usage]]:
                shown = [changed(sample, next(rounds)) for sample in samples]
                with constrained(vlm, False):
                    start = time.perf_counter()
                    outcomes = dict(Engine(model, policy, IN_FLIGHT).run(Job(s, 16) for s in shown))
                    taken = time.perf_counter() - start
                if failed := next((o for o in outcomes.values() if isinstance(o, Failure)), None):
                    raise RuntimeError(f"{name}: {failed.error}")
                ended = [o for _, o in sorted(outcomes.items()) if isinstance(o, Trajectory)]
                answers[name] = [o.answer for o in ended]
                usage = sum((o.usage for o in ended), Usage())
                phases: dict[str, Any] = {f"{p}_seconds": 0.0 for p in PHASES} | {"decode_seconds": taken}
                return [[replace(usage, **phases)]]

            runners.append(Contestant(f"nano suite, {method}: {name}", timed))
        alternate(runners, settings.repeats)
        contestants += runners
        for name, other in zip(list(engines)[1:], runners[1:], strict=True):
            ratio = _ratio(other, runners[0])
            aim = (">= 1", ratio >= 1) if settings.pretrained == NANO else ("", None)
            ratios.append(Ratio(f"nano suite, {method}, documents per second, ours over {name}", ratio, *aim))
            equal = _alike(answers["ours"], answers[name])
            ratios.append(Ratio(f"nano suite, {method}, share of equal answers, ours and {name}", equal, "= 1", equal == 1))
    return notes


def changed(sample: Sample, seed: int) -> Sample:
    """A sample whose picture differs in one corner, by the seed."""
    picture = sample.images[0].copy()
    picture.paste((seed * 37 % 256, seed * 91 % 256, seed * 151 % 256), (0, 0, 6, 6))
    return replace(sample, images=(picture, *sample.images[1:]))


def _alike(ours: list[str], theirs: list[str]) -> float:
    """Share of equal answers."""
    return sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _print(result: dict) -> None:
    print(f"\n{'':<44} {'visual':>7} {'text':>6} {'out':>5} {'passes':>6} {'seconds':>9} {'quartiles':>17} {'floor':>8}")
    for r in result["rows"]:
        floor = "" if r["floor_seconds"] is None else f"{r['floor_seconds']:8.3f}"
        low, high = r["quartiles"]
        print(
            f"{r['name']:<44} {r['encoded_tokens']:>7} {r['text_tokens']:>6} {r['output_tokens']:>5} {r['passes']:>6} "
            f"{r['seconds']:>9.3f} {f'{low:.3f} - {high:.3f}':>17} {floor:>8}"
        )
        for n, phases in enumerate(r["phases"], 1):
            if len(r["phases"]) > 1 or sum(map(bool, phases.values())) > 1:
                print(f"{'':<44}   turn {n}: " + ", ".join(f"{p} {s:.3f}" for p, s in phases.items()))
    print("\nThe floor is operations counted from the shapes over the matmul rates above: no memory traffic, no Python.\n")
    for f in result["figures"]:
        met = {True: "met", False: "NOT met", None: ""}[f["met"]]
        print(f"{f['value']:>10.3g}  {f['name']}  {f['aim']} {met}")
    for note in result["notes"]:
        print(note, file=sys.stderr)
