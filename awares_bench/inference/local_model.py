"""Answers turns with a model in this process: encode, prefill, extend, decode, in batches of mixed sizes.

The loop is ours rather than ``model.generate`` because exact counting, a second turn on the kept cache, and batches that mix
turns need it. Its logits equal those of ``generate`` and of a fresh prefill (tests/inference).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply, Turn
from awares_bench.methods.crop_grid import CropGrid
from awares_bench.methods.kept_tokens import KeptTokens
from awares_bench.methods.pruner import OF_THE_TOWER, Pruner, VisualTokens
from awares_bench.methods.usage import Usage
from awares_bench.models.base import HostModel, ImageInput, joined
from awares_bench.models.checkpoint import CheckpointError, first_line
from awares_bench.models.cpu_kernels import onednn_linears
from awares_bench.models.loading import load_host
from awares_bench.models.prompt_chunk import PromptChunk

from .batch import Batch
from .call_grammar import CallGrammar
from .decoding import Repetition, own_penalty, penalty_of, unsupported
from .hidden_state import last_hidden
from .image_features import FeatureStore
from .layerwise_batch import LayerwiseBatch
from .memory import peak, start_peak
from .padded_batch import PaddedBatch
from .ragged_batch import RaggedBatch
from .reply_decoder import ReplyDecoder
from .session import Prepared, Request, Session
from .token_choice import Greedy, Sampling, TokenChooser
from .varlen_attention import kernel_for
from .varlen_batch import VarlenBatch


@dataclass(frozen=True)
class SampledReply(Reply):
    """A reply and what scoring it needs."""

    prompt: tuple[int, ...] = ()
    """Ids fed before it, without those of the reply before."""

    written: tuple[int, ...] = ()
    """Its ids, with the token that ended it."""

    logprobs: tuple[float, ...] = ()
    """Log-probability of each of ``written``; 0 where they were forced."""

    images: tuple[ImageInput, ...] = ()

    forced: bool = False
    """The turn said it for the model."""

    prefilled: int = 0
    """Tokens fed for it; 0 where another row's prefill was shared."""


