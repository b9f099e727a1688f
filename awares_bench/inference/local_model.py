"""The one file that knows how Qwen2.5-VL is put together: encode, prefill, extend, decode, in batches of mixed sizes.

The loop is ours rather than ``model.generate`` because exact counting, a second turn on the kept cache, and batches that mix
turns need it. Its logits equal those of ``generate`` and of a fresh prefill (tests/test_vlm.py).
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from threading import Lock

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply, Turn, chat_messages
from awares_bench.methods.crop_grid import CropGrid
from awares_bench.methods.images import within_aspect
from awares_bench.methods.pruner import Pruner, VisualTokens
from awares_bench.methods.usage import Usage
from awares_bench.models.attention_scores import probed
from awares_bench.models.checkpoint import CheckpointError as CheckpointError
from awares_bench.models.checkpoint import first_line, load
from awares_bench.models.cpu_kernels import fast_products
from awares_bench.models.prompt_chunk import Chunk, Span, look
from awares_bench.models.qwen2_5_vl_vision import windowed_attention

from .call_grammar import CallGrammar
from .decoding import Repetition, own_penalty, penalty_of, unsupported
from .image_features import FeatureStore
from .layerwise_batch import StagedBatch
from .memory import peak, start_peak
from .padded_batch import Batch
from .ragged_batch import RaggedBatch
from .reply_decoder import Writer
from .session import Prepared, Request, Session

MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 16384 * 28 * 28
"""Limits of the released Qwen2.5-VL processors: 4 to 16,384 visual tokens an image."""

_END = "<|im_end|>"
_HOLE = "\ufdd0reply\ufdd0"  # two noncharacters around a word, lengthened where a question does contain it
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
"""Texts that Qwen2.5-VL's tokenizer reads as the place of a picture or video, in whatever they stand."""


def mrope_positions(
    ids: list[int], grids: list[tuple[int, int, int]], image_token: int, merge: int = 2, start: int = 0
) -> tuple[Tensor, int]:
    """M-RoPE positions (3, L) of a chunk that begins at position ``start``, and the position after it.

    Text advances all three axes by one. An image's tokens share their time, count rows and columns from where the text
    stopped, and the text goes on after the larger of the two. Equal to Qwen2.5-VL's ``get_rope_index`` (tested), which
    cannot start in mid-conversation.
    """
    out, at, i, grids = [], start, 0, list(grids)
    while i < len(ids):
        if ids[i] == image_token:
            _, rows, columns = grids.pop(0)
            rows, columns = rows // merge, columns // merge
            r, c = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
            out.append(torch.stack([torch.zeros_like(r), r, c]) + at)
            i, at = i + rows * columns, at + max(rows, columns)
        else:
            n = next((j for j in range(i, len(ids)) if ids[j] == image_token), len(ids)) - i
            out.append((torch.arange(n) + at).expand(3, -1))
            i, at = i + n, at + n
    return torch.cat(out, 1), at


def count_visual_tokens(processor, limits: dict[str, int], image: Image.Image) -> int:
    """Merged visual tokens of an image under a processor's limits (shortest_edge, longest_edge in pixels), without encoding it."""
    image, _ = within_aspect(image)
    ip = processor.image_processor
    given = {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}  # it does not read ``size``
    return ip.get_number_of_image_patches(image.height, image.width, given) // ip.merge_size**2


def check_text(text: str, marks: tuple[str, ...] = MARKS, what: str = "the question") -> None:
    """Raise ValueError when a text cannot be given to a tokenizer, or would be read as the place of a picture."""
    mark = next((m for m in marks if m in text), None)
    if mark:
        raise ValueError(f"{what} holds the text {mark!r}, which stands for an image; remove it from {what}")
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if half:
        raise ValueError(
            f"{what} holds half a character, the lone surrogate U+{ord(half):04X}, which no tokenizer reads; repair or remove it"
        )


