"""An answer, the card of HTML that a notebook shows of it, and how pictures are drawn there: views, regions on the picture, crops.

Whatever comes from the model or the user is escaped. The gallery of a run draws with the same functions.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from awares_bench.methods.crop_grid import PAPER_GRID, Box
from awares_bench.methods.images import half_size

if TYPE_CHECKING:
    from awares_bench.methods.conversation import Event, Reply, Turn
    from awares_bench.methods.kept_tokens import KeptTokens

COLOURS = ("#d6336c", "#1971c2", "#e8590c", "#2f9e44")
"""Of regions, in the order asked."""

DIMMED, AVERAGE = "#2b3440", "#e8590c"
"""Towards what a dropped token is dimmed, dark because pages are white, and the dot of an average."""

STYLE = """
.awares-card{font:15px/1.45 system-ui,sans-serif;color:#1b1f24;background:#fff;border:1px solid #d8dee4;border-radius:8px;padding:1rem;margin:.6rem 0;max-width:76rem}
.awares-card .head{display:flex;gap:.6rem;align-items:baseline;flex-wrap:wrap;margin-bottom:.4rem}
.awares-card .tag{font-size:.8rem;border-radius:4px;padding:.05rem .45rem;background:#eef1f4}
.awares-card .event{background:#fff1d6;color:#7a4b00} .awares-card .error{background:#fde2e1;color:#8c1d18}
.awares-card .turns{display:flex;gap:1.4rem;flex-wrap:wrap;margin-top:.8rem} .awares-card .turn{max-width:31rem}
.awares-card img{image-rendering:pixelated;border:1px solid #d8dee4;vertical-align:top;margin:0 .3rem .3rem 0;max-width:100%;height:auto;display:inline}
.awares-card .turn:has(.kept){max-width:62rem} .awares-card .kept{display:inline-flex;flex-direction:column;max-width:100%;margin:0 .6rem .3rem 0;vertical-align:top}
.awares-card code{background:#f3f4f6;color:#1b1f24;padding:.1rem .35rem;border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere}
.awares-card small,.awares-card summary{color:#57606a;font-size:.8rem}
.awares-card pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;color:#1b1f24;padding:.5rem;border-radius:6px;margin:.4rem 0;max-height:16rem;overflow:auto}
.awares-card table{border-collapse:collapse;margin-top:.8rem;font-size:.85rem} .awares-card td,.awares-card th{padding:.15rem .7rem;text-align:right;border-top:1px solid #eef1f4}
.awares-card td:first-child,.awares-card th:first-child,.awares-card td.text{text-align:left;overflow-wrap:anywhere;white-space:pre-wrap;max-width:30rem}
"""
"""Only within a card, so that a notebook's own page stays as it is."""

PHASES = ("preprocess", "encode", "prefill", "decode")


@dataclass(frozen=True, repr=False)
class Answer:
    """An answer, what it cost and how it came about. A number that is not known is None.

    It holds its pictures; documents by the thousand are lmms-eval's.
    """

    method: str
    """Name and options, such as ``awares+visionzip retention=0.5``."""
    question: str
    image: Image.Image | None = None
    """The picture as the model could see it: RGB, upright, in full size; None when it could not be read."""
    text: str | None = None
    """The answer; None when there is none."""
    error: str | None = None
    """Why there is none, in a sentence; None when there is."""
    crops: tuple[str, ...] = ()
    """Names of the regions that were shown after a call."""
    rtr: float | None = None
    """Retained token ratio: visual tokens fed to the decoder over all turns, over ``full_tokens`` (paper Eq. 9)."""
    tokens: float | None = None
    """Visual tokens fed to the decoder over all turns, averaged over its layers."""
    full_tokens: int | None = None
    """Visual tokens of the picture at full resolution, under the same limits."""
    seconds: float | None = None
    """Of all turns; in a batch of several, this answer's share."""
    turns: tuple[Turn, ...] = ()
    """What was shown and said to the model."""
    replies: tuple[Reply, ...] = ()
    """What it said, verbatim, with the cost of each turn."""
    events: tuple[Event, ...] = ()
    """What a reader should know."""
    boxes: tuple[Box, ...] = ()
    """Those that were shown by a method that has boxes, in pixels of ``image``."""
    malformed_call: str | None = None
    """Why the model's call could not be read; None when it made none, or one that could."""

    @property
    def malformed(self) -> bool:
        """Whether the model made a call that the grammar does not allow."""
        return self.malformed_call is not None

    def __str__(self) -> str:
        return f"error: {self.error}" if self.text is None else self.text

    def __repr__(self) -> str:
        """One line: the answer and the numbers."""
        parts = [f"method={self.method!r}", f"text={self.text!r}" if self.error is None else f"error={self.error!r}"]
        parts += [f"crops={self.crops}"] if self.crops else []
        parts += [f"rtr={self.rtr:.3f}"] if self.rtr is not None else []
        return f"Answer({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return card(self)


def page(body: str, title: str) -> str:
    """Cards -> a whole HTML page that needs no other file."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def card(answer: Answer) -> str:
    """What was asked, shown, said and spent -> a ``div`` with its own style."""
    tags = [] if answer.rtr is None else [_tag(f"RTR {answer.rtr:.2f}")]
    if answer.tokens is not None:
        tags.append(_tag(f"{answer.tokens:g} of {answer.full_tokens} visual tokens"))
    if answer.seconds is not None:
        tags.append(_tag(f"{1000 * answer.seconds:.0f} ms"))
    tags += [_tag(f"crops: {', '.join(answer.crops)}")] if answer.crops else []
    tags += [_tag(f"box: {','.join(map(str, box))}") for box in answer.boxes]
    tags += [_tag(f"{e.kind}: {e.detail}" if e.detail else e.kind, "event") for e in answer.events]
    tags += [_tag(answer.error, "error")] if answer.error is not None else []
    size = "" if answer.image is None else f"<small>{answer.image.width}×{answer.image.height} pixels</small>"
    text = "" if answer.text is None else f"answer: <code>{_text(answer.text)}</code>"
    turns = [_turn(answer, i) for i in range(len(answer.turns))]
    if answer.image is not None and (places := boxes(answer.image, answer.crops)):
        drawn = image_tag(outlined(answer.image, places))
        turns.insert(1, f'<div class="turn"><small>where it looked, on the full image</small><br>{drawn}</div>')
    elif answer.image is not None and not turns:
        turns = [f'<div class="turn">{image_tag(enlarged(answer.image))}</div>']
    return (
        f'<style>{STYLE}</style><div class="awares-card"><div class="head"><b>{_text(answer.method)}</b>{size}{"".join(tags)}</div>'
        f'<pre>{_text(answer.question)}</pre>{text}<div class="turns">{"".join(turns)}</div>{_costs(answer)}</div>'
    )


def cards(answers: Sequence[Answer], rows: list[list[str]]) -> str:
    """Several answers to one question -> a table of ``rows``, its head first, and a folded card for each answer."""
    head, *body = rows
    kinds = ["", " class=text"] + [""] * len(head)  # the second column is the answer
    lines = ["".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=False)) for row in body]
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    table = "".join(f"<tr>{line}</tr>" for line in (top, *lines))
    folded = "".join(f"<details><summary>{_text(a.method)}</summary>{card(a)}</details>" for a in answers)
    return f'<style>{STYLE}</style><div class="awares-card"><table>{table}</table>{folded}</div>'


def _turn(answer: Answer, i: int) -> str:
    turn, reply = answer.turns[i], answer.replies[i]
    who = f", {_text(turn.model)}" if turn.model else ""
    shown = "".join(image_tag(enlarged(image)) for image in turn.images) + kept_figures(turn.images, reply.kept)
    asked = "\n\n".join(filter(None, (turn.system, *turn.image_prefixes, turn.text)))
    told = f"<details><summary>message</summary><pre>{_text(asked)}</pre></details>" if asked else "<br>"
    said = (
        "a probe: no text is asked for"
        if turn.hidden_state_depth is not None
        else f"model: <code>{_text(reply.text) or '&nbsp;'}</code>"
    )
    put = " <small>(put into its mouth)</small>" if turn.forced_reply is not None else ""
    return f'<div class="turn"><small>turn {i + 1}{who}: {_text(_caption(answer, turn, i))}</small><br>{shown}{told}{said}{put}</div>'


def _caption(answer: Answer, turn: Turn, i: int) -> str:
    """What the pictures of a turn are, by their sizes."""
    words, image = [], answer.image
    places = boxes(image, answer.crops) if i and image is not None else []
    for j, shown in enumerate(turn.images):
        if j < len(places) and shown.size == (places[j][2] - places[j][0], places[j][3] - places[j][1]):
            name = answer.crops[j]
        elif image is not None and shown.size == image.size:
            name = "the full image"
        elif image is not None and shown.size == half_size(*image.size):
            name = "half-size view"
        else:
            name = "a picture"
        words.append(f"{name}, {shown.width}×{shown.height}")
    return "; ".join(words) or "no picture"


def _costs(answer: Answer) -> str:
    """Tokens and milliseconds of each turn and of all, a column each, as a table."""
    if not answer.replies:
        return ""
    usages = [reply.usage for reply in answer.replies]
    columns = [(f"turn {i + 1}", usage) for i, usage in enumerate(usages)]
    columns += [("all", sum(usages[1:], usages[0]))] if len(usages) > 1 else []
    rows = [("visual tokens", [f"{u.prefill:g}" for _, u in columns])]
    rows += [("text tokens", [str(u.text) for _, u in columns]), ("output tokens", [str(u.output) for _, u in columns])]
    rows += [(f"{phase} ms", [f"{1000 * getattr(u, phase + '_seconds'):.1f}" for _, u in columns]) for phase in PHASES]
    if any(u.aux_seconds for u in usages):
        rows.append(("auxiliary ms", [f"{1000 * u.aux_seconds:.1f}" for _, u in columns]))
    top = "".join(f"<th>{name}</th>" for name, _ in [("", None), *columns])
    lines = "".join(f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows)
    return f"<table><tr>{top}</tr>{lines}</table>"


def _tag(text: str, kind: str = "") -> str:
    return f'<span class="tag {kind}">{_text(text)}</span>'


def _text(text: str) -> str:
    """Escaped; half a character (a lone surrogate), which no page can hold, as its number."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode())


def boxes(image: Image.Image, names: tuple[str, ...]) -> list[Box]:
    """The pixel boxes of named regions; none when a name is not of the paper's grid."""
    known = {*PAPER_GRID.names, "all"}
    return PAPER_GRID.boxes(*image.size, names) if names and set(names) <= known else []


def outlined(image: Image.Image, places: list[Box]) -> Image.Image:
    """A copy with the boxes drawn, small pictures enlarged, large ones reduced."""
    copy = scaled(image, max(1.0, 224 / max(image.size)), 672)
    factor = copy.width / image.width
    draw = ImageDraw.Draw(copy)
    for i, box in enumerate(places):
        left, top, right, bottom = (round(v * factor) for v in box)
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)),
            outline=COLOURS[i % len(COLOURS)],
            width=max(3, copy.width // 120),
        )
    return copy


def kept_figures(images: Sequence[Image.Image | None], kept: Sequence[KeptTokens]) -> str:
    """What a pruner left of a turn's pictures, a figure for each picture and cut; numbers alone where the picture is in tiles or not known."""
    parts = []
    for cut in kept:
        image = images[cut.image] if cut.image < len(images) and cut.runs == 1 else None
        words = kept_words(cut, several=len(images) > 1)
        overlay = None if image is None else kept_overlay(image, cut)
        drawn, width = ("", "") if overlay is None else (image_tag(overlay), f' style="width:{max(160, overlay.width + 2)}px"')
        parts.append(f'<span class="kept"{width}>{drawn}<small>{_text(words)}</small></span>')
    return "".join(parts)


def kept_words(cut: KeptTokens, several: bool = False) -> str:
    """A cut in words. several: say which picture it is of."""
    place = "before the decoder" if cut.layer is None else f"after decoder layer {cut.layer + 1}"
    which = [f"picture {cut.image + 1}"] if several else []
    which += [f"tile {cut.run + 1} of {cut.runs}"] if cut.runs > 1 else []
    count = f"{len(cut.kept)} of {cut.grid[0] * cut.grid[1]} tokens go on {place}"
    averages = f"{len(cut.merged)} of them averages (dotted)" if cut.merged else ""
    return ", ".join([*which, count, *([averages] if averages else [])])


def kept_overlay(image: Image.Image, cut: KeptTokens) -> Image.Image:
    """A picture with the tokens that went on clear, the others dimmed, and a dot on each that is an average of several.

    The grid covers the picture; where the processor lays a very long one on a larger white sheet, that sheet.
    """
    sheet = image.convert("RGB")
    if cut.size != image.size:
        sheet = Image.new("RGB", cut.size, "white")
        sheet.paste(image, (0, 0))
    sheet = enlarged(sheet)
    rows, columns = cut.grid
    clear = Image.new("L", (columns, rows))
    for place in cut.kept:
        clear.putpixel((place % columns, place // columns), 255)
    dimmed = Image.blend(sheet.convert("L").convert("RGB"), Image.new("RGB", sheet.size, DIMMED), 0.72)
    drawn = Image.composite(sheet, dimmed, clear.resize(sheet.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(drawn)
    width, height = sheet.width / columns, sheet.height / rows
    radius = max(1.0, min(width, height) / 6)
    for place in cut.merged:
        x, y = (place % columns + 0.5) * width, (place // columns + 0.5) * height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=AVERAGE, outline="white")
    return drawn


def enlarged(image: Image.Image) -> Image.Image:
    """At least 224 pixels on the longer side and at most 448."""
    return scaled(image, max(1.0, 224 / max(image.size)))


def scaled(image: Image.Image, factor: float, limit: int = 448) -> Image.Image:
    """Enlarged or reduced by ``factor``, the longer side at most ``limit`` pixels."""
    factor = min(factor, limit / max(image.size))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def image_tag(image: Image.Image) -> str:
    """An ``img`` that holds its picture."""
    image = scaled(image, 1, 672) if max(image.size) > 672 else image
    data = io.BytesIO()
    image.save(data, "WEBP", quality=90)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img width="{image.width}" height="{image.height}" alt="" src="data:image/webp;base64,{encoded}">'
