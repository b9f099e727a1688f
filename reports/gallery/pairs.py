"""Where two runs part: how many documents one loses and the other wins, task by task, and a gallery of them for each pair."""

from __future__ import annotations

import html
import re
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ..data import names
from ..data.load import Run
from ..data.summary import labels, reference, summary
from ..page import interactive
from . import select

MOST = 12
"""Runs that the first one is set beside."""


def chosen(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs of methods: AwaRes (or the first run) and of every other family the most accurate run."""
    first = reference(frame, "awares") or str(frame["method"].iloc[0])
    accuracy = {m: cells["mean"]["accuracy"] for m, cells in summary(frame).items()}
    best: dict[str, str] = {}
    own = frame.loc[frame["method"] == first, "family"].iloc[0]
    for row in frame.drop_duplicates("method").itertuples():
        if row.method == first or row.family == own or accuracy[row.method] is None:
            continue
        before = best.get(str(row.family))
        if before is None or accuracy[row.method] > accuracy[before]:
            best[str(row.family)] = str(row.method)
    return [(first, other) for other in list(best.values())[:MOST]]


def outcomes(frame: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Task -> number of documents that ``first`` loses and ``second`` wins (``lost``), the other way round (``won``), and both.

    A document is right where its score is above 0.5.
    """
    both = frame[frame["method"].isin([first, second])].astype({"method": str, "task": str})
    right = both.assign(right=both["score"] > 0.5).pivot(index=["task", "doc_id"], columns="method", values="right").dropna()
    a, b = right[first].astype(bool), right[second].astype(bool)
    tables = {"lost": ~a & b, "won": a & ~b, "both right": a & b, "both wrong": ~a & ~b}
    counts = pd.DataFrame({name: mask.groupby(level="task").sum() for name, mask in tables.items()})
    return counts.reindex([t for t in dict.fromkeys(both["task"])])


def write(runs: list[Run], frame: pd.DataFrame, out: Path, images: Path | None, count: int) -> dict[tuple[str, str], str]:
    """A gallery for each pair of ``chosen`` in ``out/gallery`` -> pair: its file, seen from ``out``.

    count: documents of a pair, those on which the two differ, tasks in turn. Raises ReportError where texts or pictures are missing.
    """
    by_name = {run.name: run for run in runs}
    pages = {}
    for first, second in chosen(frame):
        if not outcomes(frame, first, second)[["lost", "won"]].to_numpy().sum():
            continue  # they differ nowhere
        file = f"gallery/{_plain(first)}--{_plain(second)}.html"
        select.write(
            by_name[first], out / file, compare=by_name[second], images=images, choose=lambda rows: _in_turn(rows, count)
        )
        pages[first, second] = file
    return pages


def _in_turn(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first ``count``: of each task, lost and won, one after the other."""
    place = rows.groupby(["task", "correct"], observed=True).cumcount()
    return rows.loc[place.sort_values(kind="stable").index].head(count)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=_-]+", "_", name)


def section(frame: pd.DataFrame, pages: dict[tuple[str, str], str]) -> str:
    """The part of the report's page: for each pair and task how many documents are lost and won, linked into the galleries there are."""
    pairs = chosen(frame)
    if not pairs:
        return ""
    printed, name = [], labels(frame)
    first = pairs[0][0]
    for pair in pairs:
        counts, page = outcomes(frame, *pair), pages.get(pair)
        row = {("", "beside"): html.escape(name[pair[1]])}
        for task in [*counts.index, "all"]:
            told = counts.sum() if task == "all" else counts.loc[task]
            for kind in ("lost", "won"):
                where = f"outcome={kind}" + ("" if task == "all" else f"&task={quote(task)}")
                link = f'<a href="{quote(page)}#{where}">{told[kind]}</a>' if page and told[kind] else str(told[kind])
                row["all tasks" if task == "all" else names.task(task), kind] = link
        printed.append(row)
    table = pd.DataFrame(printed)
    table.columns = pd.MultiIndex.from_tuples(list(table.columns))
    own = html.escape(name[first])
    how = (
        "A number leads to those documents, as far as the gallery holds them."
        if pages
        else "Galleries of them: the same command with --gallery, on run folders whose pictures are at hand."
    )
    words = f"<p><small>lost: {own} is wrong and the other right; won: the other way round. {how}</small></p>"
    return f'<h2 id="pairs">Documents that {own} loses, and wins</h2>{words}{interactive(table, escape=False)}'
