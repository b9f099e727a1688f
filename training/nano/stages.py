"""The language stages of nano as data: what each shows, on which pictures, in which shares, and the rows made of it.

``base``   lists and questions on growing canvases at full size, at half size, and at half size with a crop already fetched.
           A list names keys in random order and is scored on the contents only: a look-up in one attention hop, the key being
           the token just read. Questions alone do not form the look-up in 1,000 steps (measured); lists first, they do.
``light``  the base gets used to a tower that went on learning (``tower --start``: the slanted light, places and regions).
``where``  lists of regions in place of contents, from pictures of one panel to whole ones, then calls for the cheapest crops.
           Growing is what makes it learn: with one panel a region is read off within 50 steps and carries over to five panels
           at once; on whole pictures from the start it stayed at chance for 600 (both measured).
``joint``  the tower learns too; two-turn rows go on asking about what else lies in the fetched crops (more reading per picture),
           and some fetch more than they need, so that no crop is strange to the model.
``read``   mostly two-turn rows about small writing. After ``joint`` the second turn gave the half-size guess again on a fifth of
           the questions that half size had wrong (the whole picture reads them all).
``fetch``  a fresh layer below the others, taught to know the question's key where the answer is written. A question that follows its
           picture is looked up by the key's own token, in the bottom layer; after a crop no such token comes, and the answer's
           place had to fetch the key first and look up with what layers were left. It took the wrong field of the crop in one
           form of twelve, in none when the question was repeated after the crop (both measured). Half-size views of other
           pictures (rows ``blind``) make it read the crop. Its result is the base model, nano-base.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.tasks.nano import world

from .pixels import half
from .rows import Row, Writer, collate

STAGES = {"base": 0, "light": 2, "where": 3, "joint": 4, "read": 5, "fetch": 6}
KINDS = ("list", "where", "ask where", "full", "low", "crop", "blind")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: until (share of the steps), picture size, panels per picture, share of each kind of row.

    families: how often each comes up. varied: see ``ask`` of the world.
    call: loss weight of the call in ``crop`` rows, which always call.
    more: further questions of a ``crop`` row, about panels that lie in its crops. wide: share of such rows that fetch other
        regions than the cheapest: ones that hold the evidence too. small: share of such rows that ask about small writing first.
    hint: loss weight, in two-turn rows, of knowing the question's key after the bottom layer wherever the answer is written.
    """

    until: float
    size: tuple[int, int]
    count: tuple[int, int]
    mix: dict[str, float]
    families: tuple[float, ...] = (1, 1, 1, 1, 1, 1)
    varied: bool = True
    call: float = 0.0
    more: int = 0
    wide: float = 0.0
    small: float = 0.0
    hint: float = 0.0


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
            call=1.0,
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
            call=1.0,
        ),
    ),
    "joint": tuple(
        Phase(until, (224, 224), (3, 5), mix, families, varied=False, call=1.0, more=3, wide=0.25)
        for until, families, mix in (
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
            call=1.0,
            more=3,
            wide=0.25,
            small=0.8,
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
            call=1.0,
            more=1,
            wide=0.25,
            small=0.3,
            hint=0.3,
        ),
    ),
}


def train_seed(stage: str, step: int, i: int) -> int:
    """A document seed that no validation or suite document has."""
    seed = (STAGES[stage] << 36) + step * 256 + i
    assert seed in world.SEEDS["train"], f"seed {seed} is outside the training range"
    return seed


def list_row(writer: Writer, view, panels: list, regions: list[str] | None = None) -> Row:
    """ "List everything." and the panels as ``key content,`` with loss on the contents; panels that share a key are left out.

    regions: crop ids of the panels, to be listed in place of their contents.
    """
    keys = [p.key for p in panels]
    row = writer.row([([view], "Where is everything?" if regions else "List everything.", "", 0.0)])
    del row.ids[-1], row.weights[-1], row.replies[-1]
    for i, panel in enumerate(panels):
        if keys.count(panel.key) > 1:
            continue
        if regions:
            said = ((f" {panel.key}", 0.0), (regions[i], 1.0), (",", 0.0))
        else:
            content = panel.content if panel.family in ("chart", "doc", "ocr") else f" {panel.content}"
            said = ((f" {panel.key}", 0.0), (content, 1.0), (",", 0.0))
        for text, weight in said:
            if weight:
                row.replies.append((len(row.ids), len(row.ids) + len(writer.encode(text))))
            row.ids += writer.encode(text)
            row.weights += [weight] * len(writer.encode(text))
    return row


