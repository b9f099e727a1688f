"""One page that shows a whole report offline: tables, figures with links to their files, caveats."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from .tables import render
from .tables.table import Table

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem} h2{font-size:1.1rem;margin-top:2.2rem} nav a{margin-right:1rem}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e6e8eb} thead tr:first-child:not(:last-child) th{text-align:center} thead tr:last-child th{border-bottom:1.5px solid #1b1f24}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff} tbody tr:hover td{background:#f6f8fa}
figure{display:inline-block;vertical-align:top;margin:0 1.5rem 1.5rem 0} figure img{width:30rem;max-width:100%}
figcaption,small{color:#57606a;font-size:13px} .notes{background:#fff8e6;border-left:3px solid #de8f05;padding:.5rem 1rem;font-size:14px}
"""


def write(out: Path, tables: list[Table], figures: list[str], skipped: list[str], notes: list[str]) -> None:
    """``out/index.html`` with every table and, inside the page itself, every figure that has an svg or png file in ``out``."""
    title = tables[0].title
    parts = [f"<h1>{html.escape(title.split(': ')[-1])}</h1>", '<nav><a href="#figures">figures</a>']
    parts += [f'<a href="#{t.name}">{html.escape(t.name)}</a>' for t in tables]
    parts.append('<a href="gallery.html">gallery</a></nav>' if (out / "gallery.html").exists() else "</nav>")
    if notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>")
    parts.append(_table(tables[0]))
    parts.append('<h2 id="figures">Figures</h2>' + "".join(_figure(out, name) for name in figures))
    if skipped:
        names = ", ".join(n.replace("_", " ") for n in skipped)
        parts.append(f"<p><small>Not drawn, because these runs do not hold what they show: {html.escape(names)}.</small></p>")
    parts += [_table(t) for t in tables[1:]]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    (out / "index.html").write_text(
        f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n", encoding="utf-8"
    )


def _table(table: Table) -> str:
    notes = "".join(f"<small>{html.escape(n)}</small><br>" for n in table.notes)
    links = " · ".join(f'<a href="{table.name}.{kind}">{kind}</a>' for kind in ("csv", "md", "tex"))
    return f'<h2 id="{table.name}">{html.escape(table.title)}</h2><div class="scroll">{render.to_html(table.printed)}</div>{notes}<small>{links}</small>'


def _figure(out: Path, name: str) -> str:
    files = [p for kind in ("svg", "png", "pdf", "csv") if (p := out / f"{name}.{kind}").exists()]
    picture = next((p for p in files if p.suffix in (".svg", ".png")), None)
    kind = {".svg": "image/svg+xml", ".png": "image/png"}
    embedded = ""
    if picture:
        data = base64.b64encode(picture.read_bytes()).decode()
        embedded = f'<img alt="{html.escape(name.replace("_", " "))}" src="data:{kind[picture.suffix]};base64,{data}"><br>'
    links = " · ".join(f'<a href="{p.name}">{p.suffix[1:]}</a>' for p in files)
    return f"<figure>{embedded}<figcaption>{html.escape(name.replace('_', ' '))}: {links}</figcaption></figure>"
