"""Answers turns by sampling, many conversations in step, for rollouts: the engine and the policies are those of evaluation.

A group's first turn is encoded and prefilled once and its cache shared out; a second turn adds its crops to the cache, once for
all that called in the same words; a picture seen before is not encoded again. Every conversation draws from random numbers of its own, a function of (seed,
name of the conversation), so that neither batch nor process count changes what it says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from awares_bench.inference.decoding import Repetition
from awares_bench.inference.engine import Engine, Job, _Run
from awares_bench.inference.local_model import VLM, mrope_positions
from awares_bench.inference.padded_batch import CACHE
from awares_bench.inference.session import Request
from awares_bench.methods.conversation import Failure, Reply, Sample, Trajectory
from awares_bench.methods.policy import Policy
from awares_bench.methods.usage import Usage

from .packing import Conversation, Features, View


@dataclass(frozen=True)
class Sampled(Reply):
    """A reply and what scoring needs. shown: ids fed before it; written: its ids with the end token; logps: one each."""

    shown: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    views: tuple[View, ...] = ()
    forced: bool = False


def banned(vlm: VLM) -> tuple[int, ...]:
    """Tokens that are never sampled: the image mark, and every end but the template's own, which opens the next turn."""
    return tuple(sorted({vlm.image_token} | (vlm.stop - {vlm.tokenizer.eos_token_id})))


