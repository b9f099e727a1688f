"""Stage 1 of nano: the vision tower learns to see from dense targets, before any language.

There are two kinds of targets. Each merged token predicts the characters and marks whose centres lie in it, in reading order
(*local*). Each token that lies on a panel predicts the panel's key, its content slot by slot, and whether it is written large
(*binding*): since every token of a panel then knows the whole panel, the language model finds an answer with one attention hop.

Binding targets alone are not learned (measured: content at chance after 11,000 pictures). Nor are both kinds from pictures
alone, so walls of glyphs come first. The loss of a language model alone does not teach a tower of this size to see (measured:
after 31,000 images it was still at the entropy of the answers).

    awares-bench nano tower --out runs/tower --steps 2600
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from awares_bench.methods.crop_grid import PAPER_GRID, Box
from awares_bench.methods.images import half
from awares_bench.models.qwen_vision import windowed_attention
from awares_bench.tasks.nano import world

from .. import script
from . import model as nano
from .loop import LoopSettings, ParameterGroup, autocast, train
from .pixels import normalise, patches

NANO = nano.Geometry()
SLOTS = 3
"""Slots of a panel's content."""
GLYPHS = 4
"""Most glyphs of a token."""
PLACE = 3
"""Columns for places: the token's row and column in quarters of the picture, and the cheapest region that holds its panel."""
COLUMNS = 2 + SLOTS + GLYPHS + PLACE


class Vocabulary:
    """Class numbers of keys and contents; 0 is *nothing here*."""

    def __init__(self):
        self.keys = {k: i for i, k in enumerate([*world.COLOURS, *world.LETTERS, *world.SILHOUETTES], 1)}
        self.contents = {c: i for i, c in enumerate([*world.CHARACTERS, *world.SYMBOLS, *world.DIRECTIONS], 1)}
        self.regions = {names: i for i, names in enumerate([*((n,) for n in PAPER_GRID.names), ("all",)])}


