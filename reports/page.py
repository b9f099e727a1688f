"""One page that shows a whole report offline: tables whose columns fold and whose rows can be filtered and sorted, figures, caveats."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from .tables.table import Table

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#57606a;--line:#e1e4e8;--hover:#f6f8fa;--chip:#eef1f4;--note:#fff8e6;--edge:#de8f05;--link:#0969da}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e3e7ec;--soft:#9aa4af;--line:#30363d;--hover:#1d2228;--chip:#262c33;--note:#2b2412;--edge:#b87a12;--link:#6cb6ff}
figure img{filter:brightness(.9)}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:var(--ink);background:var(--page)}
a{color:var(--link)} h1{font-size:1.4rem} h2{font-size:1.1rem;margin-top:2.2rem} nav a{margin-right:1rem}
.scroll{overflow-x:auto;max-height:44rem;overflow-y:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:separate;border-spacing:0;font-size:13px;font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px} th,td{padding:.22rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);background:var(--page)}
td.words{white-space:normal;min-width:9rem;text-align:left}
thead th{position:sticky;top:0;z-index:1} thead tr:nth-child(2) th{top:1.65rem;cursor:pointer} thead tr:only-child th{cursor:pointer}
thead tr:first-child:not(:last-child) th{text-align:center} thead tr:last-child th{border-bottom:1.5px solid var(--ink)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;z-index:1} thead th:first-child{z-index:2}
tbody tr:hover td{background:var(--hover)} [hidden]{display:none!important}
.tools{display:flex;flex-wrap:wrap;gap:.4rem .9rem;align-items:center;margin:.4rem 0;font-size:13px;color:var(--soft)}
.tools input[type=search]{font:inherit;padding:.15rem .5rem;border:1px solid var(--line);border-radius:4px;background:var(--page);color:var(--ink);min-width:15rem}
.tools select{font:inherit;background:var(--page);color:var(--ink);max-width:16rem} .tools label{background:var(--chip);border-radius:4px;padding:.05rem .45rem;color:var(--ink);cursor:pointer}
.figures{columns:2;column-gap:1.4rem} .figures.wide{columns:1} figure{break-inside:avoid;margin:0 0 1.4rem}
figure img{width:100%;background:#fff;border:1px solid var(--line);border-radius:6px;box-sizing:border-box;padding:.4rem}
summary{cursor:pointer} details{font-size:14px;margin:.6rem 0} figcaption,small{color:var(--soft);font-size:13px} .notes{background:var(--note);border-left:3px solid var(--edge);padding:.5rem 1rem .5rem 2rem;font-size:14px}
@media (max-width:46rem){.figures{columns:1}}
"""

SCRIPT = """
for (const box of document.querySelectorAll('section.table')) {
  const rows = [...box.querySelectorAll('tbody tr')], search = box.querySelector('input[type=search]'), count = box.querySelector('.count');
  const choices = [...box.querySelectorAll('select[data-column]')];
  const show = () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let n = 0;
    for (const r of rows) {
      const keep = words.every(w => r.textContent.toLowerCase().includes(w)) && choices.every(c => !c.value || r.children[c.dataset.column].textContent === c.value);
      r.hidden = !keep; n += keep;
    }
    count.textContent = n + ' of ' + rows.length + ' rows';
  };
  if (search) { [search, ...choices].forEach(c => c.addEventListener('input', show)); show(); }
  for (const fold of box.querySelectorAll('input[data-group]')) {
    const set = () => { for (const c of box.querySelectorAll('[data-in="' + fold.dataset.group + '"]')) c.hidden = !fold.checked; };
    fold.addEventListener('change', set); set();
  }
  const heads = [...box.querySelectorAll('thead tr:last-child th')];
  heads.forEach((h, i) => h.addEventListener('click', () => {
    const value = r => { const t = r.children[i].textContent.replace('\\u2212', '-').replaceAll(',', ''); const n = parseFloat(t.replace('<', '')); return isNaN(n) ? t : n; };
    const up = h.dataset.up = h.dataset.up === '1' ? '' : '1';
    const order = [...rows].sort((a, b) => { const x = value(a), y = value(b); return (typeof x === typeof y ? (x < y ? -1 : x > y) : typeof x === 'number' ? -1 : 1) * (up ? 1 : -1); });
    order.forEach(r => r.parentNode.append(r));
  }));
}
"""

WIDE = ("learning_curves",)
"""Figures of two columns' width."""

FITS = 12
"""Columns that a page shows side by side; of wider tables the groups of tasks are folded at first."""


