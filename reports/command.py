"""``awares-bench report``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import report, site
from .data import gpu_day
from .data.load import ReportError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        help="folders of demo or run, run folders, lmms-eval outputs, compact records; NAME=PATH renames one; or one folder of bench gpu-day",
    )
    parser.add_argument("--out", type=Path, default=Path("awares-report"), help="output folder")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="let an exception through and print it; a refusal names it"
    )
    parser.add_argument(
        "--no-times", action="store_true", help="leave seconds out, so that runs of different machines can stand together"
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="TASK=METRIC", help="the accuracy of a task that is not known"
    )
    parser.add_argument("--gap", type=float, default=1.0, help="points of accuracy whose price in documents is told (default: 1)")
    parser.add_argument(
        "--paper",
        default="awares",
        metavar="NAME",
        help="whose published cells stand beside ours: awares (default), angelslim, adaptvision, ergo, uniprunebench, uniprunebench_internvl3",
    )
    parser.add_argument("--formats", default="pdf,svg,png", help="of figures (default: pdf,svg,png)")
    parser.add_argument(
        "--records", type=Path, metavar="FOLDER", help="also write compact records there, which report reads again"
    )
    parser.add_argument(
        "--gallery",
        type=int,
        default=0,
        metavar="N",
        help="also galleries of N documents on which AwaRes and another method differ",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder with TASK.parquet for them, when the tasks' own data is not at hand"
    )
    parser.add_argument(
        "--site",
        type=Path,
        metavar="OUT",
        help="a leaderboard in OUT: these runs, or the committed ones, with the published numbers",
    )
    parser.add_argument(
        "--logs", type=Path, nargs="+", default=[], metavar="LOG", help="training logs (log.jsonl), for learning curves"
    )


def main(args: argparse.Namespace) -> int:
    """``awares-bench report``."""
    if args.site:
        print(site.write(args.runs, args.site, dict(map(_metric, args.metric))))
        return 0
    if not args.runs and not args.logs:
        raise ReportError("name at least one folder of runs: awares-bench report RUNS --out DIR")
    formats = tuple(args.formats.split(","))
    if not args.runs:
        report.curves(args.logs, args.out, formats)
        return 0
    devices = [Path(run) for run in args.runs if gpu_day.holds(Path(run))]
    if devices:
        if len(args.runs) > 1:
            raise ReportError(
                f"{devices[0]} holds records of bench gpu-day, which are reported alone; give each folder its own --out"
            )
        warnings = report.device(devices[0], args.out, formats)
        _told(args.out, warnings)
        return 0
    _, _, warnings = report.write(
        args.runs,
        args.out,
        allow=tuple(args.allow),
        metrics=dict(map(_metric, args.metric)),
        times=not args.no_times,
        formats=formats,
        gap=args.gap / 100,
        compact=args.records,
        logs=tuple(args.logs),
        paper=args.paper,
        gallery=args.gallery,
        images=args.images,
    )
    print((args.out / "table.md").read_text(encoding="utf-8"))
    _told(args.out, warnings)
    return 0


def _told(out: Path, notes: list[str]) -> None:
    for sentence in notes:
        print(f"note: {sentence}", file=sys.stderr)
    print(out / "index.html")


def _metric(text: str) -> tuple[str, str]:
    """``TASK=METRIC`` -> both."""
    task, equals, metric = text.partition("=")
    if not (task and equals and metric):
        raise ReportError(f"--metric {text!r}: expected TASK=METRIC, such as textvqa_val=exact_match")
    return task, metric
