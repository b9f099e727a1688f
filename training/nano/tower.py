"""Stage 1 of nano: the vision tower learns to see from dense targets, before any language.

Each merged token predicts the characters and marks whose centres fall in it, in reading order; and each token that lies on
a panel predicts the panel's key, its content slot by slot, and whether it is written large. The second kind *binds*: every
token of a panel knows the whole panel, so that the language model finds an answer with one attention hop. Binding targets without the local ones do not get off the ground (measured: content at chance after
11,000 pictures), nor do pictures alone: walls of glyphs come first. Language-model loss alone does not teach a tower of
this size to see (measured: after 31,000 images it still sat at the entropy of the answers).

    python -m awares_bench.training.nano.tower --out runs/tower --steps 2600
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from awares_bench.methods.crop_grid import PAPER_GRID, Box
from awares_bench.models.qwen2_5_vl_vision import windowed_attention
from awares_bench.tasks.nano import world

from . import model as nano
from .loop import Group, autocast, train
from .pixels import half, normalise, patches

SLOTS = 3  # of a panel's content
GLYPHS = 4  # that a token can hold
PLACE = 3  # row and column of the token in quarters of the picture; the cheapest region that holds its panel
COLUMNS = 2 + SLOTS + GLYPHS + PLACE


class Vocabulary:
    """Class numbers of keys and contents; 0 is *nothing here*."""

    def __init__(self):
        w = world
        self.keys = {k: i for i, k in enumerate([*w.COLOURS, *w.LETTERS, *w.SILHOUETTES], 1)}
        self.contents = {c: i for i, c in enumerate([*w.CHARACTERS, *w.SYMBOLS, *w.DIRECTIONS], 1)}
        self.regions = {names: i for i, names in enumerate([*((n,) for n in PAPER_GRID.names), ("all",)])}


def targets(panels: list, view: Box, scale: int, vocabulary: Vocabulary, size: tuple[int, int]) -> np.ndarray:
    """What each merged token of a view should say: (T, COLUMNS) of key, size (0 none, 1 small, 2 large), contents of its
    panel, its own glyphs in reading order, its row and column in quarters of the picture, its panel's cheapest region.

    view: region of the picture in pixels; scale: 2 for the half-size view. -100 where a panel is cut by the view's edge.
    A token belongs to the panel whose centre it holds, else to the one that covers most of it (at least a fifth).
    """
    step = 28 * scale
    columns, rows = (view[2] - view[0]) // step, (view[3] - view[1]) // step
    out = np.zeros((rows * columns, COLUMNS), dtype=np.int64)
    out[:, -3] = np.repeat((view[1] + (np.arange(rows) + 0.5) * step) * 4 // size[1], columns)
    out[:, -2] = np.tile((view[0] + (np.arange(columns) + 0.5) * step) * 4 // size[0], rows)
    out[:, -1] = -100
    if not panels:
        return out
    cheapest = [vocabulary.regions[PAPER_GRID.cheapest_cover([p.box], *size)] for p in panels]
    boxes = np.array([p.box for p in panels]) - np.array([view[0], view[1], view[0], view[1]])
    x, y = np.arange(columns) * step, np.arange(rows) * step
    across = (np.minimum(boxes[:, 2, None], x + step) - np.maximum(boxes[:, 0, None], x)).clip(0)  # (P, columns)
    down = (np.minimum(boxes[:, 3, None], y + step) - np.maximum(boxes[:, 1, None], y)).clip(0)  # (P, rows)
    cover = (down[:, :, None] * across[:, None, :]).reshape(len(panels), -1).astype(float)  # (P, T)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    whole = cover.sum(1) / area
    for p, (left, top, right, bottom) in enumerate(boxes):
        cx, cy = (left + right) // 2 // step, (top + bottom) // 2 // step
        if 0 <= cx < columns and 0 <= cy < rows:
            cover[p, cy * columns + cx] += step * step
    owner, best = cover.argmax(0), cover.max(0)
    for token in np.flatnonzero(best >= step * step / 5):
        panel = panels[owner[token]]
        if whole[owner[token]] < 0.95:
            out[token, : 2 + SLOTS] = -100
            continue
        out[token, 0], out[token, 1], out[token, -1] = vocabulary.keys[panel.key], 1 + panel.large, cheapest[owner[token]]
        for slot, what in enumerate(panel.slots):
            out[token, 2 + slot] = vocabulary.contents[what]
    glyphs = [(x - view[0], y - view[1], what) for panel in panels for x, y, what in panel.glyphs]
    _own_glyphs(out, [g for g in glyphs if g[0] >= 0 and g[1] >= 0], step, columns, rows, vocabulary)
    return out


def views(rng: random.Random, image: Image.Image) -> list[tuple[Image.Image, Box, int]]:
    """The full picture, its half-size view and one random crop -> (view, region, scale)."""
    whole = (0, 0, *image.size)
    box = PAPER_GRID.boxes(*image.size, rng.choice(PAPER_GRID.names))[0]
    return [(image, whole, 1), (half(image), whole, 2), (image.crop(box), box, 1)]


def wall(rng: random.Random, scale: int, vocabulary: Vocabulary) -> tuple[Image.Image, np.ndarray]:
    """A 112x112 view full of glyphs in short runs, and its targets: many lessons a picture while reading is being learned.

    scale 2: drawn at twice the size and halved. Glyphs sit as panels put them: on the snap grid, in panel colours.
    """
    w, side = world, 112 * scale
    back, ink = rng.choice(
        [
            ((255, 255, 255), (20, 20, 20)),
            (rng.choice(list(w.COLOURS.values())), (255, 255, 255)),
            ((88, 92, 100), (255, 255, 255)),
        ]
    )
    image = Image.new("RGB", (side, side), back)
    large = rng.random() < (0.75 if scale == 2 else 0.4)
    advance, pitch, glyphs = (14.4 if large else 7.2), 28 * (2 if large and scale == 2 and rng.random() < 0.5 else 1), []
    draw = w.ImageDraw.Draw(image)
    for y in range(rng.choice((7, 14, 21)) + w.SNAP, side - 8, pitch):
        x = rng.uniform(2, 10)
        while x < side - 3 * advance:
            if rng.random() < 0.3:
                what = [rng.choice(w.SYMBOLS + w.DIRECTIONS)]
                radius = rng.uniform(*(w.LARGE_MARK if large else w.SMALL_MARK))
                x = (x + radius) // w.SNAP * w.SNAP + w.SNAP
                w._mark(draw, x, y, radius, what[0], ink, back)
                glyphs.append((x, y, what[0]))
                x += radius + rng.uniform(4, 14)
            else:
                what = rng.choices(w.CHARACTERS, k=rng.choice((1, 2, 2, 3)))
                x = (x + advance * len(what) / 2) // w.SNAP * w.SNAP + w.SNAP  # the run's centre
                w._text(draw, x, y, "".join(what), w.LARGE_TEXT if large else w.SMALL_TEXT, ink)
                glyphs += [(x + (i - (len(what) - 1) / 2) * advance, y, c) for i, c in enumerate(what)]
                x += advance * len(what) / 2 + rng.uniform(4, 14)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-12, 13, (side, side, 1), dtype=np.int16)
    image = Image.fromarray((np.asarray(image).astype(np.int16) + noise).clip(0, 255).astype(np.uint8))
    out = np.zeros((16, COLUMNS), dtype=np.int64)
    out[:, : 2 + SLOTS] = out[:, -PLACE:] = -100
    _own_glyphs(out, glyphs, 28 * scale, 4, 4, vocabulary)
    return (half(image) if scale == 2 else image), out


def _own_glyphs(out: np.ndarray, glyphs: list, step: int, columns: int, rows: int, vocabulary: Vocabulary) -> None:
    held: dict[int, list] = {}
    for x, y, what in glyphs:
        column, row = int(x) // step, int(y) // step
        if 0 <= column < columns and 0 <= row < rows:
            held.setdefault(row * columns + column, []).append((y // 8, x, what))
    for token, some in held.items():
        for slot, (_, _, what) in enumerate(sorted(some)[:GLYPHS]):
            out[token, 2 + SLOTS + slot] = vocabulary.contents[what]


def walls(step: int, seed: int, count: int, vocabulary: Vocabulary) -> dict:
    made = [wall(random.Random(f"wall/{seed}/{step}/{i}"), 1 + (i % 5 < 2), vocabulary) for i in range(count)]
    pixels = [patches(image) for image, _ in made]
    return {
        "pixel_values": torch.cat([p for p, _ in pixels]),
        "grid": torch.tensor([g for _, g in pixels]),
        "targets": torch.from_numpy(np.concatenate([t for _, t in made])),
        "view": torch.zeros(16 * count, dtype=torch.long),
    }


def batch(step: int, seed: int, scenes: int, vocabulary: Vocabulary) -> dict:
    w, out = world, {"pixel_values": [], "grid": [], "targets": [], "view": []}
    for i in range(scenes):
        rng = random.Random(f"tower/{seed}/{step}/{i}")
        image, panels = w.scene(rng, w.FAMILIES[i % len(w.FAMILIES)], rng.randint(4, 10), shared_keys=True)
        for kind, (view, box, scale) in enumerate(views(rng, image)):
            pixels, grid = patches(view)
            t = targets(panels, box, scale, vocabulary, image.size)
            out["pixel_values"].append(pixels)
            out["grid"].append(grid)
            out["targets"].append(torch.from_numpy(t))
            out["view"].append(torch.full((len(t),), kind))
    cat = torch.cat
    return {
        "pixel_values": cat(out["pixel_values"]),
        "grid": torch.tensor(out["grid"]),
        "targets": cat(out["targets"]),
        "view": cat(out["view"]),
    }


class Heads(torch.nn.Module):
    """Linear read-outs of a merged token (T, D): key (T, K), size (T, 3), contents (T, SLOTS, C), glyphs (T, GLYPHS, C),
    row and column (T, 2, 4), cheapest region (T, R)."""

    def __init__(self, width: int, vocabulary: Vocabulary):
        super().__init__()
        self.key = torch.nn.Linear(width, len(vocabulary.keys) + 1)
        self.size = torch.nn.Linear(width, 3)
        self.content = torch.nn.Linear(width, SLOTS * (len(vocabulary.contents) + 1))
        self.glyph = torch.nn.Linear(width, GLYPHS * (len(vocabulary.contents) + 1))
        self.place = torch.nn.Linear(width, 8)
        self.region = torch.nn.Linear(width, len(vocabulary.regions))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        content, glyph = self.content(x).unflatten(-1, (SLOTS, -1)), self.glyph(x).unflatten(-1, (GLYPHS, -1))
        return self.key(x), self.size(x), content, glyph, self.place(x).unflatten(-1, (2, 4)), self.region(x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="checkpoint folder whose tower goes on learning (its first 50 steps: new heads only)"
    )
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--scenes", type=int, default=18, help="pictures per step; each gives three views")
    parser.add_argument("--walls", type=int, default=700, help="first steps, on walls of glyphs instead of pictures")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args(argv)
    torch.manual_seed(a.seed)
    vocabulary, tok = Vocabulary(), nano.nano_tokenizer()
    model = nano.build(tok).to(a.device)
    if a.start:
        model.load_state_dict(type(model).from_pretrained(a.start, dtype=torch.float32).state_dict())
    tower, heads = model.model.visual, Heads(nano.Geometry().width, vocabulary).to(a.device)
    thin = torch.ones(len(vocabulary.keys) + 1, device=a.device)
    thin_glyph = torch.ones(len(vocabulary.contents) + 1, device=a.device)
    thin[0] = thin_glyph[0] = 0.1  # most tokens lie on no panel

    def read(b: dict):
        features = tower(normalise(b["pixel_values"]), grid_thw=b["grid"]).pooler_output
        return heads(features)

    def loss_of(b: dict) -> tuple[torch.Tensor, dict[str, float]]:
        key, size, content, glyph, place, region = (x.float() for x in read(b))
        t = b["targets"]
        on = t[:, 0] > 0
        l_glyph = cross_entropy(glyph.flatten(0, 1), t[:, 2 + SLOTS : -PLACE].flatten(), weight=thin_glyph)
        if not on.any():
            return l_glyph, {"wall": l_glyph.item()}
        l_key = cross_entropy(key, t[:, 0], weight=thin)
        l_size = cross_entropy(size[on], t[on, 1])
        l_content = cross_entropy(content[on].flatten(0, 1), t[on, 2 : 2 + SLOTS].flatten())
        l_place, l_region = cross_entropy(place.flatten(0, 1), t[:, -3:-1].flatten()), cross_entropy(region[on], t[on, -1])
        parts = {"key": l_key.item(), "size": l_size.item(), "content": l_content.item(), "glyph": l_glyph.item()}
        parts |= {"place": l_place.item(), "region": l_region.item()}
        return 0.5 * l_key + 0.2 * l_size + l_content + l_glyph + 0.2 * l_place + 0.5 * l_region, parts

    @torch.no_grad()
    def evaluate(step: int) -> dict:
        b = batch(0, seed=-1, scenes=96, vocabulary=vocabulary)
        b = {k: v.to(a.device) for k, v in b.items()}
        with autocast(a.device):
            key, size, content, glyph, place, region = read(b)
        t, found = b["targets"], {}
        for kind, name in enumerate(("full", "half", "crop")):
            for large in (0, 1):
                on = (t[:, 1] == 1 + large) & (b["view"] == kind)
                right = (content[on].argmax(-1) == t[on, 2 : 2 + SLOTS]).all(-1)
                held = (t[:, 2 + SLOTS : -PLACE] > 0) & on[:, None]
                found[f"{name} {'large' if large else 'small'}"] = {
                    "key": round((key[on].argmax(-1) == t[on, 0]).float().mean().item(), 3),
                    "content": round(right.float().mean().item(), 3),
                    "glyph": round((glyph.argmax(-1) == t[:, 2 + SLOTS : -PLACE])[held].float().mean().item(), 3),
                    "size": round((size[on].argmax(-1) == 1 + large).float().mean().item(), 3),
                    "place": round((place[on].argmax(-1) == t[on, -3:-1]).all(-1).float().mean().item(), 3),
                    "region": round((region[on].argmax(-1) == t[on, -1]).float().mean().item(), 3),
                }
        return found

    with windowed_attention(model):
        train(
            {"tower": tower, "heads": heads},
            [Group([*tower.parameters()], a.lr, 50 if a.start else 0), Group([*heads.parameters()], a.lr)],
            lambda step: (
                walls(step, a.seed, a.scenes * 6, vocabulary) if step < a.walls else batch(step, a.seed, a.scenes, vocabulary)
            ),
            loss_of,
            evaluate,
            a.out,
            a.steps,
            device=a.device,
            evaluate_every=250,
        )


if __name__ == "__main__":
    main()
