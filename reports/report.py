"""The whole report: tables, figures with the CSV of what they show, compact records, and one page that shows it all offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from . import page
from .data import compact as compact_records
from .data import comparability, discover, names, published, stats
from .data.load import ReportError, Run
from .plots import (
    accuracy_rtr,
    accuracy_seconds,
    calibration,
    crop_selection,
    hard_documents,
    latency,
    learning_curves,
    rtr_distribution,
)
from .plots import style as drawing
from .tables import details, render
from .tables import main as tables


def write(
    given: list[str | Path],
    out: Path,
    allow: tuple[str, ...] = (),
    metrics: dict[str, str] | None = None,
    times: bool = True,
    formats: tuple[str, ...] = drawing.FORMATS,
    gap: float = 0.01,
    compact: Path | None = None,
    logs: tuple[Path, ...] = (),
) -> tuple[list[Run], pd.DataFrame, list[str]]:
    """Runs (see ``find.runs``) -> files in ``out``: tables (csv, md, tex), figures (``formats`` and csv), summary.json, index.html.

    allow: exceptions of ``refusals``, printed below everything. times: whether seconds are reported. gap: the difference in accuracy
    whose price in documents is told. compact: folder for records that this function reads again. logs: of training runs.
    Returns runs, documents and what the reader should be warned of. Raises ReportError for what must not be reported.
    """
    unknown = [f for f in formats if f not in drawing.FORMATS]
    if unknown:
        raise ReportError(f"--formats {unknown[0]}: unknown; allowed: {', '.join(drawing.FORMATS)}")
    left_out: list[str] = []
    runs = discover.runs(given, metrics, left_out if "partial" in allow else None)
    if not runs:
        raise ReportError("no run is left to report: " + "; ".join(left_out))
    frame = discover.together(runs)
    runs = sorted(runs, key=lambda r: list(frame["method"].cat.categories).index(r.name))
    notes = [*left_out, *comparability.check(runs, frame, allow, times), *comparability.notes(runs)]
    if names.is_nano(frame):
        notes.insert(0, f"{names.NANO[0].upper()}{names.NANO[1:]}.")
    limits = sorted(
        {f"{i['min_pixels']:,} to {i['max_pixels']:,}" for r in runs if (i := r.about.get("identity") or {}).get("max_pixels")}
    )
    if limits:
        notes.append(f"Processor limits (pixels): {'; '.join(limits)}.")

    out.mkdir(parents=True, exist_ok=True)
    if compact:
        compact_records.write(runs, compact)
    paper = published.cells(runs, frame)
    (out / "summary.json").write_text(json.dumps(tables.summary(frame), indent=1) + "\n")
    found = [
        tables.main(frame, paper),
        tables.against_paper(frame, paper),
        tables.cost(runs, frame, times),
        details.differences(frame, gap),
        details.diagnostics(frame),
        details.ablations(runs, frame),
        details.provenance(runs, frame),
    ]
    shown = [t for t in found if t is not None]
    for table in shown:
        render.write(table, out, notes)
    drawn, skipped = [], []
    for name, data, figure in _figures(runs, frame, paper, tuple(notes), times, logs):
        if data.empty:
            skipped.append(name)
            continue
        render.csv(data, out / f"{name}.csv")
        made = figure(data)
        for kind in formats:
            drawing.save(made, out / f"{name}.{kind}")
        plt.close(made)
        drawn.append(name)
    said = [*notes, *_unsure(frame)]
    page.write(out, shown, drawn, skipped, said)
    return runs, frame, said


def _figures(
    runs: list[Run], frame: pd.DataFrame, paper: pd.DataFrame, notes: tuple[str, ...], times: bool, logs: tuple[Path, ...]
) -> Iterator:
    """(name, data, data -> Figure) of every figure; empty data where the runs do not hold what it shows."""
    suite = names.suite(frame)
    caveats = tuple(n for n in notes if not n.startswith("Processor limits"))
    hollow = accuracy_rtr.published(paper)

    def titled(draw, title: str = suite, *more):
        return lambda data: draw(data, title, *more, notes=caveats)

    yield "accuracy_rtr", accuracy_rtr.data(frame), titled(accuracy_rtr.draw, suite, hollow if len(hollow) else None)
    if times and frame["seconds"].notna().any():
        machine = _machine(runs)
        yield "accuracy_seconds", accuracy_seconds.data(frame), titled(accuracy_seconds.draw, suite, machine)
        yield "latency", latency.data(frame), titled(latency.draw, suite, machine)
    yield "crop_selection", crop_selection.data(frame), titled(crop_selection.draw)
    yield "rtr_distribution", rtr_distribution.data(frame), titled(rtr_distribution.draw)
    yield "low_wrong", hard_documents.data(frame), titled(hard_documents.draw)
    yield "calibration", calibration.data(frame), titled(calibration.draw)
    if logs:
        curves = learning_curves.data(learning_curves.read(list(logs)))
        yield "learning_curves", curves, lambda data: learning_curves.draw(data, "training runs")


def _machine(runs: list[Run]) -> str:
    found = dict.fromkeys(str(m.get("gpu") or m.get("cpu")) for r in runs if (m := r.about.get("machine")))
    sizes = dict.fromkeys(f"{b:g}" for r in runs for b in sorted(r.documents["batch_size"].dropna().unique()))
    return f"{' / '.join(found) or 'machine not known'}{', batch ' + '/'.join(sizes) if sizes else ''}"


def _unsure(frame: pd.DataFrame) -> list[str]:
    """Gaps to full resolution and AwaRes that these documents cannot show."""
    out = []
    for family in ("full", "awares"):
        against = tables.reference(frame, family)
        if against and frame["method"].nunique() > 1:
            out += stats.warnings(stats.compare(frame, against), against)
    return out


def curves(logs: list[Path], out: Path, formats: tuple[str, ...] = drawing.FORMATS) -> None:
    """Learning curves alone, of training runs that nobody has evaluated yet."""
    data = learning_curves.data(learning_curves.read(logs))
    if data.empty:
        raise ReportError(f"{logs[0]} holds no line with a loss or an evaluation")
    out.mkdir(parents=True, exist_ok=True)
    render.csv(data, out / "learning_curves.csv")
    made = learning_curves.draw(data, "training runs")
    for kind in formats:
        drawing.save(made, out / f"learning_curves.{kind}")
    plt.close(made)
