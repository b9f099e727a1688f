"""Is the clock proportional to the tokens? Our engine beside the ways it replaces: same weights, same pages, one process.

Contestants run in turn, in alternating order; medians and spread are over the repeats, a first untimed round warms up. With
random weights (``geometry``) replies are forced: which documents call, for one quadrant, and how long the answers are.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from awares_bench.awares import CALL_BUDGET
from awares_bench.errors import RunError
from awares_bench.inference.batch import Batch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Prepared, Request, Session
from awares_bench.methods.conversation import Failure, Reply, Sample, Turn, chat_messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import HALF_SHARE, half, share_of
from awares_bench.methods.usage import Usage
from awares_bench.models.cpu_kernels import linear_onednn
from awares_bench.models.families import host_of
from awares_bench.models.flops import decoder_flops, vision_flops
from awares_bench.models.packaged import resolve

from .synthetic_models import geometry, random_model

CROP = "bottom-right"
PHASES = ("preprocess", "encode", "prefill", "decode")


@dataclass
class Contestant:
    """A way to do the work, and what its repeats took."""

    name: str
    run: Callable[[], list[list[Usage]]]
    """Does the work once -> per turn, the usage of each document."""
    flops: tuple[float, float, float] | None = None
    """Operations of one repeat: encode, prefill, decode."""
    turns: list[list[Usage]] = field(default_factory=list)
    """Per repeat, per turn, the usage summed over the documents."""
    peak_bytes: int | None = None
    """Most memory in use during a repeat (see ``memory``); None where nobody looked."""

    def seconds(self, turn: int | None = None, phases: tuple[str, ...] = PHASES) -> list[float]:
        """Of each repeat, in these phases, of one turn or of all."""
        repeats = [turns if turn is None else turns[turn : turn + 1] for turns in self.turns]
        return [sum(getattr(usage, f"{phase}_seconds") for usage in turns for phase in phases) for turns in repeats]

    def as_dict(self, rates: tuple[float, float]) -> dict:
        """What is printed and written: tokens of one repeat, median seconds, their quartiles, the floor."""
        usage = sum(self.turns[0], Usage())
        floor = self.flops and (self.flops[0] + self.flops[1]) / rates[0] + self.flops[2] / rates[1]
        return {
            "name": self.name,
            "visual_tokens": usage.prefill,
            "encoded_tokens": usage.encoded,
            "text_tokens": usage.text,
            "output_tokens": usage.output,
            "passes": usage.passes,
            "seconds": median(self.seconds()),
            "quartiles": [float(np.quantile(self.seconds(), q)) for q in (0.25, 0.75)],
            "phases": [{p: median(self.seconds(t, (p,))) for p in PHASES} for t in range(len(self.turns[0]))],
            "floor_seconds": floor,
            "peak_memory_bytes": self.peak_bytes,
        }


@dataclass
class Pages:
    """Documents of shape 3:4, and what is asked and forced of each."""

    vlm: LocalModel
    tokens: int
    """Visual tokens of a page, about."""
    documents: int
    call_rate: float
    """Share of the pages that call for one quadrant."""
    answer_length: int
    """Tokens of an answer."""

    def __post_init__(self):
        columns = max(2, 2 * round((self.tokens * 3 / 4) ** 0.5 / 2))
        rows = max(2, 2 * round(self.tokens / columns / 2))
        noise = np.random.default_rng(0).integers(0, 256, (self.documents, rows * 4, columns * 4, 3), dtype=np.uint8)
        self.images = [Image.fromarray(n).resize((columns * 28, rows * 28), Image.Resampling.BILINEAR) for n in noise]
        self.calls = [int((i + 1) * self.call_rate) > int(i * self.call_rate) for i in range(self.documents)]
        tokenizer = self.vlm.tokenizer
        self.call = tuple(tokenizer(PAPER_GRID.format(CROP), add_special_tokens=False)["input_ids"])
        digits = tokenizer("7", add_special_tokens=False)["input_ids"]
        self.answer = tuple(digits * self.answer_length)[: self.answer_length]
        self.full_turns = [Turn((image,), "What is the total of the second column?") for image in self.images]
        shown = [replace(t, images=(half(i),), shares=(HALF_SHARE,)) for t, i in zip(self.full_turns, self.images, strict=True)]
        self.first = [replace(t, system=PAPER_GRID.prompt, is_final=False, crop_grammar=PAPER_GRID) for t in shown]
        crops = [PAPER_GRID.cut(image, (CROP,))[0] for image in self.images]
        self.second = [Turn((c,), shares=(share_of(c, image),)) for c, image in zip(crops, self.images, strict=True)]

    def laid_out(self, layout: type[Batch], work: Callable[[], list[list[Usage]]]) -> list[list[Usage]]:
        """The same work with rows laid out in another way."""
        before, self.vlm.layout = self.vlm.layout, layout
        try:
            return work()
        finally:
            self.vlm.layout = before

    def full(self) -> list[list[Usage]]:
        """One turn, the whole page."""
        return [self._reply([Request(Session(), t, len(self.answer) + 1, forced_tokens=self.answer) for t in self.full_turns])]

    def low_then_crop(self) -> list[list[Usage]]:
        """Two turns on one cache."""
        sessions, turns = self._first()
        again = [Request(sessions[i], self.second[i], len(self.answer) + 1, forced_tokens=self.answer) for i in self._callers()]
        return [turns, self._reply(again)]

    def low_then_everything(self) -> list[list[Usage]]:
        """The same two turns, the second encoding and prefilling the whole conversation: what the released adapter does."""
        sessions, turns = self._first()
        again = []
        for i in self._callers():
            start, images = time.perf_counter(), (*self.first[i].images, *self.second[i].images)
            views = [self.vlm.host.image_input(image) for image in images]
            ids = [*self.vlm.host.render([self.first[i]], [], views[:1]), *self.call]
            ids += self.vlm.host.render([self.first[i], self.second[i]], sessions[i].replies, views[1:])
            conversation = Prepared(ids, views, self.vlm.host.context, seconds=time.perf_counter() - start)
            again.append(
                Request(Session(), self.second[i], len(self.answer) + 1, prepared=conversation, forced_tokens=self.answer)
            )
        return [turns, self._reply(again)]

    def _first(self) -> tuple[list[Session], list[Usage]]:
        sessions = [Session() for _ in self.first]
        forced = [self.call if calls else self.answer for calls in self.calls]
        asked = zip(sessions, self.first, forced, strict=True)
        budget = max(CALL_BUDGET, len(self.answer) + 1)
        return sessions, self._reply([Request(s, t, budget, forced_tokens=f) for s, t, f in asked])

    def _callers(self) -> list[int]:
        return [i for i, calls in enumerate(self.calls) if calls]

    def _reply(self, requests: list[Request]) -> list[Usage]:
        replies = self.vlm.reply(requests) if requests else []
        failures = [r.error for r in replies if isinstance(r, Failure)]
        if failures:
            raise RunError(f"{len(failures)} of {len(replies)} pages could not be answered: {failures[0]}")
        return [r.usage for r in replies if isinstance(r, Reply)]

    # -------------------------------------------------------------- transformers' own loop

    def generate_full(self) -> list[list[Usage]]:
        """One turn, the whole page, through ``model.generate``."""
        return [
            [
                self.generate(
                    [chat_messages([t], []) for t in self.full_turns], [t.images for t in self.full_turns], self.answer
                )[0]
            ]
        ]

    def generate_low_then_everything(self) -> list[list[Usage]]:
        """Two calls of ``model.generate``, as the released adapter makes them (batch 1: it knows no other)."""
        turns: list[list[Usage]] = [[], []]
        for one, two, calls in zip(self.first, self.second, self.calls, strict=True):
            said = self.call if calls else self.answer
            turns[0].append(self.generate([chat_messages([one], [])], [one.images], said)[0])
            if calls:
                talk = chat_messages([one, two], [PAPER_GRID.format(CROP)])
                turns[1].append(self.generate([talk], [(*one.images, *two.images)], self.answer)[0])
        return turns

    @torch.inference_mode()
    def generate(self, talks: list, images: list, forced: tuple[int, ...]) -> tuple[Usage, torch.Tensor]:
        """Conversations with the pictures of each, and the reply of all -> what they cost, and the scores (steps, B, vocabulary)."""
        vlm, clock = self.vlm, time.perf_counter
        start = clock()
        text = vlm.host.processor.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        flat = [image for row in images for image in row]
        sized = {"size": vlm.host.limits}
        inputs = vlm.host.processor(
            text=text, images=flat, padding=True, padding_side="left", return_tensors="pt", images_kwargs=sized
        )
        prepared = clock()
        inputs = inputs.to(vlm.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.host.dtype)
        watch = _Watch(vlm, forced)
        tower = vlm.host.model.model.visual
        hooks = [tower.register_forward_pre_hook(watch.enter), tower.register_forward_hook(watch.leave)]
        try:
            out = vlm.host.model.generate(
                **inputs,
                max_new_tokens=len(forced) + 1,
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
        visual = int((inputs["input_ids"] == vlm.host.image_token).sum())
        prompt = int(inputs["attention_mask"].sum())
        usage = Usage(
            encoded=visual,
            prefill=float(visual),
            text=prompt - visual,
            output=len(forced) * len(talks),
            preprocess_seconds=prepared - start,
            encode_seconds=watch.encoding,
            prefill_seconds=watch.first - prepared - watch.encoding,
            decode_seconds=end - watch.first,
            passes=watch.steps - 1,
        )
        return usage, torch.stack(out.logits).float()

    # -------------------------------------------------------------- exactness and cost

    def difference(self) -> float:
        """Largest difference of a score between our loop and ``model.generate``, all documents in one batch at full resolution."""
        self.vlm.trace = []
        try:
            self.full()
            ours = torch.stack(self.vlm.trace)
        finally:
            self.vlm.trace = None
        _, theirs = self.generate(
            [chat_messages([t], []) for t in self.full_turns], [t.images for t in self.full_turns], self.answer
        )
        steps = min(len(ours), len(theirs))
        return float((ours[:steps] - theirs[:steps]).abs().max())

    def flops(self, kind: str) -> tuple[float, float, float]:
        """(encode, prefill, decode) of ``full``, ``kept`` or ``again``, from the shapes of the turns."""
        total = np.zeros(3)
        for calls in dict.fromkeys(self.calls):  # pages are of one size: one of each kind tells the others
            i, pages = self.calls.index(calls), self.calls.count(calls)
            if kind == "full":
                total += pages * self._cost([self.full_turns[i].images[0]], self.full_turns[i], Session(), 0, self.answer)
                continue
            low, crop = [self.first[i].images[0]], list(self.second[i].images)
            total += pages * self._cost(low, self.first[i], Session(), 0, self.call if calls else self.answer)
            if calls:
                one = len(self._ids(low, self.first[i], Session())) + len(self.call)
                first = Session(turns=[self.first[i]], replies=[PAPER_GRID.format(CROP)])
                if kind == "kept":
                    total += pages * self._cost(crop, self.second[i], first, one, self.answer)
                else:
                    new = one + len(self._ids(crop, self.second[i], first))
                    total += pages * self._spent([*low, *crop], new, 0, self.answer)
        return float(total[0]), float(total[1]), float(total[2])

    def _ids(self, images: list, turn: Turn, session: Session) -> list[int]:
        views = [self.vlm.host.image_input(image) for image in images]
        return self.vlm.host.render([*session.turns, turn], session.replies, views)

    def _cost(self, images: list, turn: Turn, session: Session, past: int, said: tuple) -> np.ndarray:
        return self._spent(images, len(self._ids(images, turn, session)), past, said)

    def _spent(self, images: list, new: int, past: int, said: tuple) -> np.ndarray:
        config = self.vlm.host.model.config.to_dict()
        tower = sum(vision_flops(self.vlm.visual_tokens(image), config["vision_config"]) for image in images)
        steps = np.sum(decoder_flops(np.ones(len(said)), config["text_config"], past + new + np.arange(len(said))))
        return np.array([tower, decoder_flops(new, config["text_config"], past), steps])

    def _grid(self, image) -> tuple[int, int, int]:
        return tuple(self.vlm.host.image_input(image).inputs["image_grid_thw"][0].tolist())


class _Watch(LogitsProcessor):
    """Reads the clock around the tower and at the first scores of a ``generate`` call, and forces its tokens."""

    def __init__(self, vlm: LocalModel, forced: tuple[int, ...]):
        self.vlm, self.forced = vlm, (*forced, min(vlm.host.stop))
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
        out[:, self.forced[self.steps]] = 0.0
        self.steps += 1
        return out


def load(
    pretrained: str | None, size: str | None, layers: int | None, dtype: str, device: str, decoder: int | None = None
) -> LocalModel:
    """A checkpoint, or random weights of a published size; decoder: build only so many of its decoder's layers."""
    if pretrained:
        return LocalModel.load(resolve(pretrained), dtype, device)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    return LocalModel(host_of(*random_model(geometry(size or "nano", layers, decoder), getattr(torch, dtype), device)))


