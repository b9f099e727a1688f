"""The whole report: tables, figures with the CSV of what they show, compact records, and one page that shows it all offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import page
from .data import comparability, discover, gpu_day, names, published, stats, summary
from .data.compact import write as write_compact
from .data.load import ReportError, Run
from .gallery import pairs
from .plots import (
    accuracy_rtr,
    accuracy_seconds,
    accuracy_tasks,
    calibration,
    crop_selection,
    hard_documents,
    latency,
    learning_curves,
    rtr_distribution,
    style,
)
from .plots import gpu_day as gpu_figures
from .tables import details, main, measures, render
from .tables import gpu_day as gpu_tables


def write(
    paths: Sequence[str | Path],
    out: Path,
    *,
    allow: tuple[str, ...] = (),
    metrics: dict[str, str] | None = None,
    times: bool = True,
    formats: tuple[str, ...] = style.FORMATS,
    gap: float = 0.01,
    compact: Path | None = None,
    logs: tuple[Path, ...] = (),
    paper: str = published.PAPER,
    gallery: int = 0,
    images: Path | None = None,
) -> tuple[list[Run], pd.DataFrame, list[str]]:
    """Runs (see ``discover.runs``) -> files in ``out``: tables (csv, md, tex), figures (``formats`` and csv), summary.json, index.html.

    allow: names of ``comparability.REASONS``, printed below everything. metrics: task -> metric, of tasks that ``load`` does not know.
    times: whether seconds are reported. gap: the difference in accuracy (a fraction) whose price in documents is told. compact: folder
    for compact records, which this function reads again. logs: of training runs. paper: whose published cells stand beside ours.
    gallery: documents of each gallery in which AwaRes stands beside another method where they differ; 0: none. images: folder of
    TASK.parquet for them, see ``gallery.select``.
    Returns runs, documents and what the reader should be warned of. Raises ReportError for what must not be reported.
    """
    if gallery < 0:
        raise ReportError(f"--gallery is {gallery}; it is a number of documents, 0 for no galleries")
    unknown = [f for f in formats if f not in style.FORMATS]
    if unknown:
        raise ReportError(f"--formats {unknown[0]}: unknown; allowed: {', '.join(style.FORMATS)}")
    # Find the runs, and refuse what must not stand side by side; what was allowed is said under everything.
    runs, left_out = discover.runs(paths, metrics, leave_out_partial="partial" in allow)
    if not runs:
        raise ReportError("no run is left to report: " + "; ".join(left_out))
    frame = discover.together(runs)
    runs = sorted(runs, key=lambda r: list(frame["method"].cat.categories).index(r.name))
    notes = [*left_out, *comparability.check(runs, frame, allow, times), *comparability.notes(runs)]
    if names.is_nano(frame):
        notes.insert(0, f"{names.NANO[0].upper()}{names.NANO[1:]}.")
    identities = [r.about.get("identity") or {} for r in runs]
    limits = sorted({details.pixels(i) for i in identities if i.get("max_pixels")})
    limits = [one for one in limits if not any(other.startswith(f"{one} (") for other in limits)]  # the same, and by its name
    if limits:
        notes.append(f"Processor limits (pixels): {'; '.join(limits)}.")

    out.mkdir(parents=True, exist_ok=True)
    if compact:
        write_compact(runs, compact)
    cells = published.cells(runs, frame, paper)
    (out / "summary.json").write_text(json.dumps(summary.summary(frame), indent=1) + "\n")
    candidates = [
        main.accuracy(frame, cells),
        main.against_paper(frame, cells),
        measures.matched_table(frame, times),
        measures.agreement_table(frame),
        main.cost(runs, frame, times),
        details.differences(frame, gap),
        details.diagnostics(frame),
        details.ablations(runs, frame),
        details.provenance(runs, frame),
    ]
    tables = [t for t in candidates if t is not None]
    for table in tables:
        render.write(table, out, notes)
    # A figure whose data the runs do not hold is named on the page instead.
    figures, skipped = {}, []
    for name, module, data, draw in _figures(runs, frame, cells, tuple(notes), times, logs):
        if data.empty:
            skipped.append(name)
            continue
        _save(name, data, draw(data), out, formats)
        figures[name] = module.READING
    # Where runs differ, with galleries of those documents.
    pages = pairs.write(runs, frame, out, images, gallery) if gallery else {}
    unsure = _unsure(frame)
    tasks = tuple(names.task(str(t)) for t in frame["task"].unique())
    page.write(out, tables, figures, skipped, notes, unsure, pairs.section(frame, pages), tasks)
    return runs, frame, [*notes, *unsure]


def _save(name: str, data: pd.DataFrame, figure: Figure, out: Path, formats: tuple[str, ...]) -> None:
    render.csv(data, out / f"{name}.csv")
    for kind in formats:
        style.save(figure, out / f"{name}.{kind}")


def _figures(
    runs: list[Run], frame: pd.DataFrame, paper: pd.DataFrame, notes: tuple[str, ...], times: bool, logs: tuple[Path, ...]
) -> Iterator[tuple[str, ModuleType, pd.DataFrame, Callable[[pd.DataFrame], Figure]]]:
    """(name, module, data, data -> Figure) of every figure; empty data where the runs do not hold what it shows."""
    caveats = tuple(n for n in notes if not n.startswith("Processor limits"))
    common: dict[str, Any] = {"on": names.suite(frame), "notes": caveats}
    hollow = accuracy_rtr.published(paper)

    accuracy = partial(accuracy_rtr.draw, paper=hollow if len(hollow) else None, **common)
    yield "accuracy_rtr", accuracy_rtr, accuracy_rtr.data(frame), accuracy
    yield "accuracy_tasks", accuracy_tasks, accuracy_tasks.data(frame), partial(accuracy_tasks.draw, **common)
    if times and frame["seconds"].notna().any():
        machine = _machine(runs)
        yield (
            "accuracy_seconds",
            accuracy_seconds,
            accuracy_seconds.data(frame),
            partial(accuracy_seconds.draw, machine=machine, **common),
        )
        yield "latency", latency, latency.data(frame), partial(latency.draw, machine=machine, **common)
    yield "crop_selection", crop_selection, crop_selection.data(frame), partial(crop_selection.draw, **common)
    yield "rtr_distribution", rtr_distribution, rtr_distribution.data(frame), partial(rtr_distribution.draw, **common)
    yield "low_wrong", hard_documents, hard_documents.data(frame), partial(hard_documents.draw, **common)
    yield "calibration", calibration, calibration.data(frame), partial(calibration.draw, **common)
    if logs:
        curves = learning_curves.data(learning_curves.read(list(logs)))
        yield "learning_curves", learning_curves, curves, partial(learning_curves.draw, on="training runs")


def _machine(runs: list[Run]) -> str:
    machines = dict.fromkeys(str(m.get("gpu") or m.get("cpu")) for r in runs if (m := r.about.get("machine")))
    sizes = dict.fromkeys(f"{b:g}" for r in runs for b in sorted(r.documents["batch_size"].dropna().unique()))
    return f"{' / '.join(machines) or 'machine not known'}{', batch ' + '/'.join(sizes) if sizes else ''}"


def _unsure(frame: pd.DataFrame) -> list[str]:
    """Gaps to full resolution and AwaRes that these documents cannot show."""
    out: list[str] = []
    name = summary.labels(frame)
    for family in ("full", "awares"):
        against = summary.reference(frame, family)
        if against and frame["method"].nunique() > 1:
            comparison = stats.compare(frame, against)
            out += stats.warnings(comparison.assign(method=comparison["method"].astype(str).map(name)), name[against])
    return out


def curves(logs: list[Path], out: Path, formats: tuple[str, ...] = style.FORMATS) -> None:
    """Learning curves alone, of training runs that nobody has evaluated yet."""
    data = learning_curves.data(learning_curves.read(logs))
    if data.empty:
        raise ReportError(f"{logs[0]} holds no line with a loss or an evaluation")
    out.mkdir(parents=True, exist_ok=True)
    _save("learning_curves", data, learning_curves.draw(data, "training runs"), out, formats)


def device(path: Path, out: Path, formats: tuple[str, ...] = style.FORMATS) -> list[str]:
    """The records of ``bench gpu-day`` -> tables, figures and ``index.html`` in ``out``, with the device's name in each -> their notes."""
    day = gpu_day.read(path)
    tables = gpu_tables.tables(day)
    if not tables:
        raise ReportError(f"{path} holds no measurement yet: {' '.join(day.notes)}")
    out.mkdir(parents=True, exist_ok=True)
    for table in tables:
        render.write(table, out, [])
    figures, skipped = {}, []
    draw: dict[str, tuple[pd.DataFrame, Callable[..., Figure]]] = {
        "gpu_engine_seconds": (gpu_day.engine(day), gpu_figures.draw_engine),
        "gpu_pruners_share": (gpu_day.pruners(day), gpu_figures.draw_pruners),
    }
    for name, (data, figure) in draw.items():
        if data.empty:
            skipped.append(name)
            continue
        _save(name, data, figure(data, day.device, tuple(day.notes)), out, formats)
        figures[name] = gpu_figures.READINGS[name]
    page.write(out, tables, figures, skipped, day.notes)
    return day.notes
