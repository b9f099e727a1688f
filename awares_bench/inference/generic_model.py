"""Answers turns with ``model.generate``, for any image-text-to-text model of transformers: nothing is kept and nothing is cut.

The whole conversation is rendered and encoded again at every turn, which is an event; visual tokens are those of the new turn, and text
those that a kept cache would have been fed, so that usage and retained token ratio are what the engine would count. What a reply is
made of is the engine's own code: which token is next, the grammar of calls, stop strings, limits and the repetition penalty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply
from awares_bench.methods.pruner import Pruner
from awares_bench.methods.usage import Usage
from awares_bench.models.families import families
from awares_bench.models.generic import rows_alike, side_by_side

from .decoding import penalised
from .hidden_state import layers_of
from .local_model import LocalModel, shares, traced
from .reply_decoder import ReplyDecoder
from .session import Prepared, Request
from .token_choice import Greedy, Sampling


class GenericModel(LocalModel):
    """A ``GenericHost`` that answers. As a ``LocalModel``, but without pruners, sampling and features that are kept."""

    engine = "generic"
    host: Any
    """A ``GenericHost``."""

    def kernels(self) -> AbstractContextManager:
        return nullcontext()  # the model runs as it is

    def cut_layers(self, pruner: Pruner | None) -> dict[int, float]:
        """None. Raises ValueError for a pruner."""
        if pruner is None:
            return {}
        raise ValueError(
            f"{type(pruner).__name__} cuts tokens inside the model, and {self.host.name!r} ({self.host.model_type}) is answered by engine=generic, "
            f"which runs it as it is; use a checkpoint of {', '.join(sorted(families()))} without engine=generic, or leave the pruner out"
        )

    def visual_tokens(self, image: Image.Image, share: float = 1.0) -> int:
        """share: not read, the processor is asked as it is."""
        with self._tokenizing:
            return self.host.visual_tokens(image)

    def prepare(self, request: Request, known: dict | None = None) -> Prepared:
        """The CPU's part of a turn: the inputs of the whole conversation.

        Raises ValueError when it does not fit into the checkpoint's context.
        """
        start, session, turn = time.perf_counter(), request.session, request.turn
        events = [event for image in turn.images for event in self.host.accepted(image)[1]]
        if self.host.tiles and any(share < 1 for _, share in turn.shown):
            told = "engine=generic takes the processor as it is: views and crops take all the tiles of a whole picture"
            events.append(Event(EventKind.SHARE_NOT_TOLD, told))
        with self._tokenizing:
            inputs = self.host.inputs([*session.turns, turn], session.replies)
        ids, context = inputs["input_ids"][0].tolist(), self.host.context
        if context is not None and len(ids) >= context:
            raise ValueError(
                f"the conversation takes {len(ids):,} positions, the checkpoint's context (max_position_embeddings) has {context:,}; "
                "shorten the question, or exclude the document"
            )
        room = request.max_reply_tokens if context is None else context - len(ids)
        return Prepared(ids, [], room, events, time.perf_counter() - start, inputs)

    def _reply(
        self, requests: list[Request], pruner: Pruner | None, sampling: Sampling | None, names: Sequence[str]
    ) -> list[Reply | Failure]:
        self.cut_layers(pruner)
        if sampling is not None:
            raise RunError(
                "rollouts share prefixes on kept caches, which engine=generic has none of; train a checkpoint of a known family"
            )
        prepared = [r.prepared or self.prepare(r) for r in requests]
        limited = [replace(r, max_reply_tokens=min(r.max_reply_tokens, p.room)) for r, p in zip(requests, prepared, strict=True)]
        replies = [ReplyDecoder(r, self.tokenizer, self.host.stop, self._grammar(r), self.trace is not None) for r in limited]
        # 1. what the turn itself adds: the tokens of earlier turns are fed again, and were counted there
        visual = [self._visual(p) - self._held(r) for r, p in zip(requests, prepared, strict=True)]
        text = [max(0, len(p.ids) - r.session.recomputed - v) for r, p, v in zip(requests, prepared, visual, strict=True)]
        # 2. batches of those that can be side by side; a reply that the turn says needs no model
        seconds: list[dict[str, Any]] = [{} for _ in requests]
        asked = [b for b, reply in enumerate(replies) if reply.active]
        for group in rows_alike([prepared[b].inputs for b in asked]):
            rows = [asked[i] for i in group]
            marks = self._generate([requests[b] for b in rows], [prepared[b].inputs for b in rows], [replies[b] for b in rows])
            output = [len(replies[b].tokens) for b in rows]
            took = shares(marks, [visual[b] for b in rows], [len(prepared[b].ids) for b in rows], output)
            for b, phases in zip(rows, took, strict=True):
                seconds[b] = phases
        if self.trace is not None:
            self.trace += traced(replies, torch.empty(0, self.host.model.config.get_text_config().vocab_size))
        # 3. replies, and what the sessions keep
        out: list[Reply | Failure] = []
        for b, (r, reply) in enumerate(zip(requests, replies, strict=True)):
            if reply.fault:
                out.append(Failure(reply.fault))
                continue
            usage = Usage(
                encoded=visual[b],
                prefill=float(visual[b]),
                text=text[b],
                output=0 if reply.forced else len(reply.tokens),
                preprocess_seconds=prepared[b].seconds,
                **seconds[b],
                passes=reply.forward_passes,
            )
            forced = r.turn.forced_reply
            content = self.text(reply.tokens, r.until) if forced is None else forced
            tokens = () if reply.forced else tuple(reply.tokens)
            out.append(Reply(content, tokens, usage, reply.ended, logprob=reply.logprob))
            self._keep(r, prepared[b], reply, content)
        return out

    def _keep(self, request: Request, prepared: Prepared, reply: ReplyDecoder, content: str) -> None:
        """What a session remembers of an answered turn."""
        session = request.session
        session.events += [*prepared.events, *reply.events]
        if session.turns:
            detail = (
                f"{self._held(request)} visual and {session.recomputed} tokens in all of earlier turns were fed again, uncounted"
            )
            session.events.append(Event(EventKind.PREFIX_RECOMPUTED, detail))
        if prepared.room < request.max_reply_tokens and not reply.ended:
            detail = f"the reply was cut after {prepared.room} tokens: the checkpoint's context was full"
            session.events.append(Event(EventKind.CONTEXT_FULL, detail))
        # of what was written, all but the last token would be in a cache, and the last too where another ended the reply
        fed = 0 if reply.forced else len(reply.tokens) - (reply.end is None)
        session.recomputed = len(prepared.ids) + max(0, fed)
        session.turns.append(request.turn)
        session.replies.append(content)

    def _visual(self, prepared: Prepared) -> int:
        return prepared.ids.count(self.host.image_token)

    def _held(self, request: Request) -> int:
        """Visual tokens of a conversation's earlier turns."""
        return sum(self.visual_tokens(image) for turn in request.session.turns for image in turn.images)

    def _generate(self, requests: list[Request], inputs: list[dict], replies: list[ReplyDecoder]) -> list[float]:
        """Write the replies to conversations that can be in one batch -> the times when encoding, prefill and decoding began and ended."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.host.stop)
        batch = self._on_device(side_by_side(inputs, pad))
        filled = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        penalty = [self.repetition_penalty if r.penalty is None else r.penalty for r in requests]
        chooser = _Choices(replies, filled, torch.tensor(penalty, device=self.device), pad, self.host.dtype, self._now)
        start = self._now()
        with timed(self.host.encoder, self._now) as encoding:
            self.host.model.generate(
                **batch,
                max_new_tokens=max(r.request.max_reply_tokens for r in replies),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # _Choices applies it, row by row and without the padding
                eos_token_id=sorted(self.host.stop),
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([_Done(replies)]),
            )
        encoded = start + sum(encoding)
        return [start, encoded, max(encoded, chooser.prefilled or encoded), self._now()]

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tensors where the model is, those of pictures in its precision."""
        out = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value = value.to(self.device, self.host.dtype if value.is_floating_point() else None)
            out[name] = value
        return out

    def _now(self) -> float:
        self.synchronise()
        return time.perf_counter()

    @torch.inference_mode()
    def hidden_states(self, requests: list[Request]) -> list[Reply]:
        return [self._hidden(r, r.prepared or self.prepare(r)) for r in requests]

    def _hidden(self, request: Request, prepared: Prepared) -> Reply:
        """As ``last_hidden``: the layers after the one that is asked for are not run."""
        states = self.host.states
        layers = len(states) - 1
        run, start = layers_of(request.turn.hidden_state_depth, layers), self._now()
        with timed(self.host.encoder, self._now) as encoding:
            hidden = input_of(states[run], self.host.model, self._on_device(prepared.inputs))
        values = tuple(hidden[0, -1].float().tolist())
        end = self._now()
        request.session.events += prepared.events
        visual = self._visual(prepared)
        usage = Usage(
            encoded=visual,
            prefill=visual * run / layers,
            text=len(prepared.ids) - visual,
            preprocess_seconds=prepared.seconds,
            encode_seconds=sum(encoding),
            prefill_seconds=end - start - sum(encoding),
        )
        return Reply("", usage=usage, hidden=values)


