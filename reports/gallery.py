"""A page of trajectories: the question, the half-size view, what the model asked for, what it got, what it said, what it cost."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable

import pandas as pd
from PIL import Image, ImageDraw

from awares_bench.crops import PAPER_GRID
from awares_bench.images import half

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem} article{border:1px solid #d8dee4;border-radius:8px;margin:1.2rem 0;padding:1rem}
header{display:flex;gap:.6rem;align-items:baseline;flex-wrap:wrap} header b{font-size:1.02rem}
.tag{font-size:.8rem;border-radius:4px;padding:.05rem .45rem;background:#eef1f4}
.right{background:#d9f2e3;color:#0b5a2e}.wrong{background:#fde2e1;color:#8c1d18}
.turns{display:flex;gap:1.4rem;flex-wrap:wrap;margin-top:.8rem} .turn{max-width:31rem}
img{image-rendering:pixelated;border:1px solid #d8dee4;vertical-align:top;margin:0 .3rem .3rem 0}
code{background:#f3f4f6;padding:.1rem .35rem;border-radius:4px;white-space:pre-wrap} small{color:#57606a}
pre{white-space:pre-wrap;background:#f6f8fa;padding:.5rem;border-radius:6px;margin:.4rem 0}
"""
COLOURS = ("#d6336c", "#1971c2", "#e8590c", "#2f9e44")


def choose(frame: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """A dozen rows of all kinds: about five called and right, four direct and right, three wrong, tasks in turn."""
    right = frame["score"] > 0.5
    kinds = [
        (frame["called"] & right, 5),
        (~frame["called"] & right, 4),
        (frame["called"] & ~right, 2),
        (~frame["called"] & ~right, 1),
    ]
    picked: list[int] = []
    for chosen, share in [*kinds, (right | ~right, 12)]:
        pool = frame[chosen].drop(index=[i for i in picked if chosen[i]])
        in_turn = pool.assign(turn=pool.groupby("task").cumcount()).sort_values("turn", kind="stable").index
        picked += list(in_turn[: min(round(share * count / 12), count - len(picked))])
    return frame.loc[picked]


def page(frame: pd.DataFrame, image_of: Callable[[str, int], Image.Image], title: str) -> str:
    """Rows of ``load`` -> a self-contained HTML page. image_of: (task, doc_id) -> the document's full-size image."""
    articles = "\n".join(_article(row, image_of(row["task"], row["doc_id"])) for row in frame.to_dict("records"))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{articles}</body></html>"


def _article(row: dict, image: Image.Image) -> str:
    names = tuple(n for n in row["crops"].split(",") if n)
    right = row["score"] > 0.5
    turns = []
    for i, (reply, usage) in enumerate(zip(row["replies"], row["usage"], strict=True)):
        if i:
            shown, caption = [_scaled(c, 0.9) for c in PAPER_GRID.cut(image, names)], f"crops: {', '.join(names)}"
        elif usage["encoded"] < row["full_tokens"] or len(row["replies"]) > 1:
            shown, caption = [_scaled(half(image), 2)], "half-size view, enlarged twice"
        else:
            shown, caption = [image], "full resolution"
        seconds = sum(v for k, v in usage.items() if k.endswith("_seconds"))
        turns.append(
            f'<div class="turn"><small>turn {i + 1}: {caption}</small><br>{"".join(map(_img, shown))}'
            f"<br>model: <code>{html.escape(reply) or '&nbsp;'}</code><br>"
            f"<small>{usage['prefill']:g} visual, {usage['text']} text, {usage['output']} output tokens; {1000 * seconds:.0f} ms</small></div>"
        )
    if names:
        turns.insert(
            1, f'<div class="turn"><small>where it looked, on the full image</small><br>{_img(_outlined(image, names))}</div>'
        )
    events = "".join(f"<br><small>event: {html.escape(e['kind'])} — {html.escape(e['detail'])}</small>" for e in row["events"])
    ratio = "no image" if row["rtr"] is None else f"RTR {row['rtr']:.2f}"
    return (
        f"<article><header><b>{html.escape(row['task'])} · document {row['doc_id']}</b>"
        f'<span class="tag {"right" if right else "wrong"}">{"right" if right else "wrong"}</span>'
        f'<span class="tag">{ratio}</span><span class="tag">{"called" if names else "answered directly"}</span></header>'
        f"<pre>{html.escape(row['question'])}</pre>answer: <code>{html.escape(row['answer'])}</code>{events}"
        f'<div class="turns">{"".join(turns)}</div></article>'
    )


def _outlined(image: Image.Image, names: tuple[str, ...]) -> Image.Image:
    copy = image.convert("RGB")
    draw = ImageDraw.Draw(copy)
    for i, (left, top, right, bottom) in enumerate(PAPER_GRID.boxes(*image.size, names)):
        draw.rectangle((left, top, right - 1, bottom - 1), outline=COLOURS[i % len(COLOURS)], width=max(3, image.width // 120))
    return copy


def _scaled(image: Image.Image, factor: float, limit: int = 448) -> Image.Image:
    factor = min(factor, limit / max(image.size))
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.NEAREST)


def _img(image: Image.Image) -> str:
    image = _scaled(image, 1) if max(image.size) > 448 else image
    data = io.BytesIO()
    image.save(data, "WEBP", quality=90)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img width="{image.width}" height="{image.height}" alt="" src="data:image/webp;base64,{encoded}">'
