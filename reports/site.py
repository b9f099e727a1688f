"""``awares-bench report --site OUT``: a leaderboard of runs and published numbers, each row with where it comes from. Works from disk.

    OUT/index.html         every run and every published mean; filtered by host, suite, limits and budget
    OUT/provenance.html    for each run what was run, with what, where

Runs on other documents or limits stand in one table here, unlike in a report, because a reader filters them; no difference is taken.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from . import page
from .data import discover, names, published, stats
from .data.compact import portable
from .data.load import ReportError, Run
from .data.summary import summary
from .tables.table import DASH, number, percent, span

COMMITTED = Path(__file__).parent / "published"
"""Folders with ``records``, in a checkout."""

BUDGETS = (
    (0.26, "at most 0.25"),
    (0.51, "0.26 to 0.50"),
    (0.76, "0.51 to 0.75"),
    (1.005, "0.76 to 1.00"),
    (float("inf"), "above 1"),
)
"""Upper ends of the retained token ratio, with room for rounding, and their words."""

UNSAID = "not said"
"""For what a source leaves out."""

CHOICES = ("host", "suite", "limits", "budget", "kind")


def write(paths: Sequence[str | Path], out: Path, metrics: dict[str, str] | None = None) -> Path:
    """Runs (see ``discover.runs``), or the committed ones where none is named -> the page. Raises ReportError."""
    groups = [[p] for p in paths] or [[p.parent] for p in sorted(COMMITTED.glob("*/records/runs.json"))]
    if not groups:
        raise ReportError(
            "no committed records are at hand, which only a checkout has; name folders of runs: report RUNS --site OUT"
        )
    rows, parts, said = [], [], []
    for group in groups:
        runs, left_out = discover.runs(group, metrics, leave_out_partial=True)
        said += left_out
        if runs:
            origin = Path(str(group[0])).parent.name if Path(str(group[0])).name == "records" else Path(str(group[0])).name
            found, told = _ours(runs, origin)
            rows += found
            parts += told
    rows += _published()
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows).fillna(DASH)
    notes = "".join(f"<li>{html.escape(s)}</li>" for s in dict.fromkeys([*said, *_caveats(rows)]))
    body = (
        "<h1>awares-bench: runs and published numbers</h1>"
        f'<ul class="notes">{notes}</ul>{page.interactive(table, escape=False, choices=CHOICES)}'
        "<small>acc: accuracy in percent, mean over the tasks of the suite, with its 95 % bootstrap interval over documents. RTR: retained "
        "token ratio, visual tokens fed to the decoder over those at full resolution, all turns. Click a column to sort.</small>"
    )
    (out / "index.html").write_text(page.whole("awares-bench: runs and published numbers", body), encoding="utf-8")
    whole = page.whole("Where the numbers come from", f"<h1>Where the numbers come from</h1>{''.join(parts)}")
    (out / "provenance.html").write_text(whole, encoding="utf-8")
    return out / "index.html"


def _ours(runs: list[Run], origin: str) -> tuple[list[dict], list[str]]:
    """Runs of one place -> their rows, and what is known of each as HTML. origin: the place, in a word."""
    frame = discover.together(runs)
    summaries, suite = summary(frame), names.suite(frame).replace(" documents each", " each")
    means = stats.intervals(frame).query("task == 'mean'").set_index("method")
    labels = frame.drop_duplicates("method").set_index("method")["label"]
    rows, parts = [], []
    for run in runs:
        cell, identity = summaries[run.name]["mean"], run.about.get("identity") or {}
        place = f"{origin}/{run.name}"
        limits = f"{identity['min_pixels']:,} to {identity['max_pixels']:,} px" if identity.get("max_pixels") else "not known"
        row = {"method": html.escape(str(labels[run.name])), "acc": number(percent(cell["accuracy"]), 1)}
        row |= {
            "95 %": span(percent(means.at[run.name, "low"]), percent(means.at[run.name, "high"])),
            "RTR": number(cell["rtr"], 3),
        }
        row |= {
            "host": html.escape(_host(identity)),
            "suite": html.escape(suite),
            "limits": limits,
            "budget": _budget(cell["rtr"]),
        }
        row |= {"kind": "run here", "from": f'<a href="provenance.html#{quote(place)}">{html.escape(place)}</a>'}
        rows.append(row)
        told = portable({k: v for k, v in run.about.items() if k not in ("model_config", "left_out")})
        text = json.dumps(told, indent=1, ensure_ascii=False)
        parts.append(f'<h2 id="{html.escape(quote(place))}">{html.escape(place)}</h2><pre>{html.escape(text)}</pre>')
    return rows, parts


def _host(identity: dict) -> str:
    """The model that answered: a checkpoint by its last word, on a server by its name there."""
    name = str(identity.get("served") or identity.get("pretrained") or "not known").rstrip("/").rsplit("/", 1)[-1]
    return "nano" if name.startswith("nano") else name


def _published() -> list[dict]:
    """The published means with both accuracy and ratio, a row for each source, method and setting."""
    cells = published.numbers()
    cells = cells[(cells["task"] == "mean") & cells["quantity"].isin(("accuracy", "rtr"))].fillna({"retention": -1.0})
    rows = []
    for (source, method, retention, variant), own in cells.groupby(["source", "method", "retention", "variant"], sort=False):
        values, doubts = own.set_index("quantity")["value"], [d for d in own["doubt"].astype(str) if d]
        if not {"accuracy", "rtr"} <= set(values.index):
            continue
        label = names.label(str(method), {"method": method, "fields": {"retention": retention} if retention > 0 else {}})
        label += f", {str(variant).replace('_', ' ')}" if variant else ""
        told = {c: str(own[c].iloc[0]) for c in ("host", "limits")}
        title = f' title="{html.escape("; ".join(doubts))}"' if doubts else ""
        row = {
            "method": f"<span{title}>{html.escape(label)}{' †' if doubts else ''}</span>",
            "acc": number(values["accuracy"], 1),
            "95 %": DASH,
        }
        row |= {
            "RTR": number(values["rtr"], 2),
            "host": html.escape(told["host"] or UNSAID),
            "suite": "the paper's six tasks",
        }
        row |= {
            "limits": html.escape(told["limits"] or UNSAID),
            "budget": _budget(values["rtr"]),
            "kind": "published",
        }
        rows.append(row | {"from": _source(str(source))})
    return rows


def _source(source: str) -> str:
    """A source, linked where it names an arXiv number."""
    found = re.search(r"arXiv[ :]([0-9]{4}\.[0-9]{5})", source)
    text = html.escape(source)
    return f'<a href="https://arxiv.org/abs/{found[1]}">{text}</a>' if found else text


def _budget(rtr: float | None) -> str:
    """In which range of token ratios a row lies."""
    return "not known" if rtr is None or rtr != rtr else next(word for end, word in BUDGETS if rtr < end)


def _caveats(rows: list[dict]) -> list[str]:
    notes = ["Rows of different suites, hosts or limits are not comparable: filter first."]
    if any("nano" in str(row["suite"]) for row in rows):
        notes.append(f"{names.NANO[0].upper()}{names.NANO[1:]}.")
    if any("†" in str(row["method"]) for row in rows):
        notes.append("† the published number is doubted; hold the pointer over the name to read why.")
    return notes
