"""Steps many policies at once: collects the turns they wait for, answers them in one batch, hands the replies back.

Batching, order, errors and counting live here; a policy sees one sample and its replies. Anything with ``reply``,
``visual_tokens`` and ``text`` can answer: the ``VLM``, or ``Scripted`` in tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from .crops import CropRequestError
from .images import as_rgb, half_size
from .method import Look, Policy, Pruner
from .session import Request, Session
from .trajectory import Event, Reply, Sample, Trajectory, Turn
from .usage import Usage

LOW_RATIO = 0.35
"""Above this share of the full tokens, limits of the processor bend the half-size view away from a quarter."""


@dataclass(frozen=True)
class Job:
    """A sample and what its task allows: tokens of the answer, stop strings."""

    sample: Sample
    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A sample that could not be answered: never scored, always reported."""

    error: str


@dataclass
class _Run:
    index: int
    job: Job
    look: Look
    turn: Turn
    session: Session = field(default_factory=Session)
    others: dict[str, Session] = field(default_factory=dict)  # conversations with auxiliary models, by name
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    full_tokens: int = 0

    def request(self) -> Request:
        """What answers the turn it waits for: a turn to another model, and every probe, is in a conversation of its own."""
        turn, session = self.turn, self.session
        if turn.model or turn.probe is not None:
            session = self.others.setdefault(turn.model, Session())
            if turn.last:
                del self.others[turn.model]
        until = self.job.until if turn.until is None else turn.until
        return Request(session, turn, max(self.job.max_new_tokens, turn.budget or 0), until)


