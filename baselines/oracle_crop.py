"""Oracle crop: the half-size view, then the crops that hold the answer as the data marks it; an upper bound for AwaRes.

Paper    none; a control for AwaRes, https://arxiv.org/abs/2603.16932
Code     none
Needs    documents with an ``evidence`` column, and a checkpoint trained for AwaRes; any with form=plain
Cost     the half-size view plus the evidence's regions; with when=needed only where half size is not enough
Differs  nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from awares_bench import Event, EventKind, Policy, Sample, TurnGenerator
from awares_bench.methods.crop_grid import PAPER_GRID, Box
from awares_bench.methods.crop_turns import note_half_view, show_crops_unasked, without_crops
from awares_bench.methods.images import HALF_SHARE, SMALLEST_SIDE, half


@dataclass(frozen=True)
class OracleCrop(Policy):
    """Show where the answer is. Documents without evidence are shown in full, with an event.

    when:   ``always``, or ``needed``: only where the data says that half size is not enough
    crops:  ``regions``: the cheapest named regions that hold the evidence, the best that AwaRes could ask for;
            ``box``: the evidence boxes themselves, at least 56 pixels a side where the image allows it
    form:   the crops come after a ``call`` put into the model's mouth, or ``plain`` beside the half-size view
    prompt: wording of AwaRes' system message, for ``call``
    """

    when: Literal["always", "needed"] = "always"
    crops: Literal["regions", "box"] = "regions"
    form: Literal["call", "plain"] = "call"
    prompt: Literal["paper", "adapter"] = "paper"

    def turns(self, sample: Sample) -> TurnGenerator:
        if len(sample.images) != 1:
            return (yield from without_crops(sample))
        (image,) = sample.images
        if self.when == "needed" and sample.low_is_enough:
            reply = yield sample.ask((half(image),), shares=(HALF_SHARE,))
            yield from note_half_view(sample, reply)
            return reply
        if not sample.evidence:
            yield Event(EventKind.NO_EVIDENCE, "the document marks no evidence, so the image is shown in full")
            return (yield sample.ask(sample.images))
        names = PAPER_GRID.cheapest_cover(list(sample.evidence), *image.size)
        boxes: tuple[Box, ...] = ()
        if self.crops == "box":
            boxes = tuple(_at_least(box, SMALLEST_SIDE, image.size) for box in sample.evidence)
        return (yield from show_crops_unasked(sample, names, self.form, self.prompt, boxes))


def _at_least(box: Box, side: int, size: tuple[int, int]) -> Box:
    """``box`` grown around its centre to ``side`` pixels a side, and moved inside an image of ``size``."""
    spans = []
    for low, high, limit in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        low, high = max(0, min(low, limit - 1)), min(limit, high)
        length = min(limit, max(side, high - low))
        start = min(max(0, (low + high - length) // 2), limit - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom
