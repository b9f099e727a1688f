"""Training of a method's auxiliary model, such as CropVLM's cropper: on its turn alone, rewarded by a frozen target.

Paper  Carvalho and Martins, CVPRW 2026, https://arxiv.org/abs/2511.19820: the reward is the log-likelihood of the answer under a
       frozen target that sees the image and the crop, plus 1 for a valid box, 0.25 for "Not needed."; ``generate_bboxes.py`` and
       the GRPO script of https://github.com/miguelscarv/cropvlm at 7618d0e
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from awares_bench.inference.local_model import LocalModel
from awares_bench.methods.conversation import Event, EventKind, Reply, Sample, Turn
from awares_bench.methods.policy import Policy, TurnGenerator
from awares_bench.models.base import ImageInput

from ..packing import Scorer, pack
from ..rendering import Conversation
from ..rollouts import Rollout

NOT_NEEDED = "Not needed."
"""The reply that asks for no crop. A malformed reply is treated as this one, so that nothing is gained by it."""

BOX, NO_BOX, MALFORMED_BOX = 1.0, 0.25, 0.0
"""Reward for the form of a reply: a box, "Not needed.", a box that cannot be read (the authors' values)."""


@dataclass(frozen=True)
class AuxiliaryTurn(Policy):
    """The first turn of a method, where an auxiliary model answers it, and the events that its reply leads to."""

    method: Policy
    role: str
    """The auxiliary model, as the method names it."""

    def turns(self, sample: Sample) -> TurnGenerator:
        """Raises ValueError when the first turn is not this model's."""
        turns = self.method.turns(sample)
        turn = next(turns)
        if not isinstance(turn, Turn) or turn.model != self.role:
            raise ValueError(f"sample {sample.key!r}: the first turn of {type(self.method).__name__} is not the {self.role}'s")
        reply = yield replace(turn, model="")
        yield from after_reply(turns, reply)[0]
        return reply


def after_reply(turns: TurnGenerator, reply: Reply) -> tuple[list[Event], Turn]:
    """The events that a reply leads to, and the turn that follows."""
    events, step = [], turns.send(reply)
    while isinstance(step, Event):
        events.append(step)
        step = turns.send(None)
    return events, step


class FrozenTargetReward:
    """Rewards a cropper's reply by the likelihood of the answer under a frozen model, given the turn that the reply leads to."""

    def __init__(self, vlm: LocalModel, auxiliary_turn: AuxiliaryTurn):
        self.vlm, self.method = vlm, auxiliary_turn.method
        self.scorer = Scorer(vlm.host).requires_grad_(False)

    def turn_after(self, sample: Sample, text: str) -> Turn:
        """The turn that the target answers after the cropper wrote ``text``."""
        turns = self.method.turns(sample)
        next(turns)
        return after_reply(turns, Reply(text))[1]

    @torch.no_grad()
    def __call__(self, sample: Sample, answer: str, group: list[Rollout]) -> list[dict[str, float]]:
        """The parts of each rollout's reward, and their sum ``reward``.

        form: see ``BOX``; likelihood: log-probability of the whole answer under the target; answer: its probability.
        """
        out, conversations, vlm = [], [], self.vlm
        known_images: dict[str, ImageInput] = {}
        # 1) Render the turn that each reply leads to, with the accepted answer as its reply.
        for rollout in group:
            malformed = any(e.kind == EventKind.MALFORMED_BOX for e in rollout.trajectory.events)
            turn = self.turn_after(sample, NOT_NEEDED if malformed else rollout.trajectory.replies[0].text)
            form = MALFORMED_BOX if malformed else BOX if turn.boxes else NO_BOX
            images = [vlm.image_input(image, known_images, share) for image, share in turn.shown]
            conversation = Conversation()
            conversation.add_context(vlm.host.render([turn], [], images), images)
            conversation.add_reply([*vlm.host.reply_tokens(answer), vlm.host.end_of_turn])
            conversations.append(conversation)
            out.append({"form": form})
        # 2) Score all of them in one pass, and add up the answer's tokens.
        packed = pack([[c] for c in conversations], vlm.host, vlm.device)
        scores, _ = self.scorer(packed, vlm.encode(packed.images))
        likelihood = torch.zeros(len(group), device=scores.device).index_add(0, packed.conversation_index, scores).tolist()
        for parts, value in zip(out, likelihood, strict=True):
            parts |= {"answer": math.exp(value), "likelihood": value, "reward": value + parts["form"]}
        return out
