"""Strip: the half-size view and the middle third of the image at full resolution, side by side.

Paper    none; an example
Code     this file
Needs    nothing
Cost     a quarter of the tokens plus the strip, about 0.58 of full resolution
Differs  nothing
"""

from dataclasses import dataclass

from awares_bench import Event, Policy, Sample, Turn, TurnGenerator
from awares_bench.methods.images import half


@dataclass(frozen=True)
class Strip(Policy):
    """Show the view and the strip in one turn.

    share: width of the strip as a share of the image's
    """

    share: float = 1 / 3

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share!r}; it must be above 0 and at most 1")

    def turns(self, sample: Sample) -> TurnGenerator:
        images = [half(image) for image in sample.images]
        for image in sample.images:
            left = round(image.width * (1 - self.share) / 2)
            images.append(image.crop((left, 0, max(image.width - left, left + 1), image.height)))
            yield Event("strip", f"{images[-1].width} of {image.width} columns")
        return (yield Turn(tuple(images), sample.question))
