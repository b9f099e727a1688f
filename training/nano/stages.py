"""Nano's language stages as data: what each stage shows, on which pictures, in which shares, and the rows made of it.

``base``   Lists and questions, on growing canvases: at full size, at half size, and at half size with a crop already fetched.
           A list names keys in random order, and only the contents are scored: a look-up in one attention hop, whose key is
           the token just read. Questions alone do not form this look-up in 1,000 steps; after lists they do (measured).
``light``  Adapts the base to a tower that was trained further (``tower --start``) on slanted light, places and regions.
``where``  Lists of regions in place of contents, from pictures of one panel up to whole ones; then calls for the cheapest
           crops. It has to grow: with one panel a region is learned within 50 steps and carries over to five panels at once;
           on whole pictures from the start it stayed at chance for 600 steps (both measured).
``joint``  The tower is trained too. Two-turn rows ask further questions about what else lies in the fetched crops, which is
           more reading per picture, and some fetch more than they need, so that the model has seen every crop.
``read``   Mostly two-turn rows about small writing. After ``joint`` the second turn repeated the half-size guess on a fifth of
           the questions that half size got wrong, all of which the whole picture gets right.
``fetch``  Adds a fresh layer below the others, and trains it to know the question's key at the positions that write the answer.
           When a question follows its picture, the key's own token does the look-up, in the bottom layer. After a crop no
           such token follows: the position of the answer had to fetch the key first, and look up with the remaining layers.
           It then took the wrong field of the crop in one form of twelve; in none when the question was repeated after the
           crop (both measured). In ``blind`` rows the half-size view is of another picture, so that the model has to read the
           crop. The result is the base model, nano-base.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.tasks.nano import world

from .rows import RowEncoder, TrainingRow, collate

STAGES = {"base": 0, "light": 2, "where": 3, "joint": 4, "read": 5, "fetch": 6}
KINDS = ("list", "where", "ask where", "full", "low", "crop", "blind")


@dataclass(frozen=True)
class Phase:
    """A stretch of a stage."""

    until_share: float
    """Where the phase ends, as a share of the stage's steps."""
    size: tuple[int, int]
    """Width and height of a picture, in pixels."""
    panel_count: tuple[int, int]
    """Fewest and most panels of a picture."""
    row_shares: dict[str, float]
    """How often each kind of row comes up; see ``KINDS``."""
    family_weights: tuple[float, ...] = (1, 1, 1, 1, 1, 1)
    """How often each family of questions comes up."""
    varied: bool = True
    """Whether the wording of questions varies; see ``ask`` of the world."""
    call_weight: float = 0.0
    """Loss weight of the call in ``crop`` rows, which always call."""
    max_follow_ups: int = 0
    """Most further questions of a ``crop`` row, about panels that lie in its crops."""
    wider_crops_share: float = 0.0
    """Share of ``crop`` rows that fetch a random region that holds the evidence, in place of the cheapest."""
    small_writing_share: float = 0.0
    """Share of ``crop`` and ``blind`` rows that ask about small writing first."""
    hint_weight: float = 0.0
    """In two-turn rows, loss weight of knowing the question's key after the bottom layer wherever the answer is written."""