def alternate(contestants: list[Contestant], repeats: int, warm_up: int = 1, vlm: LocalModel | None = None) -> None:
    """Run every contestant ``repeats`` times, forwards and backwards in turn, after untimed rounds.

    vlm: the model that all of them use, where their peak memory is wanted too.
    """
    for n in range(-warm_up, repeats):
        for contestant in contestants if n % 2 == 0 else contestants[::-1]:
            counted = vlm is not None and vlm.restart_peak()
            start = time.perf_counter()
            turns = [sum(turn, Usage()) for turn in contestant.run()]
            if vlm is not None and counted:
                contestant.peak_bytes = max(contestant.peak_bytes or 0, vlm.peak_since_restart())
            stage = f"round {n + 1} of {repeats}" if n >= 0 else "warm-up"
            print(f"{stage}: {contestant.name}, {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
            if n >= 0:
                contestant.turns.append(turns)


def matmul_rates(vlm: LocalModel, rows: int, batch: int) -> tuple[float, float]:
    """Operations per second of the decoder's widest matrix, the best of ten: on ``rows`` tokens, and on ``batch`` as in decoding."""
    text = vlm.host.model.config.text_config
    weight = torch.rand(text.intermediate_size, text.hidden_size, device=vlm.device).to(vlm.host.dtype)
    out = []
    with torch.inference_mode():
        for n in (rows, batch):
            x = torch.rand(n, text.hidden_size, device=vlm.device).to(vlm.host.dtype)
            times = []
            for _ in range(10):
                start = time.perf_counter()
                linear_onednn(x, weight)
                vlm.synchronise()
                times.append(time.perf_counter() - start)
            out.append(2 * n * weight.numel() / min(times))
    return out[0], out[1]


def nano_samples(folder: Path, documents: int) -> list[Sample]:
    """The first documents of every task of the suite but V*, tasks in turn."""
    import pandas as pd

    frames = [
        pd.read_parquet(path, columns=["image", "question"])
        for path in sorted(folder.glob("nano_*.parquet"))
        if "vstar" not in path.name
    ]
    rows = [row for together in zip(*(f.itertuples() for f in frames), strict=False) for row in together][:documents]
    pictures = [Image.open(io.BytesIO(row.image["bytes"])).convert("RGB") for row in rows]
    return [Sample((picture,), row.question, str(i)) for i, (picture, row) in enumerate(zip(pictures, rows, strict=True))]
