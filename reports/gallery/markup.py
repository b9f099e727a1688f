"""A page of trajectories: the question, what the model saw in each turn, what it asked for and said, what it cost. Works from disk."""

from __future__ import annotations

import html
from dataclasses import dataclass

import pandas as pd
from PIL import Image

from awares_bench.card import boxes, image_tag, kept_figures, outlined, scaled
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.methods.kept_tokens import KeptTokens

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.3rem} article{border:1px solid #d8dee4;border-radius:8px;margin:1.2rem 0;padding:1rem}
form{position:sticky;top:0;background:#fff;padding:.6rem 0;border-bottom:1px solid #d8dee4;display:flex;gap:1rem;align-items:center;flex-wrap:wrap;z-index:1}
select{font:inherit} [hidden]{display:none!important}
header{display:flex;gap:.6rem;align-items:baseline;flex-wrap:wrap} section{border-top:1px solid #eef1f4;margin-top:.8rem;padding-top:.6rem}
.tag{font-size:.8rem;border-radius:4px;padding:.05rem .45rem;background:#eef1f4}
.right{background:#d9f2e3;color:#0b5a2e}.wrong{background:#fde2e1;color:#8c1d18}.event{background:#fff1d6;color:#7a4b00}
.turns{display:flex;gap:1.4rem;flex-wrap:wrap;margin-top:.8rem} .turn{max-width:31rem} .turn:has(.kept){max-width:62rem} .kept{display:inline-flex;flex-direction:column;max-width:100%;margin:0 .6rem .3rem 0;vertical-align:top}
img{image-rendering:pixelated;border:1px solid #d8dee4;vertical-align:top;margin:0 .3rem .3rem 0;max-width:100%;height:auto}
code{background:#f3f4f6;padding:.1rem .35rem;border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere} small{color:#57606a}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.5rem;border-radius:6px;margin:.4rem 0;max-height:16rem;overflow:auto}
@media (prefers-color-scheme:dark){:root{color-scheme:dark} body,form{color:#e3e7ec;background:#14171b} article,form,section,img{border-color:#30363d}
code,pre,.tag{background:#262c33;color:#e3e7ec} small{color:#9aa4af} .right{background:#12361f;color:#a9e2bd}.wrong{background:#46191a;color:#ffb9b4}.event{background:#3a2c0b;color:#ffd88a}}
"""
SCRIPT = """
const form = document.forms[0], names = ['task', 'right', 'outcome', 'called'].filter(k => form[k]), cards = [...document.querySelectorAll('article')];
function show() {
  let n = 0;
  for (const c of cards) {
    const keep = names.every(k => !form[k].value || c.dataset[k] === form[k].value);
    c.hidden = !keep; n += keep;
  }
  document.getElementById('count').textContent = n + ' of ' + cards.length + ' shown';
}
for (const [k, v] of new URLSearchParams(location.hash.slice(1))) if (names.includes(k)) form[k].value = v;
form.addEventListener('change', show); show();
"""


OUTCOMES = {
    "lost": "the first is wrong, the second right",
    "won": "the first is right, the second wrong",
    "both right": "both right",
    "both wrong": "both wrong",
}
"""Of two runs on a document, in words."""


@dataclass(frozen=True)
class Side:
    """One method's exchange on a document."""

    name: str
    """The run's."""
    row: dict
    """The columns of ``load.load``."""
    texts: dict
    """question, target, replies, usage (a dict per turn), image_sizes (a list per turn), events; models where an endpoint names them;
    keep_masks where the run kept them."""


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
    for is_kind, share in [*kinds, (right | ~right, 12)]:  # the last fills up from all
        pool = frame[is_kind].drop(index=[i for i in picked if is_kind[i]])
        in_turn = pool.assign(turn=pool.groupby("task", observed=True).cumcount()).sort_values("turn", kind="stable").index
        picked += list(in_turn[: min(round(share * count / 12), count - len(picked))])
    return frame.loc[picked]


def page(cards: list[str], title: str) -> str:
    """``card``s -> a self-contained HTML page with filters by task, correctness, calls and, of two runs, who wins.

    An address may set them: ``gallery.html#task=nano_doc&outcome=lost``.
    """
    tasks = sorted({c.split('data-task="', 1)[1].split('"', 1)[0] for c in cards})
    choices = {"task": tasks, "right": ["right", "wrong", "differs"], "called": ["called", "direct"]}
    if any('data-outcome="' in c for c in cards):
        del choices["right"]
        choices["outcome"] = list(OUTCOMES)
    selects = "".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        f"{''.join(f'<option value={chr(34)}{v}{chr(34)}>{OUTCOMES.get(v, v)}</option>' for v in values)}</select></label>"
        for name, values in choices.items()
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = (
        f'<h1>{html.escape(title)}</h1><form>{selects}<small id="count"></small></form>{"".join(cards)}<script>{SCRIPT}</script>'
    )
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def card(image: Image.Image, sides: list[Side]) -> str:
    """A document and what one or two methods did with it -> an HTML article."""
    row, texts = sides[0].row, sides[0].texts
    verdicts = {s.row["score"] > 0.5 for s in sides}
    right = "differs" if len(verdicts) > 1 else ("right" if True in verdicts else "wrong")
    first, last = sides[0].row["score"] > 0.5, sides[-1].row["score"] > 0.5
    outcome = ("won" if first else "lost") if first != last else ("both right" if first else "both wrong")
    compared = f' data-outcome="{outcome}"' if len(sides) > 1 else ""
    called = "called" if any(s.row["called"] for s in sides) else "direct"
    target = texts["target"] if isinstance(texts["target"], str) else str(texts["target"])
    return (
        f'<article data-task="{html.escape(row["task"])}" data-right="{right}" data-called="{called}"{compared}>'
        f"<header><b>{html.escape(row['task'])} · document {row['doc_id']}</b><small>{image.width}×{image.height} pixels</small></header>"
        f"<pre>{html.escape(texts['question'])}</pre>expected: <code>{html.escape(target)}</code>"
        f"{''.join(_side(image, s, named=len(sides) > 1) for s in sides)}</article>\n"
    )


def _side(image: Image.Image, side: Side, named: bool) -> str:
    row, texts = side.row, side.texts
    names = tuple(n for n in row["crops"].split(",") if n)
    right = row["score"] > 0.5
    ratio = "tokens not known" if row["rtr"] is None or row["rtr"] != row["rtr"] else f"RTR {row['rtr']:.2f}"
    tags = [f'<span class="tag {"right" if right else "wrong"}">{"right" if right else "wrong"} ({row["score"]:g})</span>']
    tags += [
        f'<span class="tag">{ratio}</span>',
        f'<span class="tag">{"called" if row["called"] else "answered directly"}</span>',
    ]
    tags += [f'<span class="tag">box: {",".join(map(str, box))}</span>' for box in texts.get("boxes") or []]
    tags += [f'<span class="tag event">{html.escape(e["kind"])}: {html.escape(e["detail"])}</span>' for e in texts["events"]]
    turns = [_turn(image, i, side, names) for i in range(len(texts["replies"]))]
    places = boxes(image, names)
    if places:
        turns.insert(
            1,
            f'<div class="turn"><small>where it looked, on the full image</small><br>{image_tag(outlined(image, places))}</div>',
        )
    answer = f"answer: <code>{html.escape(str(row['answer']))}</code>"
    name = f"<b>{html.escape(side.name)}</b>" if named else ""
    return f'<section><header>{name}{"".join(tags)}</header>{answer}<div class="turns">{"".join(turns)}</div></section>'


def _turn(image: Image.Image, i: int, side: Side, names: tuple[str, ...]) -> str:
    texts = side.texts
    usage = texts["usage"][i] if i < len(texts["usage"]) else None
    answers = texts.get("models") or []
    who = f", {html.escape(answers[i])}" if i < len(answers) and answers[i] else ""
    seen, caption = _seen(image, i, side, names)
    pictures = [scaled(p, 2) if p.size == half(image).size != image.size else p for p in seen if p is not None]
    masks = texts.get("keep_masks") or []
    cuts = [KeptTokens.from_dict(told) for told in (masks[i] if i < len(masks) else [])]
    if usage is None:
        spent = "tokens not known"
    else:
        seconds = sum(v for k, v in usage.items() if k.endswith("_seconds") and isinstance(v, (int, float)))
        spent = f"{usage.get('prefill', 0):g} visual, {usage.get('text', 0)} text, {usage.get('output', 0)} output tokens; {1000 * seconds:.0f} ms"
    return (
        f'<div class="turn"><small>turn {i + 1}{who}: {html.escape(caption)}</small><br>{"".join(map(image_tag, pictures))}{kept_figures(seen, cuts)}'
        f"<br>model: <code>{html.escape(texts['replies'][i]) or '&nbsp;'}</code><br><small>{spent}</small></div>"
    )


def _seen(image: Image.Image, i: int, side: Side, names: tuple[str, ...]) -> tuple[list[Image.Image | None], str]:
    """What a turn showed, put together again from the recorded sizes; one that cannot be is None, and the caption says so."""
    sizes = (side.texts["image_sizes"] or [])[i : i + 1]
    if not sizes:
        return (
            ([image], "the document's picture; what was shown is not recorded")
            if i == 0
            else ([], "what was shown is not recorded")
        )
    crops = PAPER_GRID.cut(image, names) if boxes(image, names) else []
    pictures: list[Image.Image | None] = []
    words = []
    for j, size in enumerate(tuple(s) for s in sizes[0]):
        if i and j < len(crops) and crops[j].size == size:
            blank = side.row.get("family") == "blank_crop"
            pictures.append(Image.new("RGB", size, (127, 127, 127)) if blank else crops[j])
            words.append(f"{names[j]}{' replaced by grey' if blank else ''}")
        elif size == image.size:
            pictures.append(image)
            words.append("the full image")
        elif size == half(image).size:
            pictures.append(half(image))
            words.append("half-size view, enlarged")
        elif i == 0 and abs(size[0] / size[1] - image.width / image.height) < 0.03:
            pictures.append(image.resize(size, Image.Resampling.LANCZOS))
            words.append(f"the image at {size[0]}×{size[1]}")
        else:
            pictures.append(None)
            words.append(f"a picture of {size[0]}×{size[1]} whose place is not recorded")
    return pictures, ", ".join(words) or "no picture"