class Sampler:
    """An answering machine for ``InStep``: as ``VLM``, but samples, remembers log-probabilities and shares prefills.

    All conversations must move together: the first call holds every first turn, a later one those that go on.
    temperature 0 takes the likeliest token. name_of: conversation number -> what seeds its random numbers.
    never_first: tokens that no first turn may begin with, such as those of a call.
    """

    def __init__(
        self, vlm: VLM, features: Features, temperature: float = 1.0, seed: str = "0", name_of: Callable[[int], str] = str
    ):
        self.vlm, self.features, self.temperature, self.seed, self.name_of = vlm, features, temperature, seed, name_of
        self.banned, self.never_first = list(banned(vlm)), []
        self.prefilled = self.shared = self.passes = 0
        """Tokens prefilled, tokens that a shared prefill saved, decoding steps."""
        self._rows: list[int] = []  # id of the session in each row of the cache
        self._views: dict[str, View] = {}
        self._numbers: dict[int, int] = {}  # session -> number of its conversation, in order of first appearance

    def visual_tokens(self, image) -> int:
        return self.vlm.visual_tokens(image)

    def check(self, question: str) -> None:
        self.vlm.check(question)

    def text(self, tokens, until=()) -> str:
        return self.vlm.text(tokens, until)

    @torch.no_grad()
    def reply(self, requests: list[Request], pruner=None, *, forced: list[str | None] | None = None) -> list[Reply]:
        """Answer one turn of each conversation. forced: a reply to put in the model's mouth instead; it is not scored."""
        vlm = self.vlm
        if pruner is not None:
            raise ValueError("rollouts see every visual token: train without a pruner")
        if forced is None:  # a policy may put a reply into the model's mouth
            forced = [r.turn.forced_reply for r in requests]
        views = [tuple(View.of(vlm, image, self._views) for image in r.turn.images) for r in requests]
        ids = [vlm.chunk(r.session, r.turn, [v.grid for v in vs]) for r, vs in zip(requests, views, strict=True)]
        new = all(not r.session.replies for r in requests)
        if not new and any(not r.session.replies for r in requests):
            raise ValueError("conversations must move together: some requests begin one, others continue one")
        logits = (self._first if new else self._next)(requests, ids, views)
        fixed = [None if s is None else vlm.tokenizer(s, add_special_tokens=False)["input_ids"] for s in forced]
        seen = [r.session.seen.union(i) for r, i in zip(requests, ids, strict=True)]
        penalty = [vlm.repetition_penalty if r.penalty is None else r.penalty for r in requests]
        written, logps = self._write(logits, requests, fixed, Repetition(seen, penalty, vlm.device))
        out = []
        for b, (r, tokens) in enumerate(zip(requests, written, strict=True)):
            put = fixed[b] is not None
            ended = bool(tokens) and tokens[-1] == vlm.tokenizer.eos_token_id
            kept = tokens[:-1] if ended else tokens
            text = vlm.text(kept, r.until)
            visual = sum(v.grid[1] * v.grid[2] for v in views[b]) // vlm.processor.image_processor.merge_size**2
            usage = Usage(visual, float(visual), len(ids[b]) - visual, 0 if put else len(kept))
            scoring = {"shown": tuple(ids[b][self._carried[b] :]), "written": tuple(tokens), "logps": tuple(logps[b])}
            out.append(Sampled(text, tuple(kept), usage, ended or put, **scoring, views=views[b], forced=put))
            r.session.turns.append(r.turn)
            r.session.replies.append(text)
            r.session.seen = seen[b].union(tokens)
            self._held[b] = (*self._held[b], tuple(tokens))
            # the last token said was never fed; the template's own end stands for a sampled end
            r.session.pending = list(fixed[b]) if put else ([] if ended else tokens[-1:])
        return out

    # ------------------------------------------------------------------ prefill

    def _first(self, requests: list[Request], ids: list[list[int]], views: list[tuple[View, ...]]) -> Tensor:
        self._rows, self._held = [id(r.session) for r in requests], [()] * len(requests)
        self._numbers = {s: i for i, s in enumerate(self._rows)}
        self._sessions = [r.session for r in requests]  # keeps their ids from being given to others
        self._carried = [0] * len(requests)
        self.cache = DynamicCache(config=self.vlm.decoder.config)
        self.mask = torch.zeros((1, 0), dtype=torch.long, device=self.vlm.device)
        self.next = torch.zeros(1, dtype=torch.long, device=self.vlm.device)
        return self._shared(ids, views)

    def _next(self, requests: list[Request], ids: list[list[int]], views: list[tuple[View, ...]]) -> Tensor:
        wanted = [id(r.session) for r in requests]
        if not set(wanted) <= set(self._rows):
            raise ValueError("conversations must move together: a request continues one that has ended")
        keep = [self._rows.index(s) for s in wanted]
        self._select(keep)
        self._rows, self._held = wanted, [self._held[k] for k in keep]
        self._carried = [len(r.session.pending) for r in requests]
        return self._shared(ids, views)

    def _select(self, rows: list[int]) -> None:
        """Keep these rows of cache, mask and positions, in this order; a row may come several times."""
        at = torch.tensor(rows, device=self.vlm.device)
        if self.mask.shape[1]:
            self.cache.batch_select_indices(at)
        self.mask, self.next = self.mask[at], self.next[at]

    def _shared(self, ids: list[list[int]], views: list[tuple[View, ...]]) -> Tensor:
        """Feed a chunk to every row, once for those that hold the same and are fed the same -> scores after it (B, vocabulary)."""
        fed = [(tuple(i), tuple(v.key for v in vs)) for i, vs in zip(ids, views, strict=True)]
        self._held = [(*held, new) for held, new in zip(self._held, fed, strict=True)]
        unique = list(dict.fromkeys(self._held))
        at, copies = [self._held.index(n) for n in unique], [unique.index(n) for n in self._held]
        self._select(at if self.mask.shape[1] else [0] * len(at))
        logits, self.next = self._extend([ids[i] for i in at], [views[i] for i in at], self.next.tolist())
        self._select(copies)
        self.shared += sum(map(len, ids)) - sum(len(ids[i]) for i in at)
        return logits[copies]

    def _extend(self, ids: list[list[int]], views: list[tuple[View, ...]], starts: list[int]) -> tuple[Tensor, Tensor]:
        """Feed a chunk to every row, padded on the left -> scores after it (B, vocabulary), the position that follows (B,)."""
        vlm, width = self.vlm, max(map(len, ids))
        merge = vlm.processor.image_processor.merge_size
        chunk = torch.full((len(ids), width), vlm.tokenizer.pad_token_id)
        positions = torch.zeros((3, len(ids), width), dtype=torch.long)
        on, after = torch.zeros((len(ids), width), dtype=torch.long), []
        for b, row in enumerate(ids):
            places, then = mrope_positions(row, [v.grid for v in views[b]], vlm.image_token, merge, starts[b])
            chunk[b, width - len(row) :], on[b, width - len(row) :] = torch.tensor(row), 1
            positions[:, b, width - len(row) :] = places
            after.append(then)
        self.prefilled += sum(map(len, ids))
        chunk, device = chunk.to(vlm.device), vlm.device
        embeds = vlm.decoder.get_input_embeddings()(chunk)
        features = self.features([v for vs in views for v in vs])
        if features is not None:
            embeds = embeds.masked_scatter((chunk == vlm.image_token)[..., None].expand_as(embeds), features.to(embeds.dtype))
        return self._feed(embeds, on.to(device), positions.to(device)), torch.tensor(after, device=device)

    def _feed(self, embeds: Tensor, on: Tensor, positions: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, on], 1)
        out = self.vlm.decoder(
            inputs_embeds=embeds, attention_mask=self.mask, position_ids=positions, use_cache=True, **{CACHE: self.cache}
        )
        return self.vlm.model.lm_head(out.last_hidden_state[:, -1]).float()

    # ------------------------------------------------------------------ writing

    def _write(
        self, logits: Tensor, requests: list[Request], fixed: list, repetition: Repetition
    ) -> tuple[list[list[int]], list[list[float]]]:
        vlm, rows = self.vlm, len(requests)
        end, pad = vlm.tokenizer.eos_token_id, vlm.tokenizer.pad_token_id
        budget = [r.budget if f is None else 0 for r, f in zip(requests, fixed, strict=True)]
        draws = self._draws(requests, max(budget))
        written: list[list[int]] = [list(f) if f is not None else [] for f in fixed]
        logps: list[list[float]] = [[0.0] * len(w) for w in written]
        logits = repetition.first(logits[:, None])[:, 0]
        for step in range(max(budget)):
            if not logits.isfinite().all():
                raise ValueError(
                    "the model's scores are not finite: training has diverged, or the weights overflow in their precision"
                )
            logits[:, self.banned] = float("-inf")
            if step == 0 and not any(r.session.replies for r in requests):
                logits[:, self.never_first] = float("-inf")
            scores = (logits / (self.temperature or 1.0)).log_softmax(-1)  # (B, vocabulary)
            if self.temperature:
                sums = scores.double().exp().cumsum(-1)
                chosen = torch.searchsorted(sums, draws[:, step, None] * sums[:, -1:], right=True)[:, 0]
                chosen = chosen.clamp(max=scores.shape[1] - 1)
            else:
                chosen = scores.argmax(-1)
            taken, tokens = scores.gather(1, chosen[:, None])[:, 0].tolist(), chosen.tolist()
            live = []
            for b in range(rows):
                if step < budget[b] and not (written[b] and written[b][-1] == end):
                    written[b].append(tokens[b])
                    logps[b].append(taken[b])
                live.append(step + 1 < budget[b] and written[b][-1] != end)
            if not any(live):
                break
            on = torch.tensor(live, device=vlm.device)[:, None]
            fed = torch.where(on[:, 0], chosen, pad)[:, None]
            positions = self.next[None, :, None].expand(3, -1, -1)
            logits = self._feed(vlm.decoder.get_input_embeddings()(fed), on.long(), positions)
            self.next = self.next + on[:, 0].long()
            self.passes += 1
            feeds, every = fed.tolist(), list(range(rows))
            logits = repetition.next(logits[:, None], every, feeds)[:, 0]
            repetition.keep(every, feeds, [1] * rows)
        return written, logps

    def _draws(self, requests: list[Request], budget: int) -> Tensor:
        """Uniform numbers (B, budget), each row from its conversation's own generator."""
        out = torch.zeros((len(requests), budget), dtype=torch.float64)
        if self.temperature:
            for b, r in enumerate(requests):
                name = f"{self.seed}/{self.name_of(self._numbers[id(r.session)])}/{len(r.session.replies)}"
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                out[b] = torch.rand(budget, generator=generator, dtype=torch.float64)
        return out.to(self.vlm.device)