class Engine:
    """Runs a policy over jobs, ``batch_size`` conversations at a time.

    vlm: the model under test. pruner: cuts what the conversation with it shows. models: the auxiliary ones by the names of ``Policy.models``; a turn to a name that is not
    among them goes to the model under test, at its own price.
    """

    def __init__(self, vlm, policy: Policy, batch_size: int = 1, pruner: Pruner | None = None, models: dict | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.vlm, self.policy, self.batch_size = vlm, policy, batch_size
        self.pruner, self.models = pruner, models or {}

    def run(self, jobs: Iterable[Job | Failure]) -> Iterator[tuple[int, Trajectory | Failure]]:
        """Yield (index of the job, outcome) as conversations end; every job exactly once.

        Jobs are taken one by one as places become free, so that a benchmark's pictures are never all in memory. A
        conversation that waits for its second turn shares a batch with others' first turns.
        """
        waiting, todo = [], iter(enumerate(jobs))
        while True:
            while len(waiting) < self.batch_size:
                try:
                    index, job = next(todo)
                except StopIteration:
                    break
                started = job if isinstance(job, Failure) else self._start(index, job)
                if isinstance(started, _Run):
                    waiting.append(started)
                else:
                    yield index, started
            if not waiting:
                return
            replies, still = self._replies(waiting), []
            for run, reply in zip(waiting, replies, strict=True):
                run.turns.append(run.turn)
                run.replies.append(reply)
                outcome = self._advance(run, reply)
                if outcome is None:
                    still.append(run)
                else:
                    yield run.index, outcome
            waiting = still

    def _replies(self, waiting: list[_Run]) -> list[Reply]:
        """The reply to each turn waited for, one batch for each model and kind of question."""
        groups: dict[tuple, list[int]] = {}
        for i, run in enumerate(waiting):
            groups.setdefault((run.turn.model, run.turn.probe is not None), []).append(i)
        replies: dict[int, Reply] = {}
        for (name, probing), members in groups.items():
            vlm = self.models.get(name, self.vlm)
            requests = [waiting[i].request() for i in members]
            some = vlm.probe(requests) if probing else vlm.reply(requests, None if name else self.pruner)
            for i, request, reply in zip(members, requests, some, strict=True):
                replies[i] = replace(reply, usage=reply.usage.as_auxiliary()) if name in self.models else reply
                if request.session is not waiting[i].session and request.turn.last:
                    waiting[i].events += request.session.events
        return [replies[i] for i in range(len(waiting))]

    def _start(self, index: int, job: Job) -> _Run | Trajectory | Failure:
        events: list[Event] = []
        try:
            self.vlm.check(job.sample.question)
            converted = [as_rgb(image) for image in job.sample.images]
        except (OSError, ValueError) as error:
            return Failure(str(error))
        images = tuple(image for image, _ in converted)
        events += [e for _, some in converted for e in some]
        sample = replace(job.sample, images=images)
        run = _Run(index, job, self.policy.look(sample), Turn(), events=events)
        run.full_tokens = sum(self.vlm.visual_tokens(image) for image in images)
        outcome = self._advance(run, None)
        return run if outcome is None else outcome

    def _advance(self, run: _Run, reply: Reply | None) -> Trajectory | Failure | None:
        """Send a reply to the policy; None when it asks for another turn."""
        try:
            step = run.look.send(reply)
            while isinstance(step, Event):
                run.events.append(step)
                step = run.look.send(None)
        except StopIteration as stop:
            return self._finish(run, stop.value)
        except CropRequestError as error:
            return Failure(f"malformed crop request and on_malformed='error': {error}")
        run.turn = step
        return None

    def _finish(self, run: _Run, answer: Reply) -> Trajectory:
        events = run.events + run.session.events
        text, cap = answer.text, run.job.max_new_tokens
        if len(answer.tokens) > cap:
            text = self.vlm.text(answer.tokens[:cap], run.job.until)
            events.append(Event("answer_cut", f"the answer had {len(answer.tokens)} tokens, the task allows {cap}"))
        first = next(i for i, turn in enumerate(run.turns) if not turn.model and turn.probe is None)
        images, share = run.turns[first].images, run.replies[first].usage.encoded / max(run.full_tokens, 1)
        halved = [half_size(*image.size) for image in run.job.sample.images]
        if images and [image.size for image in images] == halved and share > LOW_RATIO:
            events.append(
                Event("low_view_not_a_quarter", f"the first view costs {share:.2f} of the full tokens: processor limits bite")
            )
        crops = next((tuple(e.detail.split(",")) for e in events if e.kind == "crops"), ())
        events = [e for e in events if e.kind != "crops"]
        return Trajectory(tuple(run.turns), tuple(run.replies), text, tuple(events), run.full_tokens, crops)


class Scripted:
    """Answers from a script instead of a model: reply texts in order per question. For tests of policies and drivers.

    hidden: what every probe finds.
    """

    def __init__(self, script: dict[str, list[str]], hidden: tuple[float, ...] = ()):
        self.script, self.hidden = script, hidden

    def visual_tokens(self, image) -> int:
        return max(4, round(image.height / 28) * round(image.width / 28))

    def check(self, question: str) -> None:
        """Every question will do."""

    def text(self, tokens, until=()) -> str:
        return "".join(tokens)

    def reply(self, requests: list[Request], pruner: Pruner | None = None) -> list[Reply]:
        out = []
        for r in requests:
            visual = sum(self.visual_tokens(i) for i in r.turn.images)
            text = r.turn.said
            if text is None:
                asked = [*(t for t in r.session.turns if t.said is None), r.turn]
                text = self.script[(r.session.turns or asked)[0].text][len(asked) - 1]
            tokens = tuple(text) if r.turn.said is None else ()
            r.session.turns.append(r.turn)
            out.append(Reply(text, tokens, Usage(encoded=visual, prefill=float(visual), output=len(tokens))))
        return out

    def probe(self, requests: list[Request]) -> list[Reply]:
        visual = [sum(self.visual_tokens(i) for i in r.turn.images) for r in requests]
        return [
            Reply("", usage=Usage(encoded=v, prefill=v * r.turn.probe), hidden=self.hidden)
            for v, r in zip(visual, requests, strict=True)
        ]