class LocalModel:
    """A host model that answers. Greedy decoding, unless told to sample; every public method is deterministic.

    engine: what records call this way of answering.
    constrained: hold replies that begin as a call to its grammar (``CallGrammar``); False is plain greedy decoding.
    repetition_penalty: 1 for none; None: the one of the checkpoint's ``generation_config.json``, as transformers' ``generate`` applies it.
    """

    engine = "transformers"

    def __init__(self, host: HostModel, constrained: bool = True, repetition_penalty: float | None = None):
        self.host = host
        if settings := unsupported(host.model.generation_config):
            raise CheckpointError(
                f"the checkpoint's generation_config.json asks for {', '.join(settings)}, which greedy decoding here does not do; "
                "remove it there to measure the model without"
            )
        self.constrained = constrained
        self.own_penalty = own_penalty(host.model.generation_config)
        self.repetition_penalty = self.own_penalty if repetition_penalty is None else penalty_of(repetition_penalty)
        self.features: FeatureStore | None = None
        """Set to keep vision features of pictures that may be seen again."""
        self.trace: list[Tensor] | None = None
        """Set to a list to collect the (B, vocabulary) scores of every choice, NaN where a row has ended; for tests."""
        self.layout: type[Batch] | None = None
        """How rows lie in memory; None for what suits the device."""
        self._grammars: dict[CropGrid, CallGrammar] = {}
        self._most = 0  # bytes at the peaks of replies that were counted one by one
        self._tokenizing = Lock()  # a fast tokenizer must not be configured while another thread uses it

    @classmethod
    def load(
        cls,
        pretrained: str,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str = "sdpa",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        constrained: bool = True,
        repetition_penalty: float | None = None,
        limits: str | None = None,
    ) -> LocalModel:
        """Load a checkpoint folder or hub name, or a folder of LoRA adapters, which are merged into the base that they name.

        dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. limits, min_pixels, max_pixels: of a picture (``HostModel``).
        Raises CheckpointError.
        """
        generic = cls.engine == "generic"
        host = load_host(pretrained, dtype, device, attn_implementation, min_pixels, max_pixels, limits, generic)
        return cls(host, constrained, repetition_penalty)

    @property
    def device(self) -> torch.device:
        return self.host.device

    @property
    def tokenizer(self):
        return self.host.tokenizer

    # ------------------------------------------------------------------ pictures and text to tokens

    def visual_tokens(self, image: Image.Image, share: float = 1.0) -> int:
        """Visual tokens that ``image`` costs under the processor's limits, without encoding it. share: see ``Turn.shares``."""
        return self.host.visual_tokens(image, share)

    def check(self, question: str, what: str = "the question") -> None:
        """Raise ValueError when a text cannot be asked (``HostModel.check_text``)."""
        self.host.check_text(question, what)

    def text(self, tokens: list[int] | tuple[int, ...], until: tuple[str, ...] = ()) -> str:
        """Token ids of a reply -> text without special tokens and the template's ``opening``, cut before the first stop string."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True).removeprefix(self.host.opening)
        return text[: min((text.find(s) for s in until if s in text), default=len(text))]

    def image_input(self, image: Image.Image, known: dict[str, ImageInput] | None = None, share: float = 1.0) -> ImageInput:
        """A picture as the encoder takes it. known: inputs made before, by key, which a picture is looked up in and added to.
        share: of the original, see ``Turn.shares``."""
        if known is None and self.features is None:
            return self.host.image_input(image, share=share)
        key = self.host.image_key(image, share)
        if known is None:
            return self.host.image_input(image, key, share)
        if key not in known:
            known[key] = self.host.image_input(image, key, share)
        return known[key]

    def prepare(self, request: Request, known: dict[str, ImageInput] | None = None) -> Prepared:
        """The CPU's part of a turn. It may run in any thread, ahead of the device; its session must not change until the reply.

        Raises ValueError when the conversation does not fit into the checkpoint's context.
        """
        start, session = time.perf_counter(), request.session
        images = [self.image_input(image, known, share) for image, share in request.turn.shown]
        events = [e for image in images for e in image.events]
        if self.device.type == "cuda":
            images = [image.pinned() for image in images]
        with self._tokenizing:
            new = self.host.render([*session.turns, request.turn], session.replies, images)
        ids = session.unfed_tokens + new
        _, end = self.host.positions(ids, images, session.next_position)
        if end >= self.host.context:
            raise ValueError(
                f"the conversation takes {end:,} positions, the checkpoint's context (max_position_embeddings) has {self.host.context:,}; "
                "shorten the question, or exclude the document"
            )
        return Prepared(ids, images, self.host.context - end, events, time.perf_counter() - start)

    def see(self, images: list[ImageInput], pruner: Pruner | None = None) -> list[VisualTokens]:
        """Pictures -> the visual tokens of each run, with what ``pruner`` needs beside the features.

        Pictures with equal keys are encoded once, and what the feature store holds is not encoded again, unless the pruner looks
        into the tower.
        """
        needs = set(pruner.needs) if pruner else set()
        if needs & {*OF_THE_TOWER} or not all(image.key for image in images):
            return self.host.encode(images, needs, pruner.vision_block if pruner else -1)
        store = self.features
        kept = {i.key: store.get(i.key) for i in images} if store else {}
        runs = {key: tokens for key, tokens in kept.items() if tokens is not None}
        todo = list({i.key: i for i in images if i.key not in runs}.values())
        encoded = iter(self.host.encode(todo))
        for image in todo:
            runs[image.key] = [next(encoded) for _ in image.runs]
            if store:
                store.put(image.key, runs[image.key])
        seeds = [image.seed if "seed" in needs else 0 for image in images]
        shown = [(image, seed) for image, seed in zip(images, seeds, strict=True)]
        return [replace(run, seed=seed + number) for image, seed in shown for number, run in enumerate(runs[image.key])]

    def encode(self, images: list[ImageInput]) -> Tensor | None:
        """Pictures -> their features in order, as ``joined``: (V, D), or wider; None for no pictures."""
        return joined(self.see(images)) if images else None

    # ------------------------------------------------------------------ answering

    def reply(
        self, requests: list[Request], pruner: Pruner | None = None, sampling: Sampling | None = None, names: Sequence[str] = ()
    ) -> list[Reply | Failure]:
        """Answer one turn of each session, all in one batch, whatever their sizes, turns and image counts.

        A session keeps its cache when ``turn.is_final`` is false; its next turn then prefills only what is new. A pruner cuts
        the images of this turn; what a session already holds stays as it is. A reply whose scores are not finite is a failure.
        sampling: sample the replies, as ``SampledReply``; names: of the conversations, which seed their random numbers. What equal
        conversations are shown is then prefilled once.

        Raises MemoryError when the device has no room; the sessions are then as they were.
        """
        before = [r.session.snapshot() for r in requests]
        self._most = self.peak_memory()
        counted = start_peak(self.device)
        try:
            # features and caches of rollouts meet gradients later, which those of inference mode must not
            mode = torch.no_grad() if sampling else torch.inference_mode()
            with mode, self.kernels():
                replies = self._reply(requests, pruner, sampling, names)
            most = peak(self.device) if counted else None
            return [r if isinstance(r, Failure) else replace(r, peak_memory_bytes=most) for r in replies]
        except torch.cuda.OutOfMemoryError as error:
            for r, snapshot in zip(requests, before, strict=True):
                r.session.restore(snapshot)
            reason = first_line(error)
        except getattr(torch, "AcceleratorError", ()) as error:  # of PyTorch 2.8 and later; the device answers nothing after it
            raise RunError(
                f"the device failed ({first_line(error)}); run the same command with the same output_dir: it goes on where it stopped"
            ) from error
        torch.cuda.empty_cache()  # here, where the traceback no longer holds the batch
        raise MemoryError(reason)

    def _reply(
        self, requests: list[Request], pruner: Pruner | None, sampling: Sampling | None, names: Sequence[str]
    ) -> list[Reply | Failure]:
        if pruner is not None and pruner.retention == 1:
            pruner = None
        cuts, noted = self.cut_layers(pruner), any(r.keep_masks for r in requests)
        before, inside = pruner.before_and_inside(self.host.layers) if pruner else (None, None)
        prepared = [r.prepared or self.prepare(r) for r in requests]
        clock, marks = time.perf_counter, [time.perf_counter()]
        # 1. rows: one a request, or one for all requests that hold the same and are shown the same
        rows, copies = _shared(requests, prepared) if sampling else ([*range(len(requests))], [*range(len(requests))])
        # 2. pictures to visual tokens, all in one call
        reused = self._reused([p.images for p in prepared])
        runs = iter(self.see([image for row in rows for image in prepared[row].images], pruner))
        self.synchronise()
        marks.append(clock())

        # 3. prefill
        chunks, sessions = [], [requests[row].session for row in rows]
        for row, session in zip(rows, sessions, strict=True):
            ids, images = prepared[row].ids, prepared[row].images
            shown = [next(runs) for image in images for _ in image.runs]
            chunk = self.host.chunk(ids, images, shown, session.next_position)
            if pruner and "question" in pruner.needs:
                chunk = replace(chunk, question=self.host.question_of(ids))
            chunks.append(chunk.cut(before, before.retention, noted=noted) if before else chunk)
        if inside:
            batch: Batch = LayerwiseBatch(self.host, sessions, chunks, inside, cuts, noted)
        else:
            batch = self._batch(sessions, chunks)
        scores = batch.prefill()
        if sampling:
            batch.share(copies)
            scores = scores[copies]
        self.synchronise()
        marks.append(clock())

        # 4. decode
        limited = [replace(r, max_reply_tokens=min(r.max_reply_tokens, p.room)) for r, p in zip(requests, prepared, strict=True)]
        grammars = [None if sampling else self._grammar(r) for r in requests]
        replies = [
            ReplyDecoder(r, self.tokenizer, self.host.stop, grammar, self.trace is not None, self.host.opening)
            for r, grammar in zip(limited, grammars, strict=True)
        ]
        penalty = [self.repetition_penalty if r.penalty is None else r.penalty for r in requests]
        seen = [
            r.session.seen.union(p.ids) if value != 1 else frozenset()
            for r, p, value in zip(requests, prepared, penalty, strict=True)
        ]
        chooser: TokenChooser = Greedy()
        if sampling:
            budget = max((r.max_reply_tokens for r in limited if r.turn.forced_reply is None), default=1)
            chooser = sampling.chooser(names, [len(r.session.replies) for r in requests], budget, self.device)
        batch.decode(scores, replies, chooser, Repetition(seen, penalty, self.device))
        self.synchronise()
        marks.append(clock())
        if self.trace is not None:
            self.trace += traced(replies, scores)

        # 5. replies, and what the sessions keep
        visual = [sum(image.tokens for image in p.images) for p in prepared]
        text = [len(p.ids) - n for p, n in zip(prepared, visual, strict=True)]
        output = [0 if r.forced else len(r.tokens) for r in replies]
        seconds = shares(marks, visual, [len(p.ids) for p in prepared], output)
        out: list[Reply | Failure] = []
        for b, (r, decoder) in enumerate(zip(requests, replies, strict=True)):
            if decoder.fault:
                out.append(Failure(decoder.fault))
                continue
            usage = Usage(
                encoded=visual[b],
                prefill=batch.visual[b],
                text=text[b],
                output=output[b],
                preprocess_seconds=prepared[b].seconds,
                **seconds[b],
                passes=decoder.forward_passes,
            )
            forced = r.turn.forced_reply
            content = self.text(decoder.tokens, r.until) if forced is None else forced
            reply = Reply(content, () if decoder.forced else tuple(decoder.tokens), usage, decoder.ended, logprob=decoder.logprob)
            if noted:
                chunk = (batch.chunks if isinstance(batch, LayerwiseBatch) else chunks)[copies[b]]
                reply = replace(reply, kept=self._kept(r.turn, prepared[b], chunk))
            if sampling:
                first = copies.index(copies[b]) == b
                reply = _sampled(reply, decoder, prepared[b], len(r.session.unfed_tokens), first)
            out.append(reply)
            if r.turn.is_final:
                r.session.keys, r.session.values, r.session.storage = [], [], []
            else:
                batch.save_session(b, r.session, decoder.tokens)
        for b, (r, outcome) in enumerate(zip(requests, out, strict=True)):
            if isinstance(outcome, Failure):  # all of this comes after what may run out of memory
                continue
            if penalty[b] != 1:
                r.session.seen = seen[b].union(replies[b].tokens)
            if isinstance(outcome, SampledReply):
                r.session.history = (*_shown(r, prepared[b]), outcome.written)
            r.session.turns.append(r.turn)
            r.session.replies.append(outcome.text)
            r.session.events += [*prepared[b].events, *replies[b].events]
            if prepared[b].room < r.max_reply_tokens and not outcome.complete:
                detail = f"the reply was cut after {prepared[b].room} tokens: the checkpoint's context was full"
                r.session.events.append(Event(EventKind.CONTEXT_FULL, detail))
            if reused[b] and not sampling:
                detail = f"{reused[b]} pictures were encoded before; their encode time is not here"
                r.session.events.append(Event(EventKind.FEATURES_REUSED, detail))
        return out

    def _kept(self, turn: Turn, prepared: Prepared, chunk: PromptChunk) -> tuple[KeptTokens, ...]:
        """What the cuts of a turn's chunk noted, picture by picture."""
        sizes = [self.host.accepted(image)[0].size for image in turn.images]
        runs = [(i, run, image.runs) for i, image in enumerate(prepared.images) for run in range(len(image.runs))]
        out = []
        for (i, run, grids), span in zip(runs, chunk.spans, strict=True):
            averages: set[int] = set()
            for layer, places, merged in span.cuts:
                kept = set(places.tolist())
                averages = averages & kept | set(places[merged].tolist())  # an average stays one
                out.append(
                    KeptTokens(i, layer, grids[run], sizes[i], tuple(sorted(kept)), tuple(sorted(averages)), run, len(grids))
                )
        return tuple(out)

    def _reused(self, images: list[list[ImageInput]]) -> list[int]:
        """Per request, how many of its pictures the feature store holds, or an earlier request of the batch has."""
        if self.features is None:
            return [0] * len(images)
        known: set[str] = set()
        out = []
        for row in images:
            out.append(sum(image.key in known or image.key in self.features for image in row))
            known |= {image.key for image in row}
        return out

    def _batch(self, sessions: list[Session], chunks: list) -> Batch:
        return (self.layout or self.own_layout())(self.host, sessions, chunks)

    def own_layout(self) -> type[Batch]:
        """Rows without padding, on a GPU in half precision where it has a kernel for them; else, or where another attention was asked
        for, a padded rectangle."""
        if self.host.attention != "sdpa":
            return PaddedBatch
        if self.device.type == "cpu":
            return RaggedBatch
        return VarlenBatch if kernel_for(self.device, self.host.dtype, *self.host.heads) else PaddedBatch

    def kernels(self) -> AbstractContextManager:
        """Within the block the model's layers run on this package's kernels, where there are any."""
        return onednn_linears(self.host.decoder, self.host.model.get_output_embeddings())

    def cut_layers(self, pruner: Pruner | None) -> dict[int, float]:
        """The decoder layers of this model after which the pruner cuts. Raises ValueError for a pruner that this host cannot run."""
        if pruner is None:
            return {}
        pruner.check(self.host.decoder.config.hidden_size)
        layers = self.host.layers
        cuts = pruner.cut_layers(layers)
        wanted = {*pruner.needs, *(["decoder_attention"] if cuts else [])} - {"question"}
        if missing := sorted(wanted - self.host.provides):
            raise ValueError(
                f"{type(pruner).__name__} needs {', '.join(missing)}, which a {self.host.model_types[0]} host does not provide"
            )
        for layer in cuts:
            if not 0 <= layer < layers - 1:
                raise ValueError(
                    f"{type(pruner).__name__} cuts after decoder layer {layer}; this model has {layers} layers, so the last place is {layers - 2}"
                )
        return cuts

    def hidden_states(self, requests: list[Request]) -> list[Reply]:
        """The hidden state of the last token of each turn after ``turn.hidden_state_depth`` of the decoder's layers; nothing is kept."""
        return [last_hidden(self.host, r, r.prepared or self.prepare(r)) for r in requests]

    def _grammar(self, request: Request) -> CallGrammar | None:
        grid = request.turn.crop_grammar
        if grid is None or not self.constrained:
            return None
        if grid not in self._grammars:
            self._grammars[grid] = CallGrammar(grid, self.tokenizer)
        return self._grammars[grid]

    def warm_up(self) -> None:
        """Answer once for nothing, so that no document pays for the first use of kernels and allocators."""
        picture = Image.new("RGB", (224, 224))
        self.reply([Request(Session(), Turn((picture,), "?"), 2)])
        self.restart_peak()

    def restart_peak(self) -> bool:
        """Count peak memory from here on -> whether that is possible."""
        self._most = 0
        return start_peak(self.device)

    def peak_since_restart(self) -> int:
        """Most bytes in use since ``restart_peak`` returned true."""
        return max(self._most, peak(self.device))

    def peak_memory(self) -> int:
        """Most bytes in use so far: on the GPU by tensors, on a CPU by the whole process."""
        if self.device.type == "cuda":
            return max(self._most, torch.cuda.max_memory_allocated(self.device))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self._most, resident if sys.platform == "darwin" else resident * 1024)

    def synchronise(self) -> None:
        """Wait until the device has done what it was given, so that a clock may be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def traced(replies: Sequence[ReplyDecoder], scores: Tensor) -> Tensor:
    """The scores that replies chose by, (steps, B, vocabulary), NaN where a row has ended. scores: (..., vocabulary), for its shape."""
    kept = [torch.stack(r.scores or [scores.new_full(scores.shape[-1:], float("nan"))]) for r in replies]
    return torch.nn.utils.rnn.pad_sequence(kept, padding_value=float("nan"))


def _shown(request: Request, prepared: Prepared) -> tuple:
    """The history of a request's session with what it is now shown."""
    return (*request.session.history, tuple(prepared.ids), tuple(image.key for image in prepared.images))