class _Choices(LogitsProcessor):
    """Chooses the next token of every row as the engine does, and leaves ``generate`` no other.

    filled: (B, P) where the prompt is no padding. penalty: (B,). dtype: the model's. prefilled: when the first scores were there.
    """

    def __init__(
        self,
        replies: list[ReplyDecoder],
        filled: Tensor,
        penalty: Tensor,
        pad: int,
        dtype: torch.dtype,
        clock: Callable[[], float],
    ):
        self.replies, self.filled, self.penalty, self.pad, self.dtype, self.clock = replies, filled, penalty, pad, dtype, clock
        self.penalised = bool((penalty != 1).any())
        self.prefilled: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = self.prefilled is None
        if first:
            self.prefilled = self.clock()
        if self.penalised:
            written = torch.ones_like(input_ids[:, self.filled.shape[1] :], dtype=torch.bool)
            last = self.filled.shape[1] - 1  # a token of every prompt, whatever its padding
            seen = torch.where(torch.cat([self.filled, written], 1), input_ids, input_ids[:, last : last + 1])
            scores = penalised(scores, seen, self.penalty[:, None])
        rows = range(len(self.replies))
        choices = Greedy()(scores[:, None], list(rows), [len(r.tokens) for r in self.replies])
        chosen = [self._write(b, choices[b], scores[b : b + 1], first) for b in rows]
        places = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, places, 0.0)

    def _write(self, b: int, choice: tuple[list[int], list[float]], scores: Tensor, first: bool) -> int:
        """Write a row's next token -> the token that stands there."""
        reply, (tokens, values) = self.replies[b], choice
        if not reply.active:
            return self.pad
        reply.forward_passes += not first
        if not isfinite(values[0]):
            reply.fail_not_finite(values[0], self.dtype)
            return self.pad
        reply.accept([0], tokens, values, scores)
        return reply.tokens[-1] if reply.end is None else reply.end


class _Done(StoppingCriteria):
    """Rows whose replies have ended, by whatever ended them."""

    def __init__(self, replies: list[ReplyDecoder]):
        self.replies = replies

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([not r.active for r in self.replies], device=input_ids.device)


@contextmanager
def timed(module: nn.Module | None, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Within the block, the seconds of every call of ``module`` are added to the list; of none where there is no module."""
    seconds: list[float] = []
    if module is None:
        yield seconds
        return
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(clock())

    def after(*_: Any) -> None:
        seconds.append(clock() - began.pop())

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


class _ReachedError(Exception):
    """The forward pass came to the module that was waited for."""


def input_of(module: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The hidden states (1, L, D) that a forward pass of ``model`` hands to one of its modules, where it ends."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0]
