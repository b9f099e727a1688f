"""Rollouts: the engine and the methods of evaluation, with replies that are sampled.

A group's first turn is encoded and prefilled once and its cache shared out; a second turn adds its crops to the cache, once for all that
called in the same words; a picture seen before is not encoded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from awares_bench.errors import RunError
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel, SampledReply
from awares_bench.inference.session import Prepared, Request
from awares_bench.inference.token_choice import Sampling
from awares_bench.methods.conversation import Failure, Sample, Trajectory
from awares_bench.methods.policy import Policy
from awares_bench.models.base import HostModel, ImageInput

from .rendering import Conversation


def banned_tokens(host: HostModel) -> tuple[int, ...]:
    """Tokens that are never sampled: the image mark, and every end but the template's own, which opens the next turn."""
    return tuple(sorted({host.image_token} | (host.stop - {host.end_of_turn})))


class SamplingModel:
    """Answers an ``Engine`` as ``LocalModel`` does, but samples, keeps log-probabilities and shares prefills.

    temperature 0 takes the most probable token. name_of: conversation number -> what seeds its random numbers.
    banned_first: tokens that no conversation's first reply may begin with, such as those of a call.
    """

    def __init__(
        self,
        model: LocalModel,
        temperature: float = 1.0,
        seed: str = "0",
        name_of: Callable[[int], str] = str,
        banned_first: tuple[int, ...] = (),
    ):
        self.model, self.name_of = model, name_of
        self.sampling = Sampling(temperature, seed, banned_tokens(model.host), banned_first)
        self.prefilled = self.shared = self.forward_passes = 0
        """Tokens prefilled, tokens that a shared prefill saved, decoding steps."""
        self._images: dict[str, ImageInput] = {}

    @property
    def device(self):
        return self.model.device

    def visual_tokens(self, image, share: float = 1.0) -> int:
        return self.model.visual_tokens(image, share)

    def check(self, question: str) -> None:
        self.model.check(question)

    def text(self, tokens, until=()) -> str:
        return self.model.text(tokens, until)

    def prepare(self, request: Request) -> Prepared:
        return self.model.prepare(request, self._images)

    def reply(self, requests: list[Request], pruner=None) -> list[SampledReply | Failure]:
        """Answer one turn of each conversation, all in one batch."""
        if pruner is not None:
            raise RunError("rollouts see every visual token: train without a pruner")
        if any(r.turn.model for r in requests):
            raise RunError("the method asks another model; rollouts know the trained model only")
        prepared = [r.prepared or self.prepare(r) for r in requests]
        names = [self.name_of(r.conversation) for r in requests]
        made = [replace(r, prepared=p) for r, p in zip(requests, prepared, strict=True)]
        replies = self.model.reply(made, None, self.sampling, names)
        sampled = [(p, reply) for p, reply in zip(prepared, replies, strict=True) if isinstance(reply, SampledReply)]
        self.prefilled += sum(reply.prefilled for _, reply in sampled)
        self.shared += sum(len(p.ids) - reply.prefilled for p, reply in sampled)
        self.forward_passes += max((reply.usage.passes for _, reply in sampled), default=0)
        return [reply for reply in replies if isinstance(reply, (SampledReply, Failure))]  # all of them

    def hidden_states(self, requests: list[Request]):
        raise RunError("the method reads hidden states; rollouts know the trained model's replies only")


@dataclass(frozen=True)
class Rollout:
    """A sampled exchange."""

    trajectory: Trajectory
    """As evaluation reports it."""

    conversation: Conversation
    """As training scores it."""

    logprobs: tuple[float, ...]
    """Of its sampled tokens, when they were sampled."""

    @property
    def complete(self) -> bool:
        """Every reply ended by itself."""
        return all(r.complete for r in self.trajectory.replies)

    @property
    def written(self) -> int:
        return len(self.logprobs)


def rollouts(
    model: LocalModel,
    policy: Policy,
    samples: list[Sample],
    size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: str = "0",
) -> tuple[list[list[Rollout]], SamplingModel]:
    """``size`` sampled exchanges for each sample, and the sampling model with its counts. Raises ValueError for a sample that fails."""
    sampling = SamplingModel(model, temperature, seed, lambda n: f"{samples[n // size].key}/{n % size}")
    jobs = [Job(s, max_new_tokens) for s in samples for _ in range(size)]
    outcomes = dict(Engine(sampling, policy, len(jobs)).run(jobs))
    out = []
    for i, job in enumerate(jobs):
        outcome = outcomes[i]
        if isinstance(outcome, Failure):
            raise ValueError(f"sample {job.sample.key!r} cannot be answered: {outcome.error}")
        out.append(Rollout(outcome, *_conversation(outcome)))
    return [out[i : i + size] for i in range(0, len(out), size)], sampling


def _conversation(trajectory: Trajectory) -> tuple[Conversation, tuple[float, ...]]:
    out = Conversation()
    logprobs: list[float] = []
    replies = [reply for reply in trajectory.replies if isinstance(reply, SampledReply)]  # all of them
    for i, reply in enumerate(replies):
        # a sampled end is the end that opens the next turn
        before = replies[i - 1] if i else None
        shown = list(reply.prompt)[1 if before and before.complete and not before.forced else 0 :]
        out.add_context(shown, list(reply.images))
        out.add_reply(list(reply.written), 0.0 if reply.forced else 1.0)
        logprobs += () if reply.forced else reply.logprobs
    return out, tuple(logprobs)