def targets(panels: list, view: Box, scale: int, vocabulary: Vocabulary, size: tuple[int, int]) -> np.ndarray:
    """The targets (T, COLUMNS) of the merged tokens of a view, in raster order.

    Columns: key; size (0 none, 1 small, 2 large); contents of the token's panel; the token's own glyphs in reading order; its
    row and column in quarters of the picture; its panel's cheapest region. -100 (no loss) where the view cuts the panel.
    A token belongs to the panel whose centre lies in it, else to the one that covers most of it, if that is a fifth or more.

    view: region of the picture in pixels; scale: 2 for the half-size view, else 1; size: (width, height) of the picture.
    """
    step = 28 * scale
    columns, rows = (view[2] - view[0]) // step, (view[3] - view[1]) // step
    out = np.zeros((rows * columns, COLUMNS), dtype=np.int64)
    out[:, -3] = np.repeat((view[1] + (np.arange(rows) + 0.5) * step) * 4 // size[1], columns)
    out[:, -2] = np.tile((view[0] + (np.arange(columns) + 0.5) * step) * 4 // size[0], rows)
    out[:, -1] = -100
    if not panels:
        return out

    # 1) How many pixels of each token (of T) each panel (of P) covers; the token at a panel's centre gets a full token more.
    boxes = np.array([p.box for p in panels]) - np.array([view[0], view[1], view[0], view[1]])
    x, y = np.arange(columns) * step, np.arange(rows) * step
    across = (np.minimum(boxes[:, 2, None], x + step) - np.maximum(boxes[:, 0, None], x)).clip(0)  # (P, columns)
    down = (np.minimum(boxes[:, 3, None], y + step) - np.maximum(boxes[:, 1, None], y)).clip(0)  # (P, rows)
    cover = (down[:, :, None] * across[:, None, :]).reshape(len(panels), -1).astype(float)  # (P, T)
    visible_share = cover.sum(1) / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    for p, (left, top, right, bottom) in enumerate(boxes):
        column, row = (left + right) // 2 // step, (top + bottom) // 2 // step
        if 0 <= column < columns and 0 <= row < rows:
            cover[p, row * columns + column] += step * step

    # 2) Binding targets of the tokens that belong to a panel.
    cheapest = [vocabulary.regions[PAPER_GRID.cheapest_cover([p.box], *size)] for p in panels]
    owner, best = cover.argmax(0), cover.max(0)
    for token in np.flatnonzero(best >= step * step / 5):
        panel = panels[owner[token]]
        if visible_share[owner[token]] < 0.95:
            out[token, : 2 + SLOTS] = -100
            continue
        out[token, 0], out[token, 1], out[token, -1] = vocabulary.keys[panel.key], 1 + panel.large, cheapest[owner[token]]
        for slot, glyph in enumerate(panel.slots):
            out[token, 2 + slot] = vocabulary.contents[glyph]

    # 3) Local targets.
    glyphs = [(x - view[0], y - view[1], glyph) for panel in panels for x, y, glyph in panel.glyphs]
    _add_glyphs(out, [g for g in glyphs if g[0] >= 0 and g[1] >= 0], step, columns, rows, vocabulary)
    return out


def views(rng: random.Random, image: Image.Image) -> list[tuple[Image.Image, Box, int]]:
    """The full picture, its half-size view and one random crop -> (view, region, scale)."""
    everything = (0, 0, *image.size)
    box = PAPER_GRID.boxes(*image.size, rng.choice(PAPER_GRID.names))[0]
    return [(image, everything, 1), (half(image), everything, 2), (image.crop(box), box, 1)]


def wall(rng: random.Random, scale: int, vocabulary: Vocabulary) -> tuple[Image.Image, np.ndarray]:
    """A 112x112 view full of glyphs in short runs, and its targets (16, COLUMNS): much to read per picture.

    scale 2: drawn at twice the size and halved. Glyphs sit where panels put them, on the snap grid, and in panel colours.
    """
    w, side = world, 112 * scale
    # 1) Choose colours, glyph size and distance of the lines.
    back, ink = rng.choice(
        [
            ((255, 255, 255), (20, 20, 20)),
            (rng.choice(list(w.COLOURS.values())), (255, 255, 255)),
            ((88, 92, 100), (255, 255, 255)),
        ]
    )
    image = Image.new("RGB", (side, side), back)
    is_large = rng.random() < (0.75 if scale == 2 else 0.4)
    advance = 14.4 if is_large else 7.2
    pitch = 28 * (2 if is_large and scale == 2 and rng.random() < 0.5 else 1)

    # 2) Fill each line with marks and runs of characters.
    glyphs, draw = [], w.ImageDraw.Draw(image)
    for y in range(rng.choice((7, 14, 21)) + w.SNAP, side - 8, pitch):
        x = rng.uniform(2, 10)
        while x < side - 3 * advance:
            if rng.random() < 0.3:
                mark = rng.choice(w.SYMBOLS + w.DIRECTIONS)
                radius = rng.uniform(*(w.LARGE_MARK if is_large else w.SMALL_MARK))
                x = (x + radius) // w.SNAP * w.SNAP + w.SNAP
                w.draw_mark(draw, x, y, radius, mark, ink, back)
                glyphs.append((x, y, mark))
                x += radius + rng.uniform(4, 14)
            else:
                run = rng.choices(w.CHARACTERS, k=rng.choice((1, 2, 2, 3)))
                x = (x + advance * len(run) / 2) // w.SNAP * w.SNAP + w.SNAP  # the run's centre
                w.draw_text(draw, x, y, "".join(run), w.LARGE_TEXT if is_large else w.SMALL_TEXT, ink)
                glyphs += [(x + (i - (len(run) - 1) / 2) * advance, y, c) for i, c in enumerate(run)]
                x += advance * len(run) / 2 + rng.uniform(4, 14)

    # 3) Add noise, and make the local targets; there are no panels to bind to.
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-12, 13, (side, side, 1), dtype=np.int16)
    image = Image.fromarray((np.asarray(image).astype(np.int16) + noise).clip(0, 255).astype(np.uint8))
    out = np.zeros((16, COLUMNS), dtype=np.int64)
    out[:, : 2 + SLOTS] = out[:, -PLACE:] = -100
    _add_glyphs(out, glyphs, 28 * scale, 4, 4, vocabulary)
    return (half(image) if scale == 2 else image), out


def _add_glyphs(out: np.ndarray, glyphs: list, step: int, columns: int, rows: int, vocabulary: Vocabulary) -> None:
    """Write the local targets of glyphs (x, y, character or mark) into ``out``; those outside of the view are left out."""
    of_token: dict[int, list] = {}
    for x, y, glyph in glyphs:
        column, row = int(x) // step, int(y) // step
        if 0 <= column < columns and 0 <= row < rows:
            of_token.setdefault(row * columns + column, []).append((y // 8, x, glyph))
    for token, in_token in of_token.items():
        for slot, (_, _, glyph) in enumerate(sorted(in_token)[:GLYPHS]):
            out[token, 2 + SLOTS + slot] = vocabulary.contents[glyph]


def wall_batch(step: int, seed: int, count: int, vocabulary: Vocabulary) -> dict:
    """``count`` walls as a batch; see ``scene_batch``."""
    walls = [wall(random.Random(f"wall/{seed}/{step}/{i}"), 1 + (i % 5 < 2), vocabulary) for i in range(count)]
    pixels = [patches(image) for image, _ in walls]
    return {
        "pixel_values": torch.cat([p for p, _ in pixels]),
        "grid": torch.tensor([g for _, g in pixels]),
        "targets": torch.from_numpy(np.concatenate([t for _, t in walls])),
        "view": torch.zeros(16 * count, dtype=torch.long),
    }


def scene_batch(step: int, seed: int, scenes: int, vocabulary: Vocabulary) -> dict:
    """Three views of each of ``scenes`` pictures.

    pixel_values (P, 588), bytes of all patches; grid (I, 3); targets (T, COLUMNS); view (T,): 0 full, 1 half size, 2 crop.
    """
    out: dict[str, list] = {"pixel_values": [], "grid": [], "targets": [], "view": []}
    for i in range(scenes):
        rng = random.Random(f"tower/{seed}/{step}/{i}")
        image, panels = world.scene(rng, world.FAMILIES[i % len(world.FAMILIES)], rng.randint(4, 10), shared_keys=True)
        for kind, (view, box, scale) in enumerate(views(rng, image)):
            pixels, grid = patches(view)
            t = targets(panels, box, scale, vocabulary, image.size)
            out["pixel_values"].append(pixels)
            out["grid"].append(grid)
            out["targets"].append(torch.from_numpy(t))
            out["view"].append(torch.full((len(t),), kind))
    return {name: torch.tensor(value) if name == "grid" else torch.cat(value) for name, value in out.items()}


class Heads(torch.nn.Module):
    """Linear read-outs of merged tokens (T, D), as logits: key (T, K), size (T, 3), contents (T, SLOTS, C), glyphs
    (T, GLYPHS, C), row and column (T, 2, 4), cheapest region (T, R)."""

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def main(args: argparse.Namespace, geometry: nano.Geometry = NANO, stop: int | None = None, workers: int = 1) -> int:
    """Train a tower of this geometry; stop: step to end after, although the schedule goes on; workers: processes that make batches."""
    # 1) Build the tower and its heads.
    torch.manual_seed(args.seed)
    vocabulary, tokenizer = Vocabulary(), nano.nano_tokenizer()
    model = nano.build(tokenizer, geometry).to(args.device)
    if args.start:
        model.load_state_dict(type(model).from_pretrained(args.start, dtype=torch.float32).state_dict())
    tower, heads = model.model.visual, Heads(geometry.width, vocabulary).to(args.device)
    key_weights = torch.ones(len(vocabulary.keys) + 1, device=args.device)
    glyph_weights = torch.ones(len(vocabulary.contents) + 1, device=args.device)
    key_weights[0] = glyph_weights[0] = 0.1  # class 0 is nothing, and most tokens lie on no panel

    def predict(batch: dict) -> tuple[torch.Tensor, ...]:
        return heads(tower(normalise(batch["pixel_values"]), grid_thw=batch["grid"]).pooler_output)

    def loss_of(batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        key, size, content, glyph, place, region = (x.float() for x in predict(batch))
        t = batch["targets"]
        on_panel = t[:, 0] > 0
        l_glyph = cross_entropy(glyph.flatten(0, 1), t[:, 2 + SLOTS : -PLACE].flatten(), weight=glyph_weights)
        if not on_panel.any():
            return l_glyph, {"wall": l_glyph.item()}
        l_key = cross_entropy(key, t[:, 0], weight=key_weights)
        l_size = cross_entropy(size[on_panel], t[on_panel, 1])
        l_content = cross_entropy(content[on_panel].flatten(0, 1), t[on_panel, 2 : 2 + SLOTS].flatten())
        l_place = cross_entropy(place.flatten(0, 1), t[:, -3:-1].flatten())
        l_region = cross_entropy(region[on_panel], t[on_panel, -1])
        parts = {"key": l_key.item(), "size": l_size.item(), "content": l_content.item(), "glyph": l_glyph.item()}
        parts |= {"place": l_place.item(), "region": l_region.item()}
        return 0.5 * l_key + 0.2 * l_size + l_content + l_glyph + 0.2 * l_place + 0.5 * l_region, parts

    @torch.no_grad()
    def evaluate(step: int) -> dict:
        """Accuracy on fixed scenes, by view and size of the writing."""
        batch = {k: v.to(args.device) for k, v in scene_batch(0, seed=-1, scenes=96, vocabulary=vocabulary).items()}
        with autocast(args.device):
            key, size, content, glyph, place, region = predict(batch)
        t, accuracy = batch["targets"], {}

        def share(hits: torch.Tensor) -> float:
            return round(hits.float().mean().item(), 3)

        for kind, name in enumerate(("full", "half", "crop")):
            for large in (0, 1):
                on = (t[:, 1] == 1 + large) & (batch["view"] == kind)
                has_glyph = (t[:, 2 + SLOTS : -PLACE] > 0) & on[:, None]
                accuracy[f"{name} {'large' if large else 'small'}"] = {
                    "key": share(key[on].argmax(-1) == t[on, 0]),
                    "content": share((content[on].argmax(-1) == t[on, 2 : 2 + SLOTS]).all(-1)),
                    "glyph": share((glyph.argmax(-1) == t[:, 2 + SLOTS : -PLACE])[has_glyph]),
                    "size": share(size[on].argmax(-1) == 1 + large),
                    "place": share((place[on].argmax(-1) == t[on, -3:-1]).all(-1)),
                    "region": share(region[on].argmax(-1) == t[on, -1]),
                }
        return accuracy

    def make_batch(step: int) -> dict:
        if step < args.walls:
            return wall_batch(step, args.seed, args.scenes * 6, vocabulary)
        return scene_batch(step, args.seed, args.scenes, vocabulary)

    # 2) Train. A tower that has been trained before is kept still until the new heads fit it.
    groups = [
        ParameterGroup([*tower.parameters()], args.lr, 50 if args.start else 0),
        ParameterGroup([*heads.parameters()], args.lr),
    ]
    settings = LoopSettings(args.steps, stop, device=args.device, evaluate_every=250, workers=workers)
    with windowed_attention(model.model.visual):
        train({"tower": tower, "heads": heads}, groups, make_batch, loss_of, evaluate, args.out, settings)
    return 0


if __name__ == "__main__":
    sys.exit(script.run(__doc__, add_arguments, main))
