"""What figures share: the style, files without dates, labels that do not overlap, and a footnote with every caveat."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image

STYLE = Path(__file__).parents[1] / "awares.mplstyle"
WIDTH = 3.3
"""Inches of one column."""

FORMATS = ("pdf", "svg", "png")

COLOURS = 128
"""Of the palette of a PNG: fewer would shift the methods' own."""

WIDE_DPI = 200
"""Of a PNG wider than a column, which is no larger on a page than it needs to be."""


def subplots(height: float = 2.7, rows: int = 1, columns: int = 1, width: float = WIDTH, **options) -> tuple[Figure, Any]:
    """(figure, axes) in inches, laid out so that nothing is cut off; without pyplot, which would choose a window system.

    axes: one, or an array of them as ``Figure.subplots`` returns it. Use inside ``house_style()``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def house_style() -> AbstractContextManager:
    """The style of all figures as a context."""
    return style.context(STYLE)


def title(figure: Figure, text: str, on: str = "") -> None:
    """What is shown, at the figure's left edge whatever the width of the axes, and on what it was measured in a line below."""
    size, small, pad = 7.5, 6.2, 3  # points; the pad is that of the layout
    width = round(52 * figure.get_figwidth() / WIDTH)
    lines, below = textwrap.wrap(text, width), textwrap.wrap(on, round(1.25 * width))
    room = "\n\u00a0" * len(below)  # the layout knows the title alone
    figure.suptitle("\n".join(lines) + room, x=0.01, ha="left", fontsize=size, fontweight="bold", linespacing=1.15)
    y = 1 - (pad + 1.22 * size * len(lines)) / (72 * figure.get_figheight())
    if below:
        figure.text(0.01, y, "\n".join(below), fontsize=small, color="#444444", va="top", linespacing=1.25)


def legend(figure: Figure, handles: list, labels: list[str], columns: int, **options) -> None:
    """A legend below the axes."""
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=0.9, borderaxespad=0, **options)


def footnote(figure: Figure, notes: Iterable[str]) -> None:
    """Caveats below the figure; ``save`` makes room for them."""
    lines = [line for note in notes for line in textwrap.wrap(note, 92)]
    figure.text(0.01, -0.01, "\n".join(lines), fontsize=5, color="#555555", va="top", linespacing=1.2)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the house style, with fonts embedded and without dates, so that a rebuild gives the same bytes.

    A PNG gets a palette, which takes a third of the bytes and cannot be told apart; SVG and PDF are for print.
    """
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None}}.get(path.suffix)
    with house_style():
        _freeze(figure)
        width, height = figure.get_size_inches()
        lowest = min((t.get_window_extent().y0 for t in figure.texts if t.get_text()), default=0) / figure.dpi
        box = Bbox.from_extents(0, min(0, lowest - 0.03), width, height)
        wide = path.suffix == ".png" and width > 1.5 * WIDTH
        figure.savefig(path, metadata=metadata, bbox_inches=box, dpi=WIDE_DPI if wide else "figure")
    if path.suffix == ".png":
        with Image.open(path) as picture:
            small, dpi = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE), picture.info["dpi"]
        small.save(path, optimize=True, dpi=dpi)


def _freeze(figure: Figure) -> None:
    """Settle the layout once: a page that grows by the footnote would otherwise pull the legend down with it."""
    if figure.get_layout_engine() is None:
        return
    figure.draw_without_rendering()
    for legend in figure.legends:
        x, y = figure.transFigure.inverted().transform(legend.get_window_extent().p0)
        legend.set_loc("lower left")
        legend.set_bbox_to_anchor((x, y), transform=figure.transFigure)
    figure.set_layout_engine("none")


def place_labels(
    axes: Axes,
    points: list[tuple[float, float, str, str]],
    obstacles: list[tuple[float, float]] | None = None,
    offsets: list[tuple[float, float]] | None = None,
) -> list[str]:
    """Write each (x, y, text, colour) beside its point where it covers no point, label or edge -> the texts that found no place.

    Greedy, in the order given. obstacles: further (x, y) to keep clear. offsets: places to try, in points from the mark.
    """
    figure = axes.figure
    assert isinstance(figure, Figure) and isinstance(figure.canvas, FigureCanvasAgg)  # as ``subplots`` makes them
    figure.draw_without_rendering()  # settles the layout, so that positions on the page are known
    renderer = figure.canvas.get_renderer()
    # Boxes in pixels: what labels must stay inside of, and a square around each mark that they must not touch.
    frame = axes.get_window_extent(renderer)
    scale = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, *_ in points] + [axes.transData.transform(o) for o in obstacles or []]
    marks = [Bbox.from_bounds(x - 2.5 * scale, y - 2.5 * scale, 5 * scale, 5 * scale) for x, y in centres]
    taken: list[Bbox] = []
    left_over = []
    for x, y, text, colour in points:
        for dx, dy in offsets or OFFSETS:
            # The text grows away from the mark; a far one gets a line back to it.
            side = "left" if dx > 0 else ("right" if dx < 0 else "center")
            height = "center" if abs(dx) > abs(dy) or offsets else ("bottom" if dy > 0 else "top")
            line = (
                {"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
                if abs(dx) + abs(dy) > 16 and not offsets
                else None
            )
            label = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=side, va=height, color=colour, fontsize=6.2, arrowprops=line,
                path_effects=[withStroke(linewidth=1.6, foreground="white")],
            )  # fmt: skip
            box = text_box(label, renderer)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 + 2 * scale and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in (*taken, *marks)):
                taken.append(box)
                break
            label.remove()
        else:
            left_over.append(text)
    return left_over


def text_box(label: Annotation, renderer: RendererBase) -> Bbox:
    """Where the words stand, without the line to the mark."""
    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer)


NEAR = [(5, 0), (-5, 0), (4, 5), (-4, 5), (4, -5), (-4, -5), (0, 6), (0, -6)]
OFFSETS = NEAR + [
    (s * dx, dy) for r in (1, 2) for dx in (6 * r, 10 + 8 * r) for dy in (9 * r, -9 * r, 5 + 12 * r, -5 - 12 * r) for s in (1, -1)
]
"""Points to try around a mark, nearest first; a far label gets a line to its mark."""