class InStep(Engine):
    """Evaluation's engine, all conversations moving together: every first turn in one batch, then every second."""

    def run(self, jobs):
        waiting: list[_Run] = []
        for index, job in enumerate(jobs):
            started = self._start(index, job)
            if isinstance(started, _Run):
                waiting.append(started)
            else:
                yield index, started
        while waiting:
            if any(r.turn.model or r.turn.hidden_state_depth is not None for r in waiting):
                raise ValueError(
                    f"{type(self.policy).__name__} asks another model or probes; rollouts know the trained model only"
                )
            replies, still = self.vlm.reply([r.request() for r in waiting]), []
            for run, reply in zip(waiting, replies, strict=True):
                run.turns.append(run.turn)
                run.replies.append(reply)
                outcome = self._advance(run, reply)
                if outcome is None:
                    still.append(run)
                else:
                    yield run.index, outcome
            waiting = still


@dataclass(frozen=True)
class Rollout:
    """A sampled exchange: the trajectory as evaluation reports it, the conversation as training scores it, its sampled logps."""

    trajectory: Trajectory
    conversation: Conversation
    logps: tuple[float, ...]

    @property
    def complete(self) -> bool:
        """Every reply ended by itself."""
        return all(r.complete for r in self.trajectory.replies)

    @property
    def written(self) -> int:
        return len(self.logps)


def rollouts(
    vlm: VLM,
    policy: Policy,
    samples: list[Sample],
    size: int,
    features: Features,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: str = "0",
) -> tuple[list[list[Rollout]], Sampler]:
    """``size`` sampled exchanges for each sample, and the sampler with its counts. Raises ValueError for a sample that fails."""
    sampler = Sampler(vlm, features, temperature, seed, lambda n: f"{samples[n // size].key}/{n % size}")
    jobs = [Job(s, max_new_tokens) for s in samples for _ in range(size)]
    outcomes: dict[int, Trajectory | Failure] = dict(InStep(sampler, policy).run(jobs))
    made = []
    for i in range(len(jobs)):
        outcome = outcomes[i]
        if isinstance(outcome, Failure):
            raise ValueError(f"sample {jobs[i].sample.key!r} cannot be answered: {outcome.error}")
        made.append(Rollout(outcome, *_conversation(outcome, vlm)))
    return [made[i : i + size] for i in range(0, len(made), size)], sampler


def _conversation(trajectory: Trajectory, vlm: VLM) -> tuple[Conversation, tuple[float, ...]]:
    out, logps = Conversation(), []
    for i, reply in enumerate(trajectory.replies):
        # a sampled end is the end that opens the next turn
        before = trajectory.replies[i - 1] if i else None
        shown = list(reply.shown)[1 if before and before.complete and not before.forced else 0 :]
        out.shown(shown, list(reply.views))
        out.wrote(list(reply.written), 0.0 if reply.forced else 1.0)
        logps += () if reply.forced else reply.logps
    return out, tuple(logps)
