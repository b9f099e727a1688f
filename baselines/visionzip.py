"""VisionZip: the tokens that get most attention in the vision tower, and a few averages of the rest.

Paper    Yang et al., CVPR 2025, https://arxiv.org/abs/2412.04467
Code     https://github.com/JIA-Lab-research/VisionZip (``Qwen2_5_VL/qwen2_5vl_visionzip.py``, 68993a31)
Needs    attention received and mean key in the last vision block; no text, no training
Cost     one more QK^T of that block, in float32 blocks; the share ``retention`` of the tokens in every decoder layer
Differs  several images and batches; a contextual token is the mean of its group. ``compat=official``: target plus mean of the rest, as released
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from awares_bench import Pruner, VisualTokens


@dataclass(frozen=True)
class VisionZip(Pruner):
    """Dominant tokens by attention received, contextual tokens by merging.

    contextual: share of the image's tokens that are averages; the released code keeps 0.05 at every retention.
    compat: ``corrected``: an average is the mean of its group; ``official``, as released: its target plus the mean of the rest.
    """

    contextual: float = 0.05
    compat: Literal["corrected", "official"] = "corrected"
    needs = ("attention", "vision_keys")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual is {self.contextual!r}; it is a share of the tokens, at least 0 and below 1")

    def counts(self, visual: int, n: int) -> tuple[int, int]:
        """Dominant and contextual tokens of an image of ``visual``, of which ``n`` may stay."""
        if self.compat == "official":
            dominant = int(round(self.retention - self.contextual, 10) * visual)
            return max(dominant, 0), max(int(self.contextual * visual), 1)
        contextual = min(max(1, int(self.contextual * visual)), n // 2)
        return n - contextual, contextual

    def score(self, image: VisualTokens) -> Tensor:
        """Attention received."""
        return image.attention

    def reduce(self, image: VisualTokens, n: int) -> tuple[Tensor, Tensor]:
        """Targets are spread evenly over what is not dominant; every other token joins the target with the most similar key."""
        dominant, contextual = self.counts(len(image.features), n)
        order = self.score(image).argsort(descending=True, stable=True)
        kept, left = order[:dominant].sort().values, order[dominant:].sort().values
        if not contextual or not len(left):
            return image.features[kept], kept
        step = max(1, len(left) // contextual)
        spread = slice(0, step * contextual, step)
        targets, keys, rest = left[spread].contiguous(), image.vision_keys[left], image.features[left].float()
        nearest = (keys @ normalize(keys[spread], dim=1).T).argmax(1)
        number = torch.arange(len(targets), device=left.device)
        nearest[spread] = number  # a target stays with itself
        # a product with the members' marks, not index_add, so that a GPU gives the same bits each time
        member = (nearest == number[:, None]).float()  # (targets, left)
        total, size = member @ rest, member.sum(1, keepdim=True)
        means = total / size
        if self.compat == "official":
            means = rest[spread] + (total - rest[spread]) / (size - 1).clamp(min=1)
        merged = means.to(image.features.dtype)
        chosen = torch.cat([kept, targets]).sort().values
        features = image.features[chosen]  # one copy; the targets' rows then take their averages
        features[torch.searchsorted(chosen, targets)] = merged
        return features, chosen
