"""``awares-bench bench engine``: runs the contestants of ``bench_engine``, prints them and the figures they make, writes JSON."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch
import transformers
from PIL import Image

from awares_bench.evaluation.records import cpu_name, provenance
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import VLM
from awares_bench.methods.conversation import Sample
from awares_bench.methods.registry import method_class
from awares_bench.methods.usage import Usage
from awares_bench.models.geometry import encode_flops

from .contestants import PHASES, Pages, Row, alternate, load, matmul_rates

BATCH = 8
"""Documents in a batch of the nano suite."""


@dataclass(frozen=True)
class Figure:
    """A ratio and what it should be. met: None where there is nothing to hold it to."""

    name: str
    value: float
    aim: str
    met: bool | None


def run(
    pretrained: str | None = None,
    size: str | None = None,
    layers: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tokens: int = 1200,
    batch: int = 1,
    call_rate: float = 1.0,
    answer: int = 8,
    repeats: int = 5,
    parts: tuple[str, ...] = ("vision", "turns", "stock", "suite"),
    documents: int = 48,
    json_file: Path | None = None,
) -> dict:
    """One run of the bench -> what it prints, as a dictionary. parts: which of the contestants; ``suite`` needs a checkpoint."""
    if not 0 <= call_rate <= 1:
        raise ValueError(f"call rate is {call_rate}; it must be from 0 to 1")
    for name, value in (("tokens", tokens), ("batch", batch), ("answer", answer), ("repeats", repeats), ("documents", documents)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    tower_only = set(parts) == {"vision"} and not pretrained
    vlm = load(pretrained, size, layers, dtype, device, 1 if tower_only else None)
    rates = matmul_rates(vlm, tokens, batch)
    text, tower = vlm.model.config.text_config, vlm.model.config.vision_config
    on_gpu = vlm.device.type == "cuda"
    about = {
        "model": pretrained or f"{size or 'nano'} geometry, random weights, nano's tokenizer",
        "decoder_layers": text.num_hidden_layers,
        "vision_layers": tower.depth,
        "layers_cut_to": layers,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(vlm.device)
        if on_gpu
        else f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": f"{torch.__version__}, transformers {transformers.__version__}",
        "threads": torch.get_num_threads(),
        "matmul_gflops": {"prompt": rates[0] / 1e9, "one_token_each": rates[1] / 1e9},
        "tokens": tokens,
        "batch": batch,
        "call_rate": call_rate,
        "repeats": repeats,
    }
    print("\n".join(f"{k:<16} {v}" for k, v in about.items()))
    rows, figures = [], []
    if "vision" in parts:
        _vision(vlm, repeats, rows, figures)
    if "turns" in parts:
        _turns(Pages(vlm, tokens, batch, call_rate, answer), "stock" in parts, repeats, rows, figures)
    notes = _suite(vlm, pretrained, documents, repeats, rows, figures) if pretrained and "suite" in parts else []
    result = {"about": about, "rows": [r.as_dict(rates) for r in rows], "figures": [asdict(f) for f in figures], "notes": notes}
    result["peak_memory_bytes"] = vlm.peak_memory()
    _print(result)
    if json_file:
        Path(json_file).write_text(json.dumps(result | {"provenance": provenance()}, indent=1))
    return result


def _ratio(top: Row, bottom: Row, turn: int | None = None, phases: tuple[str, ...] = PHASES) -> float:
    return median(top.seconds(turn, phases)) / median(bottom.seconds(turn, phases))


def _vision(vlm: VLM, repeats: int, rows: list[Row], figures: list[Figure]) -> None:
    """The tower with one attention call per window size, and as transformers runs it."""
    for name, sides in ((f"{BATCH} pictures of 224x224", [224] * BATCH), ("one picture of 1036x1036", [1036])):
        views = [vlm.pixels(Image.effect_noise((side, side), 64).convert("RGB"))[:2] for side in sides]
        patches, grids = [p for p, _ in views], [g for _, g in views]
        visual = sum(r * c for _, r, c in grids) // 4

        def timed(call, visual: int = visual) -> list[list[Usage]]:
            vlm.synchronise()
            start = time.perf_counter()
            call()
            vlm.synchronise()
            return [[Usage(encoded=visual, encode_seconds=time.perf_counter() - start)]]

        @torch.inference_mode()
        def looped(patches: list = patches, grids: list = grids):
            return vlm.model.model.visual(
                torch.cat(patches).to(vlm.device, vlm.model.dtype), grid_thw=torch.tensor(grids, device=vlm.device)
            )

        flops = (encode_flops(vlm.model.config, grids), 0.0, 0.0)
        ours = Row(f"ours, {name}", lambda p=patches, g=grids, t=timed: t(lambda: vlm.encode(p, g)), flops)
        stock = Row(f"transformers, {name}", lambda f=looped, t=timed: t(f), flops)
        alternate([ours, stock], repeats)
        rows += [ours, stock]
        ratio = _ratio(stock, ours)
        figures.append(Figure(f"vision encode, {name}: per-window loop over ours", ratio, ">= 1.3", ratio >= 1.3))
        apart = float((vlm.encode(patches, grids) - looped().pooler_output).abs().max())
        figures.append(Figure(f"vision encode, {name}: largest difference of a feature", apart, *_exact(vlm, apart)))


def _exact(vlm: VLM, apart: float) -> tuple[str, bool | None]:
    return ("<= 1e-4", apart <= 1e-4) if vlm.model.dtype == torch.float32 else ("1e-4 holds in float32", None)


def _turns(pages: Pages, stock: bool, repeats: int, rows: list[Row], figures: list[Figure]) -> None:
    full = Row("full: ours", pages.full, pages.flops("full"))
    kept = Row("AwaRes: ours, one cache", pages.low_then_crop, pages.flops("kept"))
    again = Row("AwaRes: ours, everything again", pages.low_then_everything, pages.flops("again"))
    some = [full, kept, again]
    if stock:
        some.append(Row("full: model.generate", pages.generate_full, pages.flops("full")))
        some.append(Row("AwaRes: model.generate twice", pages.generate_low_then_everything, pages.flops("again")))
    alternate(some, repeats)
    rows += some

    whole, parts = sum(full.turns[0], Usage()), sum(kept.turns[0], Usage())
    rtr, clock = parts.prefill / whole.prefill, _ratio(kept, full)
    figures.append(Figure("AwaRes over full resolution, tokens (RTR)", rtr, "", None))
    figures.append(
        Figure("AwaRes over full resolution, seconds", clock, f"<= RTR + 0.15 = {rtr + 0.15:.3f}", clock <= rtr + 0.15)
    )
    if any(pages.calls):
        ready = ("preprocess", "encode", "prefill")
        ratio, fed, refed = _ratio(kept, again, 1, ready), kept.turns[0][1], again.turns[0][1]
        share = (fed.prefill + fed.text) / (refed.prefill + refed.text)
        figures.append(Figure("second turn to its first token, kept cache over everything again", ratio, "<= 0.7", ratio <= 0.7))
        bound = 1.25 * share
        figures.append(Figure("the same against its share of the tokens", ratio, f"<= 1.25 x {share:.3f}", ratio <= bound))
        figures.append(Figure("second turn with its answer, the same", _ratio(kept, again, 1), "", None))
        passes = {}
        for pages.vlm.constrained in (False, True):
            passes[pages.vlm.constrained] = sum((pages.low_then_crop()[0]), Usage()).passes
        ratio = passes[True] / passes[False]
        name = f"decode passes of the first turn, grammar ({passes[True]}) over none ({passes[False]})"
        figures.append(Figure(name, ratio, "<= 0.5", ratio <= 0.5))
    if stock:
        figures.append(Figure("full resolution, model.generate over ours, seconds", _ratio(some[3], full), "", None))
        figures.append(Figure("AwaRes, model.generate twice over ours, seconds", _ratio(some[4], kept), "", None))
        apart = pages.difference()
        figures.append(Figure("largest difference of a score from model.generate", apart, *_exact(pages.vlm, apart)))


def _suite(vlm: VLM, pretrained: str, documents: int, repeats: int, rows: list[Row], figures: list[Figure]) -> list[str]:
    """Documents per second on the nano suite at full resolution, beside lmms-eval's own model on the same weights."""
    room, answers = Path(str(files("awares_bench.tasks.nano") / "nano_chart.yaml")).parent, {}
    samples = _nano_samples(room, documents)
    policy = method_class("full")()

    def answered(samples: list[Sample]) -> dict:
        return dict(Engine(vlm, policy, BATCH).run(Job(s, 16) for s in samples))

    def ours() -> list[list[Usage]]:
        start = time.perf_counter()
        outcomes = answered(samples)
        taken = time.perf_counter() - start
        answers["ours"] = [outcomes[i].answer for i in range(len(samples))]
        spent = sum((outcomes[i].usage for i in range(len(samples))), Usage())
        return [[Usage(spent.encoded, spent.prefill, spent.text, spent.output, decode_seconds=taken, passes=spent.passes)]]

    row = Row(f"nano suite: ours, batch {BATCH}", ours)
    try:
        from awares_bench.evaluation.lmms_model import stock_answers

        stock = stock_answers(pretrained, vlm, BATCH)
    except ImportError as error:  # optional packages of lmms-eval
        alternate([row], repeats)
        rows.append(row)
        return [f"lmms-eval's own qwen2_5_vl cannot run here ({error}), so it has no row"]

    def theirs() -> list[list[Usage]]:
        start = time.perf_counter()
        answers["theirs"] = stock([(s.images[0], s.question) for s in samples], 16)
        return [[Usage(decode_seconds=time.perf_counter() - start)]]

    other = Row(f"nano suite: lmms-eval's qwen2_5_vl, batch {BATCH}", theirs)
    alternate([row, other], repeats)
    rows += [row, other]
    ratio = _ratio(other, row)
    figures.append(Figure("nano suite, documents per second, ours over lmms-eval's qwen2_5_vl", ratio, ">= 1.5", ratio >= 1.5))
    same = _alike(answers["ours"], answers["theirs"])
    figures.append(Figure("nano suite, share of equal answers", same, "= 1", same == 1))
    odd = [replace(s, images=tuple(i.resize((i.width + 9, i.height - 5)) for i in s.images)) for s in samples]
    mine, its = answered(odd), stock([(s.images[0], s.question) for s in odd], 16)
    apart = _alike([mine[i].answer for i in range(len(odd))], its)
    figures.append(Figure("the same with sides that are no multiples of 28, share of equal answers", apart, "", None))
    return [
        "nano suite: whole seconds of a round stand under decode; lmms-eval's model is cast to the same dtype",
        "lmms-eval resizes pictures whose sides are no multiples of 28 with Pillow (qwen_vl_utils), the processor with torchvision",
    ]


def _alike(ours: list[str], theirs: list[str]) -> float:
    return sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _nano_samples(room: Path, documents: int) -> list[Sample]:
    import pandas as pd

    frames = [
        pd.read_parquet(path, columns=["image", "question"])
        for path in sorted(room.glob("nano_*.parquet"))
        if "vstar" not in path.name
    ]
    every = [r for rows in zip(*(f.itertuples() for f in frames), strict=False) for r in rows][:documents]
    pictures = [Image.open(io.BytesIO(r.image["bytes"])).convert("RGB") for r in every]
    return [Sample((p,), r.question, str(i)) for i, (p, r) in enumerate(zip(pictures, every, strict=True))]


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
