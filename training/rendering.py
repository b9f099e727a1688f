"""Conversations as the model is fed them: a method played against replies that are known already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import Reply, Sample, Turn
from awares_bench.methods.policy import Policy, TurnGenerator
from awares_bench.models.base import ImageInput


@dataclass
class Conversation:
    """A conversation as fed: token ids, and the loss weight of each."""

    ids: list[int] = field(default_factory=list)

    weights: list[float] = field(default_factory=list)
    """0 where the model did not write the token."""

    images: list[ImageInput] = field(default_factory=list)
    """Its pictures, in order."""

    prompt: int = 0
    """Tokens before the first reply."""

    replies: list[tuple[int, int]] = field(default_factory=list)
    """Spans of ids that the model wrote, its end token included."""

    def add_context(self, ids: list[int], images: list[ImageInput]) -> None:
        """What the model is shown next."""
        self.ids += ids
        self.weights += [0.0] * len(ids)
        self.images += images
        if not self.replies:
            self.prompt = len(self.ids)

    def add_reply(self, ids: list[int], weight: float = 1.0) -> None:
        """What it writes next."""
        self.replies.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.weights += [weight] * len(ids)


def render(
    vlm: LocalModel,
    policy: Policy,
    sample: Sample,
    replies: list[str],
    call_weight: float = 1.0,
    max_length: int | None = None,
) -> Conversation:
    """Play a method against fixed replies -> the conversation that evaluation would have fed, to the token.

    call_weight: loss weight of every reply but the last (paper Sec. 3.3: 5). Raises ValueError when the method wants more or
    fewer turns than there are replies, when the conversation is longer than ``max_length`` tokens, or when the question or a
    reply holds the text of an image mark.
    """
    for text, what in ((sample.question, "the question"), *((reply, "the reply") for reply in replies)):
        try:
            vlm.check(text, what)
        except ValueError as error:
            raise ValueError(f"sample {sample.key!r}: {error}") from error
    out, host = Conversation(), vlm.host
    shown: list[Turn] = []
    said: list[str] = []
    for turn, reply, weight in play(policy.turns(sample), replies, call_weight):
        images = [host.image_input(image, host.image_key(image, share), share) for image, share in turn.shown]
        ids = host.render([*shown, turn], said, images)
        out.add_context(ids[1:] if said else ids, images)  # the end of the reply before is written already
        out.add_reply([*host.reply_tokens(reply), host.end_of_turn], weight)
        shown.append(turn)
        said.append(reply)
    if max_length and len(out.ids) > max_length:
        raise ValueError(
            f"sample {sample.key!r} has {len(out.ids)} tokens, max_length allows {max_length}; raise it, or drop the row"
        )
    return out


def play(turns: TurnGenerator, replies: list[str], call_weight: float) -> Iterator[tuple[Turn, str, float]]:
    """The turns that a method takes when it is given ``replies``, each with its reply and the reply's weight."""
    answer, sent = None, 0
    while True:
        try:
            step = turns.send(answer)
            while not isinstance(step, Turn):
                step = turns.send(None)
        except StopIteration:
            if sent < len(replies):
                raise ValueError(f"the row has {len(replies)} replies, the policy ends after {sent}: {replies!r}") from None
            return
        if step.forced_reply is None:
            if sent == len(replies):
                raise ValueError(f"the row has {len(replies)} replies, the policy asks for more: {replies!r}")
            sent += 1
            yield step, replies[sent - 1], 1.0 if sent == len(replies) else call_weight
            answer = Reply(replies[sent - 1])
        else:
            yield step, step.forced_reply, 0.0  # the method says it for the model
            answer = Reply(step.forced_reply)