def region_id(panel, size: tuple[int, int]) -> str:
    """The id, as a call writes it, of the cheapest region that holds a panel."""
    return _id(*PAPER_GRID.cheapest_cover([panel.box], *size))


def _id(name: str) -> str:
    return next((i for i, known in PAPER_GRID.ids.items() if known == name), name)


def make_row(writer: Writer, family: str, seed: int, mode: str, phase: Phase, questions: int = 3) -> Row:
    """One training conversation; ``full`` and ``low`` ask several questions about their picture, one after another.

    ``blind`` is ``crop`` after the half-size view of another picture, with no loss on its call.
    """
    w = world
    rng = w.stream(family, seed)
    image, panels = w.family_scene(rng, family, phase.count, phase.size)
    if mode in ("list", "where"):
        panels = rng.sample(panels, len(panels))
        regions = [region_id(p, image.size) for p in panels] if mode == "where" else None
        return list_row(writer, half(image) if rng.random() < (0.8 if regions else 0.3) else image, panels, regions)
    order = rng.sample(panels, len(panels)) if questions > 1 else [rng.choice(panels)]
    if mode in ("crop", "blind") and questions > 1 and phase.small and rng.random() < phase.small:
        order.sort(key=lambda p: p.large)
    asked = []
    for panel in order[: questions if mode in ("full", "low", "ask where") else 1]:
        question, answer, options, evidence = w.ask(rng, panels, panel, phase.varied)
        if mode == "ask where":
            names = PAPER_GRID.cheapest_cover([p.box for p in evidence], *image.size)
            asked.append((f"{question} Where?", ", ".join(map(_id, names)), evidence))
            continue
        asked.append((w.prompt(family, question, options), answer, evidence))
    if mode in ("full", "low", "ask where"):
        view = image if mode == "full" else half(image)
        return writer.row([([view] if i == 0 else [], text, answer, 1.0) for i, (text, answer, _) in enumerate(asked)])
    text, answer, evidence = asked[0]
    names = PAPER_GRID.cheapest_cover([p.box for p in evidence], *image.size)
    call_weight, later = phase.call, []
    if questions > 1:
        if rng.random() < phase.wide:
            names, call_weight = rng.choice(_holding(evidence, image.size)), 0.0
        for panel in order[1:]:
            question, reply, options, needs = w.ask(rng, panels, panel, phase.varied)
            if len(later) < phase.more and PAPER_GRID.holds(names, [p.box for p in needs], *image.size):
                later.append(([], w.prompt(family, question, options), reply, 1.0))
    first = image
    if mode == "blind":
        first, call_weight = w.family_scene(rng, family, phase.count, phase.size)[0], 0.0
    turns = [([half(first)], text, PAPER_GRID.format(names), call_weight), (PAPER_GRID.cut(image, names), "", answer, 1.0)]
    row = writer.row(turns + later, PAPER_GRID.prompt)
    if phase.hint:
        start, end = row.replies[1]
        (key,) = writer.encode(f" {evidence[0].key}")
        row.hints = [(at, key) for at in range(start - 1, end - 2)]
    return row


def _holding(panels: list, size: tuple[int, int]) -> list[tuple[str, ...]]:
    """Every single region, ``all`` among them, that holds the panels."""
    return [(name,) for name in (*PAPER_GRID.names, "all") if PAPER_GRID.holds((name,), [p.box for p in panels], *size)]


def make_batch(writer: Writer, stage: str, step: int, steps: int, rows: int) -> dict:
    w, rng = world, random.Random(f"{stage}/{step}")
    phases = [p for p in PHASES[stage] if step / steps < p.until]
    out, kinds = [], []
    for i in range(rows):
        earlier = PHASES[stage][: len(PHASES[stage]) - len(phases)]
        phase = rng.choice(earlier) if earlier and rng.random() < 0.1 else phases[0]
        mode = rng.choices(list(phase.mix), list(phase.mix.values()))[0]
        family = w.FAMILIES[i % len(w.FAMILIES)] if len(set(phase.families)) == 1 else rng.choices(w.FAMILIES, phase.families)[0]
        out.append(make_row(writer, family, train_seed(stage, step, i), mode, phase))
        kinds.append(KINDS.index(mode))
    return collate(out, writer) | {"kinds": torch.tensor(kinds), "hint": phases[0].hint}