PHASES = {
    "base": (
        Phase(0.10, (112, 112), (1, 2), {"list": 0.7, "full": 0.3}),
        Phase(0.25, (224, 224), (2, 4), {"list": 0.6, "full": 0.3, "crop": 0.1}),
        Phase(0.50, (224, 224), (3, 5), {"list": 0.15, "full": 0.35, "low": 0.2, "crop": 0.3}),
        Phase(
            1.00, (224, 224), (3, 5), {"list": 0.1, "full": 0.4, "low": 0.15, "crop": 0.35}, (1, 2, 0.7, 2, 0.5, 2), varied=False
        ),
    ),
    "light": (
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"list": 0.05, "where": 0.17, "ask where": 0.18, "full": 0.2, "low": 0.1, "crop": 0.3},
            (1, 2, 0.7, 2, 0.5, 2),
            varied=False,
            call_weight=1.0,
        ),
    ),
    "where": (
        Phase(0.12, (224, 224), (1, 1), {"where": 1.0}),
        Phase(0.24, (224, 224), (1, 3), {"where": 0.7, "ask where": 0.3}),
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"list": 0.05, "where": 0.1, "ask where": 0.1, "full": 0.25, "low": 0.1, "crop": 0.4},
            (1, 3, 0.8, 1.2, 0.5, 1.2),
            varied=False,
            call_weight=1.0,
        ),
    ),
    "joint": tuple(
        Phase(
            until_share,
            (224, 224),
            (3, 5),
            row_shares,
            family_weights,
            varied=False,
            call_weight=1.0,
            max_follow_ups=3,
            wider_crops_share=0.25,
        )
        for until_share, family_weights, row_shares in (
            (
                0.27,
                (1, 2.5, 0.8, 1.5, 0.5, 1.2),
                {"list": 0.04, "where": 0.1, "ask where": 0.12, "full": 0.18, "low": 0.08, "crop": 0.48},
            ),
            (
                0.67,
                (1, 2.5, 0.8, 1.5, 0.5, 1.2),
                {"list": 0.03, "where": 0.1, "ask where": 0.12, "full": 0.15, "low": 0.18, "crop": 0.42},
            ),
            (
                1.00,
                (1.8, 3, 0.7, 1.5, 0.5, 0.9),
                {"list": 0.02, "where": 0.08, "ask where": 0.14, "full": 0.08, "low": 0.16, "crop": 0.52},
            ),
        )
    ),
    "read": (
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"list": 0.01, "where": 0.04, "ask where": 0.1, "full": 0.05, "low": 0.1, "crop": 0.7},
            (2.4, 3, 1.2, 1.2, 0.5, 0.9),
            varied=False,
            call_weight=1.0,
            max_follow_ups=3,
            wider_crops_share=0.25,
            small_writing_share=0.8,
        ),
    ),
    "fetch": (
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"where": 0.02, "ask where": 0.08, "full": 0.04, "low": 0.1, "crop": 0.64, "blind": 0.12},
            (2, 2.4, 1.4, 1.2, 0.7, 1.2),
            varied=False,
            call_weight=1.0,
            max_follow_ups=1,
            wider_crops_share=0.25,
            small_writing_share=0.3,
            hint_weight=0.3,
        ),
    ),
}


def train_seed(stage: str, step: int, i: int) -> int:
    """A document seed that no validation or suite document has."""
    seed = (STAGES[stage] << 36) + step * 256 + i
    assert seed in world.SEEDS["train"], f"seed {seed} is outside the training range"
    return seed


def list_row(encoder: RowEncoder, view, panels: list, regions: list[str] | None = None) -> TrainingRow:
    """The request to list everything, then the panels as ``key content,`` with loss on the contents.

    Panels that share a key are left out. regions: crop ids of the panels, which are listed in place of the contents.
    """
    keys = [p.key for p in panels]
    row = encoder.encode_row([([view], "Where is everything?" if regions else "List everything.", "", 0.0)])
    del row.ids[-1], row.weights[-1], row.replies[-1]
    for i, panel in enumerate(panels):
        if keys.count(panel.key) > 1:
            continue
        content = panel.content if panel.family in ("chart", "doc", "ocr") else f" {panel.content}"
        for text, weight in ((f" {panel.key}", 0.0), (regions[i] if regions else content, 1.0), (",", 0.0)):
            ids = encoder.encode(text)
            if weight:
                row.replies.append((len(row.ids), len(row.ids) + len(ids)))
            row.ids += ids
            row.weights += [weight] * len(ids)
    return row


def region_id(panel, size: tuple[int, int]) -> str:
    """The id that a call writes for the cheapest region that holds a panel."""
    return _id(*PAPER_GRID.cheapest_cover([panel.box], *size))


def _id(name: str) -> str:
    return next((i for i, region in PAPER_GRID.ids.items() if region == name), name)


