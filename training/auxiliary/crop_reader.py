"""Whether a crop suffices alone: a frozen model answers the question from it, and the answer is judged.

Paper  ERGO, https://arxiv.org/abs/2509.21991 (a frozen Qwen2.5-VL-72B; any checkpoint here), and as a stand-in for AdaptVision's judge of
       crops, https://arxiv.org/abs/2512.03794 (a model that is asked whether the crop holds what the question needs)
"""

from __future__ import annotations

from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Turn

from ..curation.judges import Judge
from ..rollouts import Rollout


class CropReader:
    """Answers from the crop of each rollout, without the view and without reasoning. Equal crops are read once."""

    def __init__(self, vlm: LocalModel, judge: Judge, max_new_tokens: int = 32):
        self.vlm, self.judge, self.max_new_tokens = vlm, judge, max_new_tokens

    def __call__(self, question: str, answers: tuple[str, ...], group: list[Rollout]) -> list[float]:
        """The score of the frozen model's answer for each rollout; 0 where it shows no crop."""
        crops = [next((t.images[0] for t in r.trajectory.turns if t.boxes and t.images), None) for r in group]
        keys = [None if crop is None else (crop.size, crop.tobytes()) for crop in crops]
        distinct = {key: crop for key, crop in zip(keys, crops, strict=True) if crop is not None}
        if not distinct:
            return [0.0] * len(group)
        requests = [Request(Session(), Turn((crop,), question), self.max_new_tokens) for crop in distinct.values()]
        replies = self.vlm.reply(requests)
        scores = {
            key: 0.0 if isinstance(reply, Failure) else self.judge(question, answers, reply.text)
            for key, reply in zip(distinct, replies, strict=True)
        }
        return [0.0 if key is None else scores[key] for key in keys]