def _shared(requests: list[Request], prepared: list[Prepared]) -> tuple[list[int], list[int]]:
    """-> the first request of each history, and for every request the place of its history among those."""
    first: dict[tuple, int] = {}
    histories = [_shown(r, p) for r, p in zip(requests, prepared, strict=True)]
    for i, history in enumerate(histories):
        first.setdefault(history, i)
    places = {history: place for place, history in enumerate(first)}
    return list(first.values()), [places[history] for history in histories]


def _sampled(reply: Reply, decoder: ReplyDecoder, prepared: Prepared, carried: int, first: bool) -> SampledReply:
    """carried: tokens at the start of the chunk that belong to the reply before. first: its prefill was its own."""
    written = (*decoder.tokens, *([] if decoder.end is None else [decoder.end]))
    return SampledReply(
        **vars(reply),
        prompt=tuple(prepared.ids[carried:]),
        written=written,
        logprobs=tuple(decoder.values) or (0.0,) * len(written),
        images=tuple(prepared.images),
        forced=decoder.forced,
        prefilled=len(prepared.ids) if first else 0,
    )


def shares(marks: list[float], visual: list[int], prompt: list[int], output: list[int]) -> list[dict[str, Any]]:
    """Seconds of encode, prefill and decode for each row: the batch's phases shared out by tokens."""
    phases = ("encode_seconds", "prefill_seconds", "decode_seconds")
    out: list[dict[str, Any]] = [{} for _ in prompt]
    for phase, (start, end), weights in zip(phases, pairwise(marks), (visual, prompt, output), strict=True):
        total = sum(weights)
        for row, weight in zip(out, weights, strict=True):
            row[phase] = (end - start) * (weight / total if total else 1 / len(prompt))
    return out
