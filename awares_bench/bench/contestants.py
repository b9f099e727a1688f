"""Is the clock proportional to the tokens? Our engine beside the ways it replaces: same weights, same pages, one process.

Contestants run in turn, in alternating order; medians and spread are over the repeats, a first untimed round warms up. With
random weights (``geometry``) replies are forced: which documents call, for one quadrant, and how long the answers are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from awares_bench.awares import CALL_BUDGET
from awares_bench.inference.local_model import VLM
from awares_bench.inference.session import Prepared, Request, Session
from awares_bench.methods.conversation import Turn, messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.methods.usage import Usage
from awares_bench.models.cpu_kernels import product
from awares_bench.models.geometry import decoder_flops, encode_flops, geometry, random_model
from awares_bench.models.packaged import resolve

CROP = "bottom-right"
PHASES = ("preprocess", "encode", "prefill", "decode")


@dataclass
class Row:
    """A contestant. turns: per repeat, per turn, the Usage summed over the documents; flops: (encode, prefill, decode) of one repeat."""

    name: str
    run: Callable[[], list[list[Usage]]]
    flops: tuple[float, float, float] | None = None
    turns: list[list[Usage]] = field(default_factory=list)

    def seconds(self, turn: int | None = None, phases: tuple[str, ...] = PHASES) -> list[float]:
        """Of each repeat, in these phases, of one turn or of all."""
        chosen = [t if turn is None else t[turn : turn + 1] for t in self.turns]
        return [sum(getattr(u, f"{p}_seconds") for u in some for p in phases) for some in chosen]

    def as_dict(self, rates: tuple[float, float]) -> dict:
        """What is printed and written: tokens of one repeat, median seconds, their quartiles, the floor."""
        spent = sum(self.turns[0], Usage())
        floor = self.flops and (self.flops[0] + self.flops[1]) / rates[0] + self.flops[2] / rates[1]
        return {
            "name": self.name,
            "visual_tokens": spent.prefill,
            "encoded_tokens": spent.encoded,
            "text_tokens": spent.text,
            "output_tokens": spent.output,
            "passes": spent.passes,
            "seconds": median(self.seconds()),
            "quartiles": [float(np.quantile(self.seconds(), q)) for q in (0.25, 0.75)],
            "phases": [{p: median(self.seconds(t, (p,))) for p in PHASES} for t in range(len(self.turns[0]))],
            "floor_seconds": floor,
        }


@dataclass
class Pages:
    """Documents of about ``tokens`` visual tokens, shape 3:4, and what is asked and forced of each."""

    vlm: VLM
    tokens: int
    documents: int
    call_rate: float
    answer_length: int

    def __post_init__(self):
        columns = max(2, 2 * round((self.tokens * 3 / 4) ** 0.5 / 2))
        rows = max(2, 2 * round(self.tokens / columns / 2))
        noise = np.random.default_rng(0).integers(0, 256, (self.documents, rows * 4, columns * 4, 3), dtype=np.uint8)
        self.images = [Image.fromarray(n).resize((columns * 28, rows * 28), Image.Resampling.BILINEAR) for n in noise]
        self.calls = [int((i + 1) * self.call_rate) > int(i * self.call_rate) for i in range(self.documents)]
        tokenizer = self.vlm.tokenizer
        self.call = tuple(tokenizer(PAPER_GRID.format(CROP), add_special_tokens=False)["input_ids"])
        some = tokenizer("7", add_special_tokens=False)["input_ids"]
        self.answer = tuple(some * self.answer_length)[: self.answer_length]
        self.full_turns = [Turn((image,), "What is the total of the second column?") for image in self.images]
        shown = [replace(t, images=(half(i),)) for t, i in zip(self.full_turns, self.images, strict=True)]
        self.first = [replace(t, system=PAPER_GRID.prompt, last=False, calls=PAPER_GRID) for t in shown]
        self.second = [Turn(tuple(PAPER_GRID.cut(image, (CROP,)))) for image in self.images]

    def full(self) -> list[list[Usage]]:
        """One turn, the whole page."""
        return [self._reply([Request(Session(), t, len(self.answer) + 1, forced=self.answer) for t in self.full_turns])]

    def low_then_crop(self) -> list[list[Usage]]:
        """Two turns on one cache."""
        sessions, turns = self._first()
        again = [Request(sessions[i], self.second[i], len(self.answer) + 1, forced=self.answer) for i in self._callers()]
        return [turns, self._reply(again)]

    def low_then_everything(self) -> list[list[Usage]]:
        """The same two turns, the second encoding and prefilling the whole conversation: what the released adapter does."""
        sessions, turns = self._first()
        again = []
        for i in self._callers():
            start, images = time.perf_counter(), (*self.first[i].images, *self.second[i].images)
            views = [self.vlm.pixels(image) for image in images]
            grids = [grid for _, grid, _ in views]
            ids = [*self.vlm.chunk(Session(), self.first[i], grids[:1]), *self.call]
            before = Session(turns=[self.first[i]], replies=sessions[i].replies)
            ids += self.vlm.chunk(before, self.second[i], grids[1:])
            whole = Prepared(ids, [p for p, _, _ in views], grids, seconds=time.perf_counter() - start)
            again.append(Request(Session(), self.second[i], len(self.answer) + 1, prepared=whole, forced=self.answer))
        return [turns, self._reply(again)]

    def _first(self) -> tuple[list[Session], list[Usage]]:
        sessions = [Session() for _ in self.first]
        forced = [self.call if calls else self.answer for calls in self.calls]
        asked = zip(sessions, self.first, forced, strict=True)
        budget = max(CALL_BUDGET, len(self.answer) + 1)
        return sessions, self._reply([Request(s, t, budget, forced=f) for s, t, f in asked])

    def _callers(self) -> list[int]:
        return [i for i, calls in enumerate(self.calls) if calls]

    def _reply(self, requests: list[Request]) -> list[Usage]:
        return [r.usage for r in self.vlm.reply(requests)] if requests else []

    # -------------------------------------------------------------- transformers' own loop

    def generate_full(self) -> list[list[Usage]]:
        """One turn, the whole page, through ``model.generate``."""
        return [
            [self.generate([messages([t], []) for t in self.full_turns], [t.images for t in self.full_turns], self.answer)[0]]
        ]

    def generate_low_then_everything(self) -> list[list[Usage]]:
        """Two calls of ``model.generate``, as the released adapter makes them (batch 1: it knows no other)."""
        turns: list[list[Usage]] = [[], []]
        for one, two, calls in zip(self.first, self.second, self.calls, strict=True):
            said = self.call if calls else self.answer
            turns[0].append(self.generate([messages([one], [])], [one.images], said)[0])
            if calls:
                talk = messages([one, two], [PAPER_GRID.format(CROP)])
                turns[1].append(self.generate([talk], [(*one.images, *two.images)], self.answer)[0])
        return turns

    @torch.inference_mode()
    def generate(self, talks: list, images: list, said: tuple[int, ...]) -> tuple[Usage, torch.Tensor]:
        """-> what a batch cost, and the scores of every step (steps, B, vocabulary)."""
        vlm, clock = self.vlm, time.perf_counter
        start = clock()
        text = vlm.processor.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        flat = [image for row in images for image in row]
        sized = {"size": vlm.limits}
        inputs = vlm.processor(
            text=text, images=flat, padding=True, padding_side="left", return_tensors="pt", images_kwargs=sized
        )
        prepared = clock()
        inputs = inputs.to(vlm.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.model.dtype)
        watch = _Watch(vlm, said)
        tower = vlm.model.model.visual
        hooks = [tower.register_forward_pre_hook(watch.enter), tower.register_forward_hook(watch.leave)]
        try:
            out = vlm.model.generate(
                **inputs,
                max_new_tokens=len(said) + 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([watch]),
                output_logits=True,
                return_dict_in_generate=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        vlm.synchronise()
        end = clock()
        visual = int((inputs["input_ids"] == vlm.image_token).sum())
        prompt = int(inputs["attention_mask"].sum())
        spans = (prepared - start, watch.encoding, watch.first - prepared - watch.encoding, end - watch.first)
        scores = torch.stack(out.logits).float()
        return Usage(visual, float(visual), prompt - visual, len(said) * len(talks), *spans, watch.steps - 1), scores

    # -------------------------------------------------------------- exactness and cost

    def difference(self) -> float:
        """Largest difference of a score between our loop and ``model.generate``, all documents in one batch at full resolution."""
        self.vlm.trace = []
        try:
            self.full()
            ours = torch.stack(self.vlm.trace)
        finally:
            self.vlm.trace = None
        _, theirs = self.generate([messages([t], []) for t in self.full_turns], [t.images for t in self.full_turns], self.answer)
        steps = min(len(ours), len(theirs))
        return float((ours[:steps] - theirs[:steps]).abs().max())

    def flops(self, kind: str) -> tuple[float, float, float]:
        """(encode, prefill, decode) of ``full``, ``kept`` or ``again``, from the shapes of the turns."""
        total = np.zeros(3)
        for i, calls in enumerate(self.calls):
            if kind == "full":
                total += self._cost([self.full_turns[i].images[0]], self.full_turns[i], Session(), 0, self.answer)
                continue
            low, crop = [self.first[i].images[0]], list(self.second[i].images)
            total += self._cost(low, self.first[i], Session(), 0, self.call if calls else self.answer)
            if calls:
                one = len(self._ids(low, self.first[i], Session())) + len(self.call)
                said = Session(turns=[self.first[i]], replies=[PAPER_GRID.format(CROP)])
                if kind == "kept":
                    total += self._cost(crop, self.second[i], said, one, self.answer)
                else:
                    new = one + len(self._ids(crop, self.second[i], said))
                    total += self._spent([*low, *crop], new, 0, self.answer)
        return tuple(total)

    def _ids(self, images: list, turn: Turn, session: Session) -> list[int]:
        return self.vlm.chunk(session, turn, [self._grid(image) for image in images])

    def _cost(self, images: list, turn: Turn, session: Session, past: int, said: tuple) -> np.ndarray:
        return self._spent(images, len(self._ids(images, turn, session)), past, said)

    def _spent(self, images: list, new: int, past: int, said: tuple) -> np.ndarray:
        config = self.vlm.model.config
        steps = sum(decoder_flops(config, 1, past + new + n) for n in range(len(said)))
        return np.array([encode_flops(config, [self._grid(i) for i in images]), decoder_flops(config, new, past), steps])

    def _grid(self, image) -> tuple[int, int, int]:
        return self.vlm.pixels(image)[1]


class _Watch(LogitsProcessor):
    """Reads the clock around the tower and at the first scores of a ``generate`` call, and forces its tokens."""

    def __init__(self, vlm: VLM, said: tuple[int, ...]):
        self.vlm, self.said = vlm, (*said, min(vlm.stop))
        self.encoding = self.entered = self.first = 0.0
        self.steps = 0

    def enter(self, *_) -> None:
        self.vlm.synchronise()
        self.entered = time.perf_counter()

    def leave(self, *_) -> None:
        self.vlm.synchronise()
        self.encoding += time.perf_counter() - self.entered

    def __call__(self, input_ids, scores):
        if not self.steps:
            self.vlm.synchronise()
            self.first = time.perf_counter()
        out = torch.full_like(scores, -torch.inf)
        out[:, self.said[self.steps]] = 0.0
        self.steps += 1
        return out


def load(
    pretrained: str | None, size: str | None, layers: int | None, dtype: str, device: str, decoder: int | None = None
) -> VLM:
    """A checkpoint, or random weights of a published size; decoder: build only so many of its decoder's layers."""
    if pretrained:
        return VLM.load(resolve(pretrained), dtype, device)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    return VLM(*random_model(geometry(size or "nano", layers, decoder), getattr(torch, dtype), device))