def make_row(encoder: RowEncoder, family: str, seed: int, mode: str, phase: Phase, questions: int = 3) -> TrainingRow:
    """One training conversation.

    mode: one of ``KINDS``. ``full`` and ``low`` ask several questions about their picture, one after another; ``blind`` is
    ``crop`` after the half-size view of another picture, with no loss on its call.
    """
    rng = world.stream(family, seed)
    image, panels = world.family_scene(rng, family, phase.panel_count, phase.size)

    # 1) Lists name every panel, mostly of the half-size view where regions are asked for.
    if mode in ("list", "where"):
        panels = rng.sample(panels, len(panels))
        regions = [region_id(p, image.size) for p in panels] if mode == "where" else None
        return list_row(encoder, half(image) if rng.random() < (0.8 if regions else 0.3) else image, panels, regions)

    # 2) Choose the panels to ask about, and ask.
    order = rng.sample(panels, len(panels)) if questions > 1 else [rng.choice(panels)]
    if mode in ("crop", "blind") and questions > 1 and phase.small_writing_share and rng.random() < phase.small_writing_share:
        order.sort(key=lambda p: p.large)
    exchanges = []
    for panel in order[: questions if mode in ("full", "low", "ask where") else 1]:
        question, answer, options, evidence = world.ask(rng, panels, panel, phase.varied)
        if mode == "ask where":
            names = PAPER_GRID.cheapest_cover([p.box for p in evidence], *image.size)
            exchanges.append((f"{question} Where?", ", ".join(map(_id, names)), evidence))
        else:
            exchanges.append((world.prompt(family, question, options), answer, evidence))
    if mode in ("full", "low", "ask where"):
        view = image if mode == "full" else half(image)
        return encoder.encode_row(
            [([view] if i == 0 else [], text, answer, 1.0) for i, (text, answer, _) in enumerate(exchanges)]
        )

    # 3) Two-turn rows: the call for the cheapest crops, or for wider ones, and further questions that the crops answer.
    text, answer, evidence = exchanges[0]
    names, call_weight = PAPER_GRID.cheapest_cover([p.box for p in evidence], *image.size), phase.call_weight
    follow_ups: list[tuple] = []
    if questions > 1:
        if rng.random() < phase.wider_crops_share:
            names, call_weight = rng.choice(_holding(evidence, image.size)), 0.0
        for panel in order[1:]:
            question, reply, options, needs = world.ask(rng, panels, panel, phase.varied)
            if len(follow_ups) < phase.max_follow_ups and PAPER_GRID.holds(names, [p.box for p in needs], *image.size):
                follow_ups.append(([], world.prompt(family, question, options), reply, 1.0))
    first = image
    if mode == "blind":
        first, call_weight = world.family_scene(rng, family, phase.panel_count, phase.size)[0], 0.0
    turns = [([half(first)], text, PAPER_GRID.format(names), call_weight), (PAPER_GRID.cut(image, names), "", answer, 1.0)]
    row = encoder.encode_row(turns + follow_ups, PAPER_GRID.prompt)

    # 4) Hint at the question's key wherever a token of the answer is predicted.
    if phase.hint_weight:
        start, end = row.replies[1]
        (key,) = encoder.encode(f" {evidence[0].key}")
        row.hints = [(position, key) for position in range(start - 1, end - 2)]
    return row


def _holding(panels: list, size: tuple[int, int]) -> list[tuple[str, ...]]:
    """Every single region, ``all`` among them, that holds the panels."""
    return [(name,) for name in (*PAPER_GRID.names, "all") if PAPER_GRID.holds((name,), [p.box for p in panels], *size)]


def make_batch(encoder: RowEncoder, stage: str, step: int, steps: int, rows: int) -> dict:
    """The batch of a step of ``steps``: ``rows`` conversations of the phase, a tenth of them of earlier phases."""
    rng = random.Random(f"{stage}/{step}")
    phases = [p for p in PHASES[stage] if step / steps < p.until_share]
    earlier = PHASES[stage][: len(PHASES[stage]) - len(phases)]
    batch, kinds = [], []
    for i in range(rows):
        phase = rng.choice(earlier) if earlier and rng.random() < 0.1 else phases[0]
        mode = rng.choices(list(phase.row_shares), list(phase.row_shares.values()))[0]
        if len(set(phase.family_weights)) == 1:
            family = world.FAMILIES[i % len(world.FAMILIES)]
        else:
            family = rng.choices(world.FAMILIES, phase.family_weights)[0]
        batch.append(make_row(encoder, family, train_seed(stage, step, i), mode, phase))
        kinds.append(KINDS.index(mode))
    return collate(batch, encoder) | {"kinds": torch.tensor(kinds), "hint": phases[0].hint_weight}
