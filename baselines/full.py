"""Full resolution: the model as it is, and the denominator of every retained token ratio.

Paper    Bai et al., 2025, https://arxiv.org/abs/2502.13923 (Qwen2.5-VL)
Code     transformers ``Qwen2_5_VLForConditionalGeneration``
Needs    nothing
Cost     every visual token
Differs  nothing: one turn, the chat template's own system message
"""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench import Policy, Sample, TurnGenerator


@dataclass(frozen=True)
class Full(Policy):
    """Look at the whole image at its own size.

    system_prompt: a system message; None: what the chat template says by itself. lmms-eval's own ``qwen3_vl`` says
        ``You are a helpful assistant.``, which Qwen3-VL's template does not.
    """

    system_prompt: str | None = None

    def turns(self, sample: Sample) -> TurnGenerator:
        return (yield sample.ask(sample.images, system=self.system_prompt))
