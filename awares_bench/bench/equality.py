"""Do all ways to compute a conversation give the same scores? In float32 they must to rounding; in bfloat16 each is also held against float32
of the same weights, so that one way is no worse than another.

Conversations of two turns on pages of different sizes, with forced replies: what is compared are the scores before every token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from awares_bench.awares import CALL_BUDGET, AwaRes
from awares_bench.inference.batch import Batch
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.ragged_batch import RaggedBatch
from awares_bench.inference.session import Request, Session
from awares_bench.inference.varlen_attention import kernel_for, kernels, trial
from awares_bench.inference.varlen_batch import VarlenBatch
from awares_bench.methods.conversation import Failure, Sample, Turn, chat_messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.models.families import host_of
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rendering import render

from .contestants import Pages
from .synthetic_models import geometry, random_model

OWN, PLAIN = "own layout", "own layout, steps from Python"
"""Questions whose answers decide what is measured further."""

Scores = list[Tensor]
"""(steps, vocabulary) for each page's first turn, then for each page's second."""


class PlainSteps(VarlenBatch):
    """Every step from Python, none recorded."""

    graphs = False


def compare(ours: Scores, theirs: Scores) -> dict:
    """Largest difference; norm of the difference over that of ``theirs``; share of equal most probable tokens; what was compared."""
    pairs = [(a[: len(b)].double(), b[: len(a)].double()) for a, b in zip(ours, theirs, strict=True)]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    return {
        "largest": float((a - b).abs().max()),
        "relative": float((a - b).norm() / b.norm()),
        "same_choice": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        "largest_score": float(b.abs().max()),
        "compared": len(b),
    }


class Equality:
    """A random model in one precision, the pages that it is asked about, and its scores by several ways.

    tokens: visual tokens of each page. exact: the same weights in float32, whose scores every way is held against.
    """

    def __init__(self, size: str, layers: int | None, dtype: torch.dtype, device: str, tokens: tuple[int, ...], answer: int,
                 exact: Equality | None = None):  # fmt: skip
        self.size, self.layers, self.dtype, self.device = size, layers, dtype, device
        self.tokens, self.answer, self.exact = tokens, answer, exact

    @cached_property
    def vlm(self) -> LocalModel:
        """The model: float32 weights are those that bfloat16 holds too."""
        if self.exact is None:
            model, processor = random_model(geometry(self.size, self.layers), torch.float32, self.device)
            for p in model.parameters():
                p.data = p.data.bfloat16().to(self.dtype)
            return LocalModel(host_of(model, processor))
        other = self.exact.vlm.host
        model = copy.deepcopy(other.model)
        for p in model.parameters():  # not ``model.to``, which would round the rotary frequencies too
            p.data = p.data.to(self.dtype)
        return LocalModel(other.on(model))

    @cached_property
    def pages(self) -> list[Pages]:
        return [Pages(self.vlm, n, 1, 1.0, self.answer) for n in self.tokens]

    def by(self, layout: type[Batch], together: bool) -> Scores:
        """Our scores with rows laid out so; together: all pages in one batch, else one after the other."""
        before, self.vlm.layout = self.vlm.layout, layout
        try:
            groups = [self.pages] if together else [[page] for page in self.pages]
            turns = [self._turns(group) for group in groups]
            return [scores for n in (0, 1) for group in turns for scores in group[n]]
        finally:
            self.vlm.layout = before

    def _turns(self, pages: list[Pages]) -> tuple[Scores, Scores]:
        sessions = [Session() for _ in pages]
        first = [
            Request(s, p.first[0], max(CALL_BUDGET, len(p.call) + 1), forced_tokens=p.call)
            for s, p in zip(sessions, pages, strict=True)
        ]
        one = self._traced(first)
        second = [
            Request(s, p.second[0], len(p.answer) + 1, forced_tokens=p.answer) for s, p in zip(sessions, pages, strict=True)
        ]
        return one, self._traced(second)

    def _traced(self, requests: list[Request]) -> Scores:
        self.vlm.trace = []
        try:
            failures = [r.error for r in self.vlm.reply(requests) if isinstance(r, Failure)]
            if failures:
                raise RuntimeError(f"{len(failures)} of {len(requests)} pages could not be answered: {failures[0]}")
            rows = torch.stack(self.vlm.trace, 1).cpu()  # (B, steps, vocabulary), NaN after a row's end
        finally:
            self.vlm.trace = None
        return [row[~row.isnan().any(-1)] for row in rows]

    @cached_property
    def alone(self) -> Scores:
        """One page after the other, in the rectangle that has then no padding."""
        return self.by(PaddedBatch, together=False)

    @cached_property
    def generated(self) -> Scores:
        """The scores of ``model.generate``, which encodes and prefills the whole conversation for its second turn."""

        def said(page: Pages, turns: list[Turn], replies: list[str], forced: tuple[int, ...]) -> Tensor:
            images = [image for turn in turns for image in turn.images]
            return page.generate([chat_messages(turns, replies)], [images], forced)[1][:, 0].cpu()

        call = [PAPER_GRID.format("bottom-right")]
        one = [said(p, [p.first[0]], [], p.call) for p in self.pages]
        return one + [said(p, [p.first[0], p.second[0]], call, p.answer) for p in self.pages]

    def turn(self, scores: Scores, number: int) -> Scores:
        """Those of the first (0) or second (1) turns."""
        return scores[number * len(self.pages) :][: len(self.pages)]

    # ------------------------------------------------------------------ what is asked

    def generate(self) -> dict:
        """Our scores beside ``generate``'s: the first turn, and the second on the kept cache beside a fresh prefill."""
        with exact_products():
            out = {
                name: compare(self.turn(self.alone, n), self.turn(self.generated, n))
                for n, name in enumerate(("first turn", "second turn, kept cache beside a fresh prefill"))
            }
            return out | self._errors({"ours": self.alone, "generate": self.generated})

    @torch.inference_mode()
    def tower(self) -> dict:
        """Features of all pages in one call beside the tower as transformers runs it."""
        host = self.vlm.host
        views = [host.image_input(page.images[0]) for page in self.pages]
        with exact_products():
            ours = torch.cat([run.features for run in host.encode(views)])
            patches, grids = (torch.cat([view.inputs[name] for view in views]) for name in ("pixel_values", "image_grid_thw"))
            theirs = host.tower(patches.to(host.device, host.dtype), grid_thw=grids.to(host.device)).pooler_output
        return compare([ours.cpu()], [theirs.cpu()]) | {"same_choice": None}  # there is none in a feature

    def layout(self, kind: type[Batch]) -> dict:
        """A batch of unequal pages beside one after the other."""
        with exact_products():
            together = self.by(kind, together=True)
            out = {"layout": kind.__name__, "a batch beside one by one": compare(together, self.alone)}
            return out | self._errors({"a batch": together, "one by one": self.alone})

    def _errors(self, ways: dict[str, Scores]) -> dict:
        if self.exact is None:
            return {}
        return {f"{name} beside float32": compare(scores, self.exact.alone) for name, scores in ways.items()}

    @torch.no_grad()
    def scoring(self) -> dict:
        """Log-probabilities of what a group of rollouts said: packed into one row beside each rollout in a row of its own."""
        vlm, page = self.vlm, self.pages[0]
        sample = Sample(tuple(page.full_turns[0].images), page.full_turns[0].text)
        calls = [PAPER_GRID.format(name) for name in PAPER_GRID.names[:2]]
        spoken = [[calls[0], "77"], [calls[0], "7"], [calls[1], "7"], ["777"]]
        group = [render(vlm, AwaRes(), sample, replies) for replies in spoken]
        scorer = Scorer(vlm.host)

        def scored(groups: list) -> Tensor:
            packed = pack(groups, vlm.host, self.device)
            return scorer(packed, vlm.encode(packed.images))[0].cpu()

        with exact_products():
            packed, alone = scored([group]), torch.cat([scored([[one]]) for one in group])
        difference = (packed - alone).abs()
        return {"largest": float(difference.max()), "mean": float(difference.mean()), "compared": len(alone)}


