"""The one file that knows how Qwen2.5-VL is put together: encode, prefill, extend, decode, in batches of mixed sizes.

The loop is ours rather than ``model.generate`` because exact counting, a second turn on the kept cache, and batches that mix
turns need it. Its logits equal those of ``generate`` and of a fresh prefill (tests/test_vlm.py).
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from .attention_scores import probed
from .batch import Batch
from .crops import CropGrid
from .grammar import CallGrammar
from .images import within_aspect
from .method import Pruner, Visual
from .pruning import Chunk, Span, look
from .session import Prepared, Request, Session
from .staged import StagedBatch
from .trajectory import Event, Reply, Turn, messages
from .usage import Usage
from .vision_attention import windowed_attention
from .writer import Writer

MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 16384 * 28 * 28
"""Limits of the released Qwen2.5-VL processors: 4 to 16,384 visual tokens an image."""

_HOLE = "\ufdd0reply\ufdd0"  # two noncharacters around a word: no question contains it


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used, and what to do about it."""


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


class VLM:
    """A Qwen2.5-VL and its processor. Greedy decoding; every public method is deterministic.

    constrained: hold replies that begin as a call to its grammar (``CallGrammar``); False is plain greedy decoding.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        processor,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        constrained: bool = True,
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
        self.constrained = constrained
        self._grammars: dict[CropGrid, CallGrammar] = {}
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
    ) -> VLM:
        """Load a checkpoint folder or hub name. dtype ``auto``: bfloat16 on a GPU, float32 on a CPU. Raises CheckpointError."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, and PyTorch finds no CUDA GPU here; pass device=cpu, or leave device out")
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; allowed: auto, float32, bfloat16, float16")
        folder = Path(pretrained)
        if pretrained.startswith((".", "/", "~")) and not folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {pretrained!r}; pass a folder, a hub name, or pretrained=nano")
        try:
            config = AutoConfig.from_pretrained(pretrained)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read a model config from {pretrained!r}: {_first_line(error)}") from error
        if config.model_type != "qwen2_5_vl":
            raise CheckpointError(
                f"{pretrained!r} is a {config.model_type} checkpoint; this release runs qwen2_5_vl (Qwen2.5-VL) only"
            )
        if folder.is_dir() and not any((folder / f).exists() for f in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{pretrained!r} has no tokenizer (tokenizer.json or vocab.json); copy the base model's beside the weights"
            )
        try:
            processor = AutoProcessor.from_pretrained(pretrained)
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                pretrained, dtype=kind, attn_implementation=attn_implementation
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load {pretrained!r}: {_first_line(error)}") from error
        return cls(model.to(device), processor, min_pixels, max_pixels, constrained)

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ------------------------------------------------------------------ pictures and text to tokens

    def pixels(self, image: Image.Image) -> tuple[Tensor, tuple[int, int, int], list[Event]]:
        """RGB image -> patches (P, 1176), grid (1, rows, columns) in patches, events."""
        image, events = within_aspect(image)
        out = self.processor.image_processor(images=[image], size=self.limits, return_tensors="pt")
        return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()), events

    def visual_tokens(self, image: Image.Image) -> int:
        """Merged visual tokens that ``image`` costs under this processor's limits, without encoding it."""
        image, _ = within_aspect(image)
        ip = self.processor.image_processor
        return ip.get_number_of_image_patches(image.height, image.width, {"size": self.limits}) // ip.merge_size**2

    def check(self, question: str) -> None:
        """Raise ValueError when a question holds the text of an image mark, which the tokenizer would take for an image."""
        marker = self.tokenizer.convert_ids_to_tokens(self.image_token)
        if marker in question:
            raise ValueError(f"the question holds the text {marker!r}, which stands for an image; remove it from the question")

    def chunk(self, session: Session, turn: Turn, grids: list[tuple[int, int, int]]) -> list[int]:
        """Token ids that ``turn`` adds to the session: everything up to where the model writes.

        The chat template renders the whole conversation with holes for the replies; what follows the last hole is new.
        """
        history = messages([*session.turns, turn], [_HOLE] * len(session.replies))
        text = self.processor.apply_chat_template(history, tokenize=False, add_generation_prompt=True).split(_HOLE)[-1]
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
        events = [e for _, _, events in views for e in events]
        ids = self.chunk(request.session, request.turn, grids)
        return Prepared(ids, patches, grids, events, time.perf_counter() - start)

    @torch.inference_mode()
    def encode(self, patches: list[Tensor], grids: list[tuple[int, int, int]]) -> Tensor:
        """Patches of several images -> merged features (V, D), images in order, raster order within each."""
        return torch.cat([image.features for image in self.see(patches, grids)])

    @torch.inference_mode()
    def see(self, patches: list[Tensor], grids: list[tuple[int, int, int]], pruner: Pruner | None = None) -> list[Visual]:
        """Patches of several images -> each image's merged features and what ``pruner`` needs beside them, in raster order."""
        if not patches:
            return []
        vision, needs = self.model.config.vision_config, pruner.needs if pruner else ()
        wanted = ["attention" in needs, "metric" in needs]
        pixel_values = torch.cat([p.to(self.device, non_blocking=True) for p in patches]).to(self.model.dtype)
        probing = probed(self.model, pruner.vision_block, *wanted) if any(wanted) else nullcontext()
        with windowed_attention(self.model), probing as probe:
            out = self.model.model.visual(pixel_values, grid_thw=torch.tensor(grids, device=self.device))
        merge = vision.spatial_merge_size
        return look(
            out.pooler_output,
            [(rows // merge, columns // merge) for _, rows, columns in grids],
            probe,
            patches if "seed" in needs else None,
            vision.window_size // merge // vision.patch_size,
        )

    @torch.inference_mode()
    def embed(self, ids: list[int], placed: tuple[Tensor, int], images: list[Visual]) -> Chunk:
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

    @torch.inference_mode()
    def reply(self, requests: list[Request], pruner: Pruner | None = None) -> list[Reply]:
        """Answer one turn of each session, all in one batch, whatever their sizes, turns and image counts.

        A session keeps its cache when ``turn.last`` is false; its next turn then prefills only what is new. A pruner cuts
        the images of this turn; what a session already holds stays as it is.
        """
        if pruner is not None and pruner.retention == 1:
            pruner = None
        stages = self.stages(pruner)
        prepared = [r.prepared or self.prepare(r) for r in requests]
        ids, grids = [p.ids for p in prepared], [p.grids for p in prepared]
        clock, marks = time.perf_counter, [time.perf_counter()]
        flat = [patches for p in prepared for patches in p.patches]
        images = iter(self.see(flat, [g for row in grids for g in row], pruner))
        self.synchronise()
        marks.append(clock())

        merge = self.processor.image_processor.merge_size
        chunks = []
        for r, i, g in zip(requests, ids, grids, strict=True):
            placed = mrope_positions(i, g, self.image_token, merge, r.session.next_position)
            chunk = self.embed(i, placed, [next(images) for _ in g])
            chunks.append(chunk.cut(pruner, pruner.retention) if pruner and not stages else chunk)
        sessions = [r.session for r in requests]
        batch = StagedBatch(self, sessions, chunks, pruner, stages) if stages else Batch(self, sessions, chunks)
        logits = batch.prefill()
        self.synchronise()
        marks.append(clock())

        writers = [Writer(r, self.tokenizer, self.stop, self._grammar(r), self.trace is not None) for r in requests]
        batch.decode(logits, writers)
        self.synchronise()
        marks.append(clock())

        visual = [sum(rows * columns // merge**2 for _, rows, columns in g) for g in grids]
        costs = _shares(marks, visual, [len(i) for i in ids], [len(w.written) for w in writers])
        costs = [(p.seconds, *shares) for p, shares in zip(prepared, costs, strict=True)]
        if self.trace is not None:
            scores = [torch.stack(w.scores) for w in writers]
            self.trace += torch.nn.utils.rnn.pad_sequence(scores, padding_value=float("nan"))
        out = []
        for b, (r, writer) in enumerate(zip(requests, writers, strict=True)):
            text = self.text(writer.written, r.until)
            usage = Usage(visual[b], batch.visual[b], len(ids[b]) - visual[b], len(writer.written), *costs[b], writer.passes)
            out.append(Reply(text, tuple(writer.written), usage, writer.ended))
            r.session.turns.append(r.turn)
            r.session.replies.append(text)
            r.session.events += prepared[b].events
            if r.turn.last:
                r.session.keys, r.session.values = [], []
            else:
                batch.keep(b, r.session, writer.written)
        return out

    def stages(self, pruner: Pruner | None) -> dict[int, float]:
        """The pruner's decoder stages on this model. Raises ValueError for a layer that the decoder does not have."""
        layers = len(self.decoder.layers)
        stages = pruner.stages(layers) if pruner else {}
        for layer in stages:
            if not 0 <= layer < layers - 1:
                raise ValueError(
                    f"{type(pruner).__name__} cuts after decoder layer {layer}; this model has {layers} layers, so the last place is {layers - 2}"
                )
        return stages

    def _grammar(self, request: Request) -> CallGrammar | None:
        grid = request.turn.calls
        if grid is None or not self.constrained:
            return None
        if grid not in self._grammars:
            self._grammars[grid] = CallGrammar(grid, self.tokenizer)
        return self._grammars[grid]

    def text(self, tokens: list[int] | tuple[int, ...], until: tuple[str, ...] = ()) -> str:
        """Token ids -> text without special tokens, cut before the first stop string."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text[: min((text.find(s) for s in until if s in text), default=len(text))]

    def peak_memory(self) -> int:
        """Most bytes in use so far: on the GPU by tensors, on a CPU by the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
