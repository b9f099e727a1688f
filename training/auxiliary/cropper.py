"""Training a policy's auxiliary model, such as CropVLM's cropper: its turn alone, worth what the frozen target makes of it.

Paper  Carvalho and Martins, CVPRW 2026, https://arxiv.org/abs/2511.19820: the reward is the log-likelihood of the answer under a
       frozen target that sees the image and the crop, plus 1 for a valid box, 0.25 for "Not needed."; ``generate_bboxes.py`` and
       the GRPO script of https://github.com/miguelscarv/cropvlm at 7618d0e
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from awares_bench.inference.local_model import VLM
from awares_bench.inference.session import Session
from awares_bench.methods.conversation import Event, Reply, Sample, Turn
from awares_bench.methods.policy import Look, Policy

from ..packing import Conversation, Features, Scorer, View, pack
from ..rollouts import Rollout

NOT_NEEDED = "Not needed."
"""The reply that asks for no crop; a malformed one is shown to the target as this, so that nothing is gained by it."""

VALID = {"box": 1.0, "malformed_box": 0.0}
"""Worth of a reply's form by the event it leads to; 0.25 for no event, which is "Not needed." (the authors' values)."""


@dataclass(frozen=True)
class Part(Policy):
    """The part of ``whole`` that its auxiliary model ``role`` answers: a turn, and the events its reply leads to.

    Raises ValueError when the first turn is not that model's.
    """

    whole: Policy
    role: str

    def look(self, sample: Sample) -> Look:
        look = self.whole.look(sample)
        turn = next(look)
        if not isinstance(turn, Turn) or turn.model != self.role:
            raise ValueError(f"sample {sample.key!r}: the first turn of {type(self.whole).__name__} is not the {self.role}'s")
        reply = yield replace(turn, model="")
        yield from _after(look, reply)[0]
        return reply


def _after(look: Look, reply: Reply) -> tuple[list[Event], Turn]:
    """The events a reply leads to, and the turn that follows."""
    events, step = [], look.send(reply)
    while isinstance(step, Event):
        events.append(step)
        step = look.send(None)
    return events, step


class Target:
    """A frozen model that scores answers to what a policy shows it after a cropper's reply."""

    def __init__(self, vlm: VLM, part: Part):
        self.vlm, self.part = vlm, part
        self.scorer = Scorer(vlm.model.requires_grad_(False).eval())

    def shown(self, sample: Sample, text: str) -> Turn:
        """What the target is shown after the cropper said ``text``."""
        look = self.part.whole.look(sample)
        next(look)
        return _after(look, Reply(text))[1]

    @torch.no_grad()
    def __call__(self, sample: Sample, answer: str, group: list[Rollout]) -> list[dict[str, float]]:
        """Parts and ``reward`` of each rollout. answer: the probability of the whole answer; form: see ``VALID``."""
        out, conversations, known, vlm = [], [], {}, self.vlm
        for rollout in group:
            kinds = {e.kind for e in rollout.trajectory.events}
            form = next((worth for kind, worth in VALID.items() if kind in kinds), 0.25)
            turn = self.shown(sample, rollout.trajectory.replies[0].text if form else NOT_NEEDED)
            views = [View.of(vlm, image, known) for image in turn.images]
            conversation = Conversation()
            conversation.shown(vlm.chunk(Session(), turn, [v.grid for v in views]), views)
            conversation.wrote([*vlm.tokenizer(answer, add_special_tokens=False)["input_ids"], vlm.tokenizer.eos_token_id])
            conversations.append(conversation)
            out.append({"form": form})
        packed = pack([[c] for c in conversations], vlm, vlm.device)
        scores, _ = self.scorer(packed, Features(vlm)(packed.views))
        likelihood = torch.zeros(len(group), device=scores.device).index_add(0, packed.owner, scores).tolist()
        for parts, value in zip(out, likelihood, strict=True):
            parts |= {"answer": math.exp(value), "likelihood": value, "reward": value + parts["form"]}
        return out