@contextmanager
def exact_products() -> Iterator[None]:
    """Within the block float32 is float32 everywhere: cuDNN's convolutions (the stock patch embedding) use TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def questions(size: str, layers: int | None, device: str, tokens: tuple[int, ...], answer: int) -> dict[str, Callable[[], dict]]:
    """Name -> what is compared, float32 before bfloat16."""
    exact = Equality(size, layers, torch.float32, device, tokens, answer)
    rounded = Equality(size, layers, torch.bfloat16, device, tokens, answer, exact)
    out: dict[str, Callable[[], dict]] = {}
    for way in (exact, rounded):
        name = str(way.dtype).removeprefix("torch.")
        out[f"{name}: generate"] = way.generate
        out[f"{name}: vision tower"] = way.tower
        out[f"{name}: rectangle"] = partial(way.layout, PaddedBatch)
        # on a GPU float32 has no kernel, and the layout is tried with the reference in its place
        if device != "cpu":
            out[f"{name}: {PLAIN}"] = partial(way.layout, PlainSteps)
        out[f"{name}: {OWN}"] = partial(way.layout, RaggedBatch if device == "cpu" else VarlenBatch)
        out[f"{name}: packed scoring"] = way.scoring
    if device != "cpu":
        out["bfloat16: kernels"] = lambda: kernels_here(rounded.vlm)
    return out


def kernels_here(vlm: LocalModel) -> dict:
    """Each kernel for rows of different lengths: its difference from the reference, or why it refuses; and the one that is taken."""
    found = kernel_for(vlm.device, vlm.host.dtype, *vlm.host.heads)
    out: dict = {"taken": found and found[0], "differences": {}}
    for name, kernel in kernels():
        try:
            out["differences"][name] = trial(kernel, vlm.device, vlm.host.dtype, *vlm.host.heads)
        except (RuntimeError, TypeError, ValueError) as error:
            out["differences"][name] = str(error).splitlines()[0]
    return out