class VLM:
    """A Qwen2.5-VL and its processor. Greedy decoding; every public method is deterministic.

    constrained: hold replies that begin as a call to its grammar (``CallGrammar``); False is plain greedy decoding.
    repetition_penalty: 1 for none; None: the one of the checkpoint's ``generation_config.json``, as transformers' ``generate`` applies it.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        processor,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        constrained: bool = True,
        repetition_penalty: float | None = None,
    ):
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels; got {min_pixels} and {max_pixels}")
        self.model, self.processor = model.eval(), processor
        self.decoder = model.model.language_model
        self.tokenizer = processor.tokenizer
        self.limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.image_token = model.config.image_token_id
        stop = model.generation_config.eos_token_id
        self.stop = set(stop if isinstance(stop, list) else [stop]) | {self.tokenizer.eos_token_id}
        if asked := unsupported(model.generation_config):
            raise CheckpointError(
                f"the checkpoint's generation_config.json asks for {', '.join(asked)}, which greedy decoding here does not do; "
                "remove it there to measure the model without"
            )
        self.constrained = constrained
        self.own_penalty = own_penalty(model.generation_config)
        self.repetition_penalty = self.own_penalty if repetition_penalty is None else penalty_of(repetition_penalty)
        self._grammars: dict[CropGrid, CallGrammar] = {}
        self._most = 0  # bytes at the peaks of replies that were counted one by one
        self._tokenizing = Lock()  # a fast tokenizer must not be configured while another thread uses it
        self.features: FeatureStore | None = None
        """Set to keep vision features of pictures that may be seen again."""
        self.trace: list[Tensor] | None = None
        """Set to a list to collect the (B, vocabulary) scores of every choice, NaN where a row has ended; for tests."""

    @classmethod
    def load(
        cls,
        pretrained: str,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str = "sdpa",
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        constrained: bool = True,
        repetition_penalty: float | None = None,
    ) -> VLM:
        """Load a checkpoint folder or hub name, or a folder of LoRA adapters, which are merged into the base that they name.

        dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. Raises CheckpointError.
        """
        model, processor = load(pretrained, dtype, device, attn_implementation)
        return cls(model, processor, min_pixels, max_pixels, constrained, repetition_penalty)

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device  # model.device goes through every parameter, and this is asked often

    # ------------------------------------------------------------------ pictures and text to tokens

    def pixels(self, image: Image.Image) -> tuple[Tensor, tuple[int, int, int], list[Event]]:
        """RGB image -> patches (P, 1176), grid (1, rows, columns) in patches, events."""
        image, events = within_aspect(image)
        out = self.processor.image_processor(images=[image], size=self.limits, return_tensors="pt")
        return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()), events

    def visual_tokens(self, image: Image.Image) -> int:
        """Merged visual tokens that ``image`` costs under this processor's limits, without encoding it."""
        return count_visual_tokens(self.processor, self.limits, image)

    def check(self, question: str, what: str = "the question") -> None:
        """Raise ValueError when a text holds an image mark, which the tokenizer would take for an image, or cannot be tokenized."""
        check_text(question, (self.tokenizer.convert_ids_to_tokens(self.image_token), *MARKS), what)

    def room(self, session: Session, ids: list[int], grids: list[tuple[int, int, int]]) -> int:
        """Tokens that fit into the context after the chunk ``ids``. Raises ValueError when not one does.

        A text token takes one position of the context, an image as many as it has rows or columns (see ``mrope_positions``).
        """
        merge, limit = self.processor.image_processor.merge_size, self.decoder.config.max_position_embeddings
        images = sum(max(rows, columns) // merge - rows * columns // merge**2 for _, rows, columns in grids)
        end = session.next_position + len(ids) + images
        if end >= limit:
            raise ValueError(
                f"the conversation takes {end:,} positions, the checkpoint's context (max_position_embeddings) has {limit:,}; "
                "shorten the question, or exclude the document"
            )
        return limit - end

    def chunk(self, session: Session, turn: Turn, grids: list[tuple[int, int, int]]) -> list[int]:
        """Token ids that ``turn`` adds to the session: everything up to where the model writes.

        The chat template renders the whole conversation with holes for the replies; what follows the last hole is new.
        """
        turns, hole = [*session.turns, turn], _HOLE
        while any(hole in text for t in turns for text in (t.text, t.system or "", *t.image_prefixes)):
            hole += "\ufdd0"
        history = chat_messages(turns, [hole] * len(session.replies))
        text = self.processor.apply_chat_template(history, tokenize=False, add_generation_prompt=True).split(hole)[-1]
        if turn.omit_newline:  # the end of the model's reply, the line break to leave out, the new message
            text = text.replace(f"{_END}\n", _END, 1)
        marker = self.tokenizer.convert_ids_to_tokens(self.image_token)
        pieces = text.split(marker)
        merge = self.processor.image_processor.merge_size**2
        text = pieces[0] + "".join(
            marker * (rows * columns // merge) + p for (_, rows, columns), p in zip(grids, pieces[1:], strict=True)
        )
        return session.pending + self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prepare(self, request: Request) -> Prepared:
        """The CPU's part of a turn. It may run in any thread, ahead of the device; its session must not change until the reply."""
        start = time.perf_counter()
        views = [self.pixels(image) for image in request.turn.images]
        grids = [grid for _, grid, _ in views]
        patches = [p.pin_memory() if self.device.type == "cuda" else p for p, _, _ in views]
        keys = [FeatureStore.key(p, g) for p, g, _ in views] if self.features else []
        events = [e for _, _, events in views for e in events]
        with self._tokenizing:
            ids = self.chunk(request.session, request.turn, grids)
        self.room(request.session, ids, grids)
        return Prepared(ids, patches, grids, events, time.perf_counter() - start, keys)

    @torch.inference_mode()
    def encode(self, patches: list[Tensor], grids: list[tuple[int, int, int]]) -> Tensor:
        """Patches of several images -> merged features (V, D), images in order, raster order within each."""
        return torch.cat([image.features for image in self.see(patches, grids)])

    @torch.inference_mode()
    def see(
        self, patches: list[Tensor], grids: list[tuple[int, int, int]], pruner: Pruner | None = None, keys: list[bytes] = ()
    ) -> list[VisualTokens]:
        """Patches of several images -> each image's merged features and what ``pruner`` needs beside them, in raster order.

        keys: of the images in the feature store; what it holds is not encoded again, unless the pruner looks into the tower.
        """
        if not patches:
            return []
        vision, needs = self.model.config.vision_config, pruner.needs if pruner else ()
        wanted = ["attention" in needs, "vision_keys" in needs]
        probing = probed(self.model, pruner.vision_block, *wanted) if any(wanted) else nullcontext()
        with windowed_attention(self.model), probing as probe:
            features = self._tower(patches, grids, () if any(wanted) else keys)
        merge = vision.spatial_merge_size
        return look(
            features,
            [(rows // merge, columns // merge) for _, rows, columns in grids],
            probe,
            patches if "seed" in needs else None,
            vision.window_size // merge // vision.patch_size,
        )

    def _tower(self, patches: list[Tensor], grids: list[tuple[int, int, int]], keys: list[bytes]) -> Tensor:
        """-> merged features (V, D), those with a key out of the store or into it."""
        found = [self.features.get(key) for key in keys] or [None] * len(grids)
        todo = [i for i, features in enumerate(found) if features is None]
        if todo:
            pixel_values = torch.cat([patches[i].to(self.device, non_blocking=True) for i in todo]).to(self.model.dtype)
            grid_thw = torch.tensor([grids[i] for i in todo], device=self.device)
            made = self.model.model.visual(pixel_values, grid_thw=grid_thw).pooler_output
            merge = self.model.config.vision_config.spatial_merge_size**2
            for i, features in zip(todo, made.split([grids[i][1] * grids[i][2] // merge for i in todo]), strict=True):
                found[i] = features
                if keys:
                    self.features.put(keys[i], features)
        return torch.cat(found)

    @torch.inference_mode()
    def embed(self, ids: list[int], placed: tuple[Tensor, int], images: list[VisualTokens]) -> Chunk:
        """Token ids, their positions and the images among them -> what the decoder gets."""
        tokens = torch.tensor(ids, device=self.device)
        embeds, spans = self.decoder.get_input_embeddings()(tokens), []
        at = (tokens == self.image_token).nonzero().squeeze(1).tolist()
        for image in images:
            start, n = at[0], len(image.features)
            embeds[start : start + n] = image.features.to(embeds.dtype)
            spans.append(Span(start, image, n))
            at = at[n:]
        return Chunk(embeds, placed[0].to(self.device), placed[1], tuple(spans))

    # ------------------------------------------------------------------ answering

    def reply(self, requests: list[Request], pruner: Pruner | None = None) -> list[Reply | Failure]:
        """Answer one turn of each session, all in one batch, whatever their sizes, turns and image counts.

        A session keeps its cache when ``turn.is_final`` is false; its next turn then prefills only what is new. A pruner cuts
        the images of this turn; what a session already holds stays as it is. A reply whose scores are not finite is a failure.

        Raises MemoryError when the device has no room; the sessions are then as they were.
        """
        before = [vars(r.session).copy() for r in requests]
        self._most = self.peak_memory()
        counted = start_peak(self.device)
        try:
            with fast_products(self.decoder, self.model.lm_head):
                replies = self._reply(requests, pruner)
            most = peak(self.device) if counted else None
            return [r if isinstance(r, Failure) else replace(r, peak_memory_bytes=most) for r in replies]
        except torch.cuda.OutOfMemoryError as error:
            for r, fields in zip(requests, before, strict=True):
                vars(r.session).update(fields)
            reason = first_line(error)
        except getattr(torch, "AcceleratorError", ()) as error:  # of PyTorch 2.8 and later; the device answers nothing after it
            raise RunError(
                f"the device failed ({first_line(error)}); run the same command with the same output_dir: it goes on where it stopped"
            ) from error
        torch.cuda.empty_cache()  # here, where the traceback no longer holds the batch
        raise MemoryError(reason)

    @torch.inference_mode()
    def _reply(self, requests: list[Request], pruner: Pruner | None) -> list[Reply | Failure]:
        if pruner is not None and pruner.retention == 1:
            pruner = None
        stages = self.stages(pruner)
        prepared = [r.prepared or self.prepare(r) for r in requests]
        ids, grids = [p.ids for p in prepared], [p.grids for p in prepared]
        clock, marks = time.perf_counter, [time.perf_counter()]
        flat = [patches for p in prepared for patches in p.patches]
        keys = [key for p in prepared for key in p.keys]
        reused = [sum(key in self.features for key in p.keys) for p in prepared]
        images = iter(self.see(flat, [g for row in grids for g in row], pruner, keys))
        self.synchronise()
        marks.append(clock())

        merge = self.processor.image_processor.merge_size
        chunks = []
        for r, i, g in zip(requests, ids, grids, strict=True):
            placed = mrope_positions(i, g, self.image_token, merge, r.session.next_position)
            chunk = self.embed(i, placed, [next(images) for _ in g])
            chunks.append(chunk.cut(pruner, pruner.retention) if pruner and not stages else chunk)
        sessions = [r.session for r in requests]
        batch = StagedBatch(self, sessions, chunks, pruner, stages) if stages else self._batch(sessions, chunks)
        logits = batch.prefill()
        self.synchronise()
        marks.append(clock())

        rooms = [self.room(r.session, i, g) for r, i, g in zip(requests, ids, grids, strict=True)]
        asked = [replace(r, budget=min(r.budget, room)) for r, room in zip(requests, rooms, strict=True)]
        writers = [Writer(r, self.tokenizer, self.stop, self._grammar(r), self.trace is not None) for r in asked]
        penalty = [self.repetition_penalty if r.penalty is None else r.penalty for r in requests]
        seen = [r.session.seen.union(i) if p != 1 else frozenset() for r, i, p in zip(requests, ids, penalty, strict=True)]
        batch.decode(logits, writers, Repetition(seen, penalty, self.device))
        self.synchronise()
        marks.append(clock())

        visual = [sum(rows * columns // merge**2 for _, rows, columns in g) for g in grids]
        costs = _shares(marks, visual, [len(i) for i in ids], [0 if w.said else len(w.written) for w in writers])
        costs = [(p.seconds, *shares) for p, shares in zip(prepared, costs, strict=True)]
        if self.trace is not None:
            scores = [torch.stack(w.scores or [logits.new_full(logits.shape[-1:], float("nan"))]) for w in writers]
            self.trace += torch.nn.utils.rnn.pad_sequence(scores, padding_value=float("nan"))
        out = []
        for b, (r, writer) in enumerate(zip(requests, writers, strict=True)):
            if writer.fault:
                out.append(Failure(writer.fault))
                continue
            text = r.turn.forced_reply if writer.said else self.text(writer.written, r.until)
            output = () if writer.said else tuple(writer.written)
            usage = Usage(visual[b], batch.visual[b], len(ids[b]) - visual[b], len(output), *costs[b], passes=writer.passes)
            out.append(Reply(text, output, usage, writer.ended))
            if r.turn.is_final:
                r.session.keys, r.session.values, r.session.held = [], [], []
            else:
                batch.keep(b, r.session, writer.written)
        for b, (r, made, reply, again) in enumerate(zip(requests, prepared, out, reused, strict=True)):
            if isinstance(reply, Failure):  # all of this comes after what may run out of memory
                continue
            if penalty[b] != 1:
                r.session.seen = seen[b].union(writers[b].written)
            r.session.turns.append(r.turn)
            r.session.replies.append(reply.text)
            r.session.events += [*made.events, *writers[b].events]
            room = rooms[b]
            if room < r.budget and not reply.complete:
                detail = f"the reply was cut after {room} tokens: the checkpoint's context was full"
                r.session.events.append(Event(EventKind.CONTEXT_FULL, detail))
            if again:
                r.session.events.append(
                    Event(EventKind.FEATURES_REUSED, f"{again} pictures were encoded before; their encode time is not here")
                )
        return out

    def _batch(self, sessions: list[Session], chunks: list[Chunk]) -> Batch:
        """A line of rows on a CPU, a rectangle of them elsewhere or where another attention was asked for."""
        line = self.device.type == "cpu" and self.decoder.config._attn_implementation == "sdpa"
        return (RaggedBatch if line else Batch)(self, sessions, chunks)

    def stages(self, pruner: Pruner | None) -> dict[int, float]:
        """The pruner's decoder stages on this model. Raises ValueError for a layer that the decoder does not have."""
        layers = len(self.decoder.layers)
        stages = pruner.cut_layers(layers) if pruner else {}
        for layer in stages:
            if not 0 <= layer < layers - 1:
                raise ValueError(
                    f"{type(pruner).__name__} cuts after decoder layer {layer}; this model has {layers} layers, so the last place is {layers - 2}"
                )
        return stages

    def probe(self, requests: list[Request]) -> list[Reply]:
        """The hidden state of the last token of each turn after ``turn.hidden_state_depth`` of the decoder's layers; nothing is kept."""
        from .hidden_state import last_hidden  # needs this file

        return [last_hidden(self, r) for r in requests]

    def _grammar(self, request: Request) -> CallGrammar | None:
        grid = request.turn.crop_grammar
        if grid is None or not self.constrained:
            return None
        if grid not in self._grammars:
            self._grammars[grid] = CallGrammar(grid, self.tokenizer)
        return self._grammars[grid]

    def text(self, tokens: list[int] | tuple[int, ...], until: tuple[str, ...] = ()) -> str:
        """Token ids -> text without special tokens, cut before the first stop string."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text[: min((text.find(s) for s in until if s in text), default=len(text))]

    def warm_up(self) -> None:
        """Answer once for nothing, so that no document pays for the first use of kernels and allocators."""
        picture = Image.new("RGB", (224, 224))
        self.reply([Request(Session(), Turn((picture,), "?"), 2)])
        start_peak(self.device)
        self._most = 0

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


def _shares(marks: list[float], visual: list[int], prompt: list[int], output: list[int]) -> list[tuple[float, ...]]:
    """Seconds of (encode, prefill, decode) for each row: the batch's phases shared out by tokens."""
    spans = [b - a for a, b in pairwise(marks)]
    weights = (visual, prompt, output)
    out = []
    for b in range(len(prompt)):
        row = [span * (w[b] / sum(w) if sum(w) else 1 / len(prompt)) for span, w in zip(spans, weights, strict=True)]
        out.append(tuple(row))
    return out
