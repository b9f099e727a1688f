"""Steps many policies at once: collects the turns they wait for, answers them in one batch, hands the replies back.

Batching, order, errors and counting live here; a policy sees one sample and its replies. Anything with ``reply``,
``visual_tokens`` and ``text`` can answer: the ``LocalModel``, or ``Scripted`` in tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply, Sample, Trajectory, Turn
from awares_bench.methods.images import as_rgb
from awares_bench.methods.policy import Policy, TurnGenerator
from awares_bench.methods.pruner import Pruner
from awares_bench.methods.usage import Usage

from .scheduler import BatchLimits, next_batch
from .session import Prepared, Request, Session

LOOKAHEAD_BATCHES = 4
"""Batches of conversations that are started at a time: their pictures are in memory, and batches are chosen among them."""


@dataclass(frozen=True)
class Job:
    """A sample and what its task allows: tokens of the answer, stop strings; and a repetition penalty where it sets one of its own."""

    sample: Sample
    max_new_tokens: int
    until: tuple[str, ...] = ()
    repetition_penalty: float | None = None


@dataclass(eq=False)
class Exchange:
    index: int
    job: Job
    generator: TurnGenerator
    turn: Turn
    session: Session = field(default_factory=Session)
    auxiliary_sessions: dict[str, Session] = field(default_factory=dict)  # conversations with auxiliary models, by name
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    full_tokens: int = 0
    cost: int = 0  # tokens of the turn it waits for, its cache and its reply, about
    request: Request = field(init=False, repr=False)  # once it is in a batch
    prepared: Future | None = None

    def make_request(self) -> Request:
        """What answers the turn it waits for: a turn to another model, and every probe, is in a conversation of its own."""
        turn, session = self.turn, self.session
        if turn.model or turn.hidden_state_depth is not None:
            session = self.auxiliary_sessions.setdefault(turn.model, Session())
            if turn.is_final:
                del self.auxiliary_sessions[turn.model]
        until = self.job.until if turn.until is None else turn.until
        penalty = None if turn.model else self.job.repetition_penalty
        return Request(
            session,
            turn,
            max(self.job.max_new_tokens, turn.min_reply_tokens or 0),
            until,
            penalty=penalty,
            conversation=self.index,
        )


class Engine:
    """Runs a policy over jobs, ``batch_size`` conversations at a time.

    vlm: the model under test. pruner: cuts what the conversation with it shows. models: the auxiliary ones by the names of
    ``Policy.models``; a turn to a name that is not among them goes to the model under test, at its own price.
    max_batch_tokens: rows times the longest, beside ``batch_size`` rows. workers: threads that prepare pictures and text
    (None: half the processors; none for one row a batch, or for a model on the CPU). keep_masks: replies say which visual
    tokens the pruner let through (``Reply.kept``).
    """

    def __init__(
        self,
        vlm,
        policy: Policy,
        batch_size: int = 1,
        pruner: Pruner | None = None,
        models: dict | None = None,
        max_batch_tokens: int | None = None,
        workers: int | None = None,
        keep_masks: bool = False,
    ):
        self.vlm, self.policy, self.batch_size = vlm, policy, batch_size
        self.pruner, self.models, self.keep_masks = pruner, models or {}, keep_masks
        if pruner is not None and hasattr(vlm, "cut_layers"):
            vlm.cut_layers(pruner)  # refuses now what would fail at every document
        self.limits = BatchLimits(batch_size, max_batch_tokens)
        self.window = 1 if batch_size == 1 else LOOKAHEAD_BATCHES * batch_size
        if workers is None:  # beside a model on the CPU they would take its cores: a nano suite took 1.4 times as long
            workers = 0 if getattr(getattr(vlm, "device", None), "type", "") == "cpu" else (os.cpu_count() or 2) // 2
        self.workers = 0 if batch_size == 1 else workers

    def run(self, jobs: Iterable[Job | Failure]) -> Iterator[tuple[int, Trajectory | Failure]]:
        """Yield (index of the job, outcome) as conversations end; every job exactly once.

        Whatever a document's pictures, its question or the policy raise is the Failure of that document, and the others go on;
        only a RunError ends the run.

        Jobs are taken lazily, ``LOOKAHEAD_BATCHES`` batches of them, so that a benchmark's pictures are never all in memory and similar
        lengths find each other. While the model answers one batch, worker threads prepare the next. With one row a batch
        nothing overlaps and nothing is reordered: seconds are then latencies.

        A model that answers requests one by one, as a server does, has no batches: each conversation goes on when its own reply is there.
        """
        if getattr(self.vlm, "concurrency", None):
            yield from self._run_unbatched(jobs)
            return
        waiting: list[Exchange] = []
        ready: list[Exchange] = []
        todo = iter(enumerate(jobs))
        with ThreadPoolExecutor(self.workers, "prepare") if self.workers else nullcontext() as threads:
            while True:
                yield from self._fill(waiting, todo)
                if not ready:
                    ready = self._next(waiting, threads)
                if not ready:
                    return
                batch, ready = ready, self._next(waiting, threads) if threads else []
                yield from self._go_on(self._answer(batch), waiting)

    def _run_unbatched(self, jobs: Iterable[Job | Failure]) -> Iterator[tuple[int, Trajectory | Failure]]:
        """``run`` for a model that answers ``batch_size`` requests at a time, up to ``vlm.concurrency``, each in a thread of its own. Turns to auxiliary models in
        this process are answered here in batches meanwhile. After a RunError nothing is asked any more; conversations that end all the same
        are yielded before it is raised.
        """
        waiting: list[Exchange] = []
        asked: dict[Future, Exchange] = {}
        todo, error = iter(enumerate(jobs)), None
        most = min(self.vlm.concurrency, self.batch_size)
        room = max(most, self.window) if self.models else most  # conversations at a time
        with ThreadPoolExecutor(most, "request") as threads:
            while True:
                # 1. requests, those that go on with a conversation first: the server may drop its cache
                own = [run for run in waiting if run.turn.model not in self.models]
                for run in sorted(own, key=lambda run: not run.session.turns)[: most - len(asked)] if error is None else ():
                    waiting.remove(run)
                    run.request = run.make_request()
                    asked[threads.submit(self._answer, [run])] = run
                # 2. one conversation more
                if error is None and len(waiting) + len(asked) < room and len(asked) < most:
                    before = len(waiting)
                    yield from self._fill(waiting, todo, len(waiting) + 1)
                    if len(waiting) > before:
                        continue
                # 3. what is to be answered here, then whatever was answered first
                local = [run for run in waiting if run.turn.model in self.models]
                if error is None and local and (len(local) >= self.batch_size or len(asked) < most):
                    batch = self._next(local, None)
                    for run in batch:
                        waiting.remove(run)
                    yield from self._go_on(self._answer(batch), waiting)
                elif asked:
                    for future in wait(asked, return_when=FIRST_COMPLETED).done:
                        del asked[future]
                        try:
                            answered = future.result()
                        except RunError as told:
                            error = error or told
                        else:
                            yield from self._go_on(answered, waiting)
                elif error is not None:
                    raise error
                else:
                    return

    def _go_on(
        self, answered: list[tuple[Exchange, Reply | Failure]], waiting: list[Exchange]
    ) -> Iterator[tuple[int, Trajectory | Failure]]:
        """Hand replies to their policies; yield the conversations that end, put the others among those that wait."""
        for run, reply in answered:
            if isinstance(reply, Failure):
                yield run.index, reply
                continue
            run.turns.append(run.turn)
            run.replies.append(reply)
            outcome = self._advance(run, reply)
            if outcome is None:
                waiting.append(run)
            else:
                yield run.index, outcome

    def _fill(
        self, waiting: list[Exchange], todo: Iterator, most: int | None = None
    ) -> Iterator[tuple[int, Trajectory | Failure]]:
        """Start jobs until enough wait; yield those that end at once."""
        while len(waiting) < (self.window if most is None else most):
            index, job = next(todo, (0, None))
            if job is None:
                return
            started = job if isinstance(job, Failure) else self._start(index, job)
            if isinstance(started, Exchange):
                waiting.append(started)
            else:
                yield index, started

    def _next(self, waiting: list[Exchange], threads: ThreadPoolExecutor | None) -> list[Exchange]:
        """Take the next batch out of those that wait, its requests made and being prepared."""
        kinds = [(run.turn.model, run.turn.hidden_state_depth is not None) for run in waiting]
        batch = [
            waiting[i]
            for i in next_batch(kinds, [r.cost for r in waiting], [bool(r.session.turns) for r in waiting], self.limits)
        ]
        for run in batch:
            waiting.remove(run)
            run.request = replace(run.make_request(), keep_masks=self.keep_masks and run.turn.model not in self.models)
            if threads and run.turn.hidden_state_depth is None:
                run.prepared = threads.submit(self.models.get(run.turn.model, self.vlm).prepare, run.request)
        return batch

    def _answer(self, batch: list[Exchange]) -> list[tuple[Exchange, Reply | Failure]]:
        """The reply to each turn of a batch of one kind. A batch that fails, out of memory or otherwise, goes on in halves."""
        name, probing = batch[0].turn.model, batch[0].turn.hidden_state_depth is not None
        vlm = self.models.get(name, self.vlm)
        lost: list[tuple[Exchange, Reply | Failure]] = []
        for run in batch:
            if run.prepared is not None:
                try:
                    run.request, run.prepared = replace(run.request, prepared=run.prepared.result()), None
                except Exception as error:
                    lost.append((run, _failure(error)))
        batch = [run for run in batch if run.prepared is None]
        if not batch:
            return lost
        requests, costs = [run.request for run in batch], [run.cost for run in batch]
        before = [request.session.snapshot() for request in requests]
        try:
            replies = vlm.hidden_states(requests) if probing else vlm.reply(requests, None if name else self.pruner)
        except Exception as error:
            short, failure = isinstance(error, MemoryError), _failure(error)
            if short:
                failure = Failure(f"out of memory with this document alone, about {costs[0]} tokens ({error}); lower max_pixels")
        else:
            for run, request, reply in zip(batch, requests, replies, strict=True):
                if request.session is not run.session and request.turn.is_final:
                    run.events += request.session.events
                if name in self.models and not isinstance(reply, Failure):
                    reply = replace(reply, usage=reply.usage.as_auxiliary())
                lost.append((run, reply))
            return lost
        for request, snapshot in zip(requests, before, strict=True):
            request.session.restore(snapshot)
        if len(batch) == 1:
            return [*lost, (batch[0], failure)]
        if short:
            self.limits.halve(costs)
        for run in batch:
            if short:
                detail = f"{len(batch)} rows of up to {max(costs)} tokens did not fit; went on with half"
                run.events.append(Event(EventKind.OUT_OF_MEMORY, detail))
            else:
                run.events.append(Event(EventKind.BATCH_FAILED, f"{len(batch)} rows went on in halves: {failure.error}"))
        middle = len(batch) // 2
        return [*lost, *self._answer(batch[:middle]), *self._answer(batch[middle:])]

    def _start(self, index: int, job: Job) -> Exchange | Trajectory | Failure:
        try:
            self.vlm.check(job.sample.question)
            converted = [as_rgb(image) for image in job.sample.images]
            events = [e for _, some in converted for e in some]
            if not job.sample.question.strip():
                if not converted:
                    return Failure("the document holds neither a question nor an image; exclude it")
                events.append(Event(EventKind.NO_QUESTION, "the question is empty: answered from the image alone"))
            images = tuple(image for image, _ in converted)
            full_tokens = sum(self.vlm.visual_tokens(image) for image in images)
            job = replace(job, sample=replace(job.sample, images=images, full_tokens=full_tokens))
            run = Exchange(index, job, self.policy.turns(job.sample), Turn(), events=events, full_tokens=full_tokens)
        except Exception as error:
            return _failure(error)
        outcome = self._advance(run, None)
        return run if outcome is None else outcome

    def _advance(self, run: Exchange, reply: Reply | None) -> Trajectory | Failure | None:
        """Send a reply to the policy; None when it asks for another turn."""
        try:
            try:
                step = run.generator.send(reply)
                while isinstance(step, Event):
                    run.events.append(step)
                    step = run.generator.send(None)
            except StopIteration as stop:
                if isinstance(stop.value, Failure):
                    return stop.value
                if not isinstance(stop.value, Reply):
                    return Failure(f"{type(self.policy).__name__} ended with {stop.value!r}, which is not a Reply")
                return self._finish(run, stop.value)
            if not isinstance(step, Turn):
                return Failure(f"{type(self.policy).__name__} yielded {step!r}, which is neither a Turn nor an Event")
            run.turn = step
            text = len(step.text) + len(step.system or "") + sum(map(len, step.image_prefixes))
            visual = sum(self.vlm.visual_tokens(image, share) for image, share in step.shown)
            run.cost = run.session.length + visual + text // 4 + max(run.job.max_new_tokens, step.min_reply_tokens or 0)
            return None
        except Exception as error:  # the policy is anyone's code
            return _failure(error)

    def _finish(self, run: Exchange, answer: Reply) -> Trajectory | Failure:
        if not run.turns:
            return Failure(f"{type(self.policy).__name__} returned a reply and asked nothing; it must yield a Turn before")
        events = run.events + run.session.events
        text, cap = answer.text, run.job.max_new_tokens
        if answer.tokens and answer.usage.output > cap:
            if len(answer.tokens) != answer.usage.output:
                return Failure(
                    f"the answer had {answer.usage.output} tokens, the task allows {cap}, and where they end is not known: its text reads as "
                    "other tokens, and the server does not say which it wrote (vLLM does)"
                )
            text = self.vlm.text(answer.tokens[:cap], run.job.until)
            events.append(Event(EventKind.ANSWER_CUT, f"the answer had {answer.usage.output} tokens, the task allows {cap}"))
        return Trajectory(tuple(run.turns), tuple(run.replies), text, tuple(events), run.full_tokens, answer.logprob)


def _failure(error: Exception) -> Failure:
    """What a document raised, in words: this package's own sentences as they are, others with the place they come from.

    Raises a RunError again.
    """
    if isinstance(error, RunError):
        raise error
    last = extract_tb(error.__traceback__)[-1]
    if isinstance(error, (OSError, ValueError)) and str(error) and Path(__file__).parents[1] in Path(last.filename).parents:
        return Failure(str(error))
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failure(f"{told} ({Path(last.filename).name}, line {last.lineno})")


class Scripted:
    """Answers from a script instead of a model: reply texts in order per question. For tests of policies and drivers.

    hidden: what every probe finds.
    """

    def __init__(self, script: dict[str, list[str]], hidden: tuple[float, ...] = ()):
        self.script, self.hidden = script, hidden

    def visual_tokens(self, image, share: float = 1.0) -> int:
        return max(4, round(image.height / 28) * round(image.width / 28))

    def check(self, question: str) -> None:
        """Every question will do."""

    def text(self, tokens, until=()) -> str:
        return "".join(tokens)

    def prepare(self, request: Request) -> Prepared:
        return Prepared([])

    def reply(self, requests: list[Request], pruner: Pruner | None = None) -> list[Reply]:
        out = []
        for r in requests:
            visual = sum(self.visual_tokens(i) for i in r.turn.images)
            text = r.turn.forced_reply
            if text is None:
                asked = [*(t for t in r.session.turns if t.forced_reply is None), r.turn]
                text = self.script[(r.session.turns or asked)[0].text][len(asked) - 1]
            tokens: tuple[Any, ...] = tuple(text) if r.turn.forced_reply is None else ()
            r.session.turns.append(r.turn)
            out.append(Reply(text, tokens, Usage(encoded=visual, prefill=float(visual), output=len(tokens))))
        return out

    def hidden_states(self, requests: list[Request]) -> list[Reply]:
        visual = [sum(self.visual_tokens(i) for i in r.turn.images) for r in requests]
        return [
            Reply("", usage=Usage(encoded=v, prefill=v * (r.turn.hidden_state_depth or 0.0)), hidden=self.hidden)
            for v, r in zip(visual, requests, strict=True)
        ]
