"""Zoom loop: look, call for crops as often as need be, answer; as DeepEyes, Mini-o3, Pixel Reasoner or Chain-of-Focus do.

Paper    https://arxiv.org/abs/2505.14362, https://arxiv.org/abs/2509.07969, https://arxiv.org/abs/2505.15966, https://arxiv.org/abs/2505.15436
Code     Visual-Agent/DeepEyes at 6c5e796, Mini-o3/Mini-o3 at 8654dbf, TIGER-AI-Lab/Pixel-Reasoner at a3a6c3a, xtong-zhang/Chain-of-Focus at 431ff0d
Needs    the released weights of the style (Qwen2.5-VL-7B each), and processor limits of 4 to 16,384 tokens
Cost     the first view (every visual token; Mini-o3: two megapixels) plus each crop, so mostly above full resolution; ``view_tokens`` caps it
Differs  calls are read as JSON, never evaluated; greedy; an unusable call is an error turn (Chain-of-Focus: the view again); calls beyond the limit leave no answer. DeepEyes reads as in its training. ``compat=official`` as the released evaluations
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from awares_bench import Event, EventKind, Policy, Sample, Turn, TurnGenerator
from awares_bench.methods.images import LONGEST_RATIO, TOKEN_SIDE, rounded, share_of
from awares_bench.methods.options import parse_int
from awares_bench.methods.tool_calls import CallError, answered, enclosing, share_of_box

from .zoom_styles import TOKEN, Picture, Region, Style
from .zoom_styles.chain_of_focus import ChainOfFocus
from .zoom_styles.deepeyes import DeepEyes
from .zoom_styles.mini_o3 import MiniO3
from .zoom_styles.pixel_reasoner import PixelReasoner

LARGEST_CUT = 2**25
"""Pixels of a region, what lies outside the picture included; a larger one is refused and not painted."""

STYLES: dict[str, Style] = {
    "deepeyes": DeepEyes(),
    "mini-o3": MiniO3(),
    "pixel-reasoner": PixelReasoner(),
    "chain-of-focus": ChainOfFocus(),
}


@dataclass(frozen=True)
class ZoomLoop(Policy):
    """Answer, or call for a crop of what was shown, and so on on one cache.

    style:       whose prompts, boxes and crops; the checkpoint must be trained for them
    calls:       calls that are answered; 0: the style's own (10, 11, 4, 5)
    budget:      tokens of each reply, whatever the task allows; 0: the style's own (10,240, 4,096, 2,048, 512)
    view_tokens: visual tokens of the first view at the most; 0: the style's own limits
    crop_tokens: visual tokens of each crop at the most; 0: the style's own limits
    compat:      ``corrected``, or ``official``: calls, boxes and failures as in the released evaluation
    """

    style: Literal["deepeyes", "mini-o3", "pixel-reasoner", "chain-of-focus"] = "deepeyes"
    calls: int = 0
    budget: int = 0
    view_tokens: int = 0
    crop_tokens: int = 0
    compat: Literal["corrected", "official"] = "corrected"

    def __post_init__(self):
        super().__post_init__()
        for name in ("calls", "budget", "view_tokens", "crop_tokens"):
            parse_int(name, getattr(self, name), 0)
        for name in ("view_tokens", "crop_tokens"):
            if 0 < getattr(self, name) < 4:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (the style's own limits) or at least 4")

    def turns(self, sample: Sample) -> TurnGenerator:
        style, official, images = STYLES[self.style], self.compat == "official", len(sample.images)
        how = {"min_reply_tokens": self.budget or style.budget, "until": ()}
        pictures = [self.picture(style.view(image), (0, 0, *image.size), self.view_tokens) for image in sample.images]
        asked = style.user.format(question=sample.question)
        shares = tuple(share_of(p.shown, image) for p, image in zip(pictures, sample.images, strict=True))
        turn = Turn(tuple(p.shown for p in pictures), asked, shares=shares, system=style.system)
        last = self.calls or style.calls
        for replies in range(1, last + 2):
            reply = yield replace(turn, is_final=replies > last, **how)
            call, refused = None, None
            try:
                call = style.read(reply.text, official)
                if call is not None and images and replies <= last:
                    index, region = style.region(call, pictures, images, official)
                    picture = self.cut(style, pictures[index], region)
            except CallError as error:
                refused = error
            if refused is None and (call is None or style.answers_too(reply.text, official)):
                return answered(reply, style.answer(reply.text))
            if not images:
                yield Event(EventKind.NO_IMAGE, "a call for a region of an image that is not there counts as the answer")
                return answered(reply, style.answer(reply.text))
            if replies > last:
                yield Event(EventKind.CALL_LIMIT, f"the reply after {last} calls is another call, so there is no answer")
                return answered(reply, style.unanswered(reply.text, official))
            if refused is not None:
                yield Event(EventKind.MALFORMED_CALL, str(refused))
                after = style.after_error(refused, pictures[0], replies, official)
                if after is None:
                    return answered(reply, reply.text)
                turn = after
                continue
            pictures.append(picture)
            box = enclosing(picture.place, *sample.images[0].size)
            share = min(share_of_box(box, *sample.images[0].size), share_of(picture.shown, sample.images[0]))
            turn = replace(style.after_crop(picture, replies), shares=(share,), boxes=(box,) if images == 1 else ())
        raise AssertionError("the last reply always ends the loop")

    def picture(self, made: tuple[Image.Image, Image.Image], place: Region, most: int) -> Picture:
        """(what crops are cut from, what is shown) -> the same, with what is shown at most ``most`` tokens."""
        source, shown = made
        if most and round(shown.width / TOKEN_SIDE) * round(shown.height / TOKEN_SIDE) > most:
            shown = rounded(shown, 4 * TOKEN, most * TOKEN)
        return Picture(source, shown, place)

    def cut(self, style: Style, of: Picture, region: Region) -> Picture:
        """The crop that a call is answered with. Raises CallError when there is nothing to show."""
        left, top, right, bottom = map(round, region)
        width, height = right - left, bottom - top
        if min(width, height) <= 0 or max(width, height) > LONGEST_RATIO * min(width, height) or width * height > LARGEST_CUT:
            raise CallError(
                f"the region {[left, top, right, bottom]} of a picture of {of.source.width}x{of.source.height} cannot be cut"
            )
        return self.picture(style.crop(of.source.crop((left, top, right, bottom))), of.inside(region), self.crop_tokens)