def alternate(rows: list[Row], repeats: int, warm_up: int = 1) -> None:
    """Run every row ``repeats`` times, forwards and backwards in turn, after untimed rounds."""
    for n in range(-warm_up, repeats):
        for row in rows if n % 2 == 0 else rows[::-1]:
            start = time.perf_counter()
            turns = [sum(turn, Usage()) for turn in row.run()]
            said = f"round {n + 1} of {repeats}" if n >= 0 else "warm-up"
            print(f"{said}: {row.name}, {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
            if n >= 0:
                row.turns.append(turns)


def matmul_rates(vlm: VLM, rows: int, batch: int) -> tuple[float, float]:
    """Operations per second of the decoder's widest matrix, the best of ten: on ``rows`` tokens, and on ``batch`` as in decoding."""
    text = vlm.model.config.text_config
    weight = torch.rand(text.intermediate_size, text.hidden_size, device=vlm.device).to(vlm.model.dtype)
    out = []
    with torch.inference_mode():
        for n in (rows, batch):
            x = torch.rand(n, text.hidden_size, device=vlm.device).to(vlm.model.dtype)
            times = []
            for _ in range(10):
                start = time.perf_counter()
                product(x, weight)
                vlm.synchronise()
                times.append(time.perf_counter() - start)
            out.append(2 * n * weight.numel() / min(times))
    return out[0], out[1]