def write(
    out: Path,
    tables: list[Table],
    figures: Mapping[str, str],
    skipped: list[str],
    notes: list[str],
    unsure: list[str] | None = None,
    pairs: str = "",
    tasks: tuple[str, ...] = (),
) -> None:
    """``out/index.html`` with every table and, inside the page itself, every figure that has an svg or png file in ``out``.

    figures: name -> a sentence on how to read it. skipped: names of figures that these runs do not hold. notes: caveats of all that is
    shown. unsure: sentences on differences that the documents cannot show, folded. pairs: HTML of where runs
    differ, with links into galleries. tasks: column groups that may be folded at first, by their names in print.
    """
    title = tables[0].title
    parts = [f"<h1>{html.escape(title.split(': ')[-1])}</h1>", '<nav><a href="#figures">figures</a>']
    parts += [f'<a href="#{t.name}">{html.escape(t.name)}</a>' for t in tables]
    parts.append('<a href="#pairs">documents</a>' if pairs else "")
    parts.append('<a href="gallery.html">gallery</a></nav>' if (out / "gallery.html").exists() else "</nav>")
    if notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>")
    if unsure:
        told = "".join(f"<li>{html.escape(n)}</li>" for n in unsure)
        parts.append(
            f"<details><summary>{len(unsure)} differences that these documents cannot show</summary><ul>{told}</ul></details>"
        )
    parts.append(_table(tables[0], tasks))
    narrow = [_figure(out, name, reading) for name, reading in figures.items() if name not in WIDE]
    wide = [_figure(out, name, reading) for name, reading in figures.items() if name in WIDE]
    parts.append(f'<h2 id="figures">Figures</h2><div class="figures">{"".join(narrow)}</div>')
    parts.append(f'<div class="figures wide">{"".join(wide)}</div>' if wide else "")
    if skipped:
        names = ", ".join(n.replace("_", " ") for n in skipped)
        parts.append(f"<p><small>Not drawn, because these runs do not hold what they show: {html.escape(names)}.</small></p>")
    parts.append(pairs)
    parts += [_table(t, tasks) for t in tables[1:]]
    (out / "index.html").write_text(whole(title, "".join(parts)), encoding="utf-8")


def whole(title: str, body: str) -> str:
    """A page that needs no other file and no network."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}<script>{SCRIPT}</script></body></html>\n"


def _table(table: Table, tasks: tuple[str, ...] = ()) -> str:
    notes = "".join(f"<small>{html.escape(n)}</small><br>" for n in table.notes)
    links = " · ".join(f'<a href="{table.name}.{kind}">{kind}</a>' for kind in ("csv", "md", "tex"))
    return (
        f'<h2 id="{table.name}">{html.escape(table.title)}</h2>{interactive(table.printed, tasks)}{notes}<small>{links}</small>'
    )


def interactive(printed: pd.DataFrame, tasks: tuple[str, ...] = (), escape: bool = True, choices: tuple[str, ...] = ()) -> str:
    """A frame of strings, columns named (group, column), as a table with a filter of rows and boxes that fold groups of columns.

    tasks: groups that are folded at first where the table is wider than ``FITS``. escape: False where cells are HTML.
    choices: columns that get a list of their values to choose from.
    """
    columns = [c if isinstance(c, tuple) else ("", str(c)) for c in printed.columns]
    groups = list(dict.fromkeys(g for g, _ in columns if g))
    folded = [g for g in groups if g in tasks] if len(columns) > FITS else []
    boxes = "".join(
        f'<label><input type="checkbox" data-group="{html.escape(g)}"{"" if g in folded else " checked"}> {html.escape(g)}</label>'
        for g in groups
    )
    fold = f"columns: {boxes}" if len(groups) > 1 else ""
    search = (
        '<input type="search" placeholder="filter rows, such as: awares 50" aria-label="filter rows"><span class="count"></span>'
    )
    lists = []
    for name in choices:
        (column,) = [i for i, (_, c) in enumerate(columns) if c == name]
        values = dict.fromkeys(str(v) for v in printed.iloc[:, column])
        items = "".join(f"<option>{html.escape(v)}</option>" for v in sorted(values))
        lists.append(
            f'<span>{html.escape(name)} <select data-column="{column}"><option value="">all</option>{items}</select></span>'
        )
    tools = f'<div class="tools">{search if len(printed) > 5 or choices else ""}{"".join(lists)}{fold}</div>'
    # A cell knows its group, so that a box can hide all of them; groups span their columns in a row of their own.
    inside = [f' data-in="{html.escape(g)}"' if g else "" for g, _ in columns]
    spans: list[tuple[str, int]] = []
    for group, _ in columns:
        spans = [*spans[:-1], (group, spans[-1][1] + 1)] if spans and spans[-1][0] == group else [*spans, (group, 1)]
    top = "".join(
        f'<th colspan="{n}"{f" data-in={chr(34)}{html.escape(g)}{chr(34)}" if g else ""}>{html.escape(g)}</th>' for g, n in spans
    )
    head = "".join(f"<th{mark}>{html.escape(c)}</th>" for mark, (_, c) in zip(inside, columns, strict=True))
    body = []
    for row in printed.itertuples(index=False):
        cells = []
        for i, (mark, value) in enumerate(zip(inside, row, strict=True)):
            text = html.escape(str(value)) if escape else str(value)
            cells.append(f"<td{mark}{' class=words' if i and escape and len(text) > 34 else ''}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    rows = f"<tr>{top}</tr>" if groups else ""
    return (
        f'<section class="table">{tools}<div class="scroll"><table><thead>{rows}<tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _figure(out: Path, name: str, reading: str) -> str:
    files = [p for kind in ("svg", "png", "pdf", "csv") if (p := out / f"{name}.{kind}").exists()]
    picture = next((p for p in files if p.suffix in (".svg", ".png")), None)
    kind = {".svg": "image/svg+xml", ".png": "image/png"}
    embedded = ""
    if picture:
        data = base64.b64encode(picture.read_bytes()).decode()
        embedded = f'<img alt="{html.escape(name.replace("_", " "))}" src="data:{kind[picture.suffix]};base64,{data}"><br>'
    links = " · ".join(f'<a href="{p.name}">{p.suffix[1:]}</a>' for p in files)
    return f"<figure>{embedded}<figcaption>{html.escape(reading)} {links}</figcaption></figure>"
