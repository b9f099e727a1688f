"""Full, low and AwaRes on the nano suite through lmms-eval itself, then the table, the figure and the gallery."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path

from awares_bench.methods.options import unknown_option

from . import doctor

MODELS = ("awares_full", "awares_low", "awares")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", type=Path, help="a suite made by nano-data (default: the one in the package)")
    parser.add_argument("--methods", default=",".join(MODELS), help="comma-separated lmms-eval model names of this package")
    parser.add_argument("--limit", type=int, help="documents per task (default: all)")
    parser.add_argument("--out", type=Path, default=Path("awares-demo"), help="output folder; a second call resumes there")
    parser.add_argument("--pretrained", default="nano", help="checkpoint (default: the nano weights in the package)")
    parser.add_argument("--batch-size", type=int, default=8)


def main(args: argparse.Namespace) -> int:
    run(args.out, args.methods.split(","), args.suite, args.limit, args.pretrained, args.batch_size)
    return 0


def run(
    out: Path,
    methods: list[str],
    suite: Path | None = None,
    limit: int | None = None,
    pretrained: str = "nano",
    batch_size: int = 8,
) -> None:
    """Evaluate ``methods`` on a suite and write ``out``: runs/, lmms/, documents.csv, gallery.html, and what ``report`` writes.

    Raises RuntimeError when lmms-eval leaves no results (it exits 0 on failure, so the results file is what counts).
    """
    for name in methods:
        if name not in MODELS:
            raise ValueError(f"--methods: {unknown_option(name, list(MODELS))}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; it must be at least 1")
    suite = Path(suite) if suite else Path(str(files("awares_bench.tasks.nano") / "nano_chart.yaml")).parent
    if not (suite / "nano_chart.parquet").exists():
        raise ValueError(
            f"{suite} holds no nano suite (nano_chart.parquet is missing); make one: awares-bench nano-data --seed 1 --out {suite}"
        )
    _same_suite(out, suite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "demo.json").write_text(json.dumps({"methods": methods, "suite": str(suite.resolve()), "limit": limit}))
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}; pass --out FOLDER") from error
    for number, name in enumerate(methods, 1):
        print(f"[{number}/{len(methods)}] {name} on the nano suite", file=sys.stderr)
        _evaluate(name, out, suite, limit, pretrained, batch_size)
    report(out)


def _same_suite(out: Path, suite: Path) -> None:
    """Raise ValueError when ``out`` holds a demo on another suite: its runs would stand beside the new ones."""
    path = out / "demo.json"
    before = json.loads(path.read_text())["suite"] if path.is_file() else str(suite.resolve())
    if before != str(suite.resolve()):
        raise ValueError(
            f"{out} holds a demo on the suite {before}, not {suite.resolve()}; pass another --out, or delete the folder"
        )


def _evaluate(name: str, out: Path, suite: Path, limit: int | None, pretrained: str, batch_size: int) -> None:
    results = out / "lmms" / name
    before = set(results.rglob("*_results.json"))
    arguments = f"pretrained={pretrained},output_dir={out / 'runs' / name}"
    command = [sys.executable, "-m", "lmms_eval", "--model", name, "--model_args", arguments, "--tasks", "awares_nano"]
    command += ["--include_path", str(suite), "--batch_size", str(batch_size), "--log_samples", "--output_path", str(results)]
    command += ["--limit", str(limit)] if limit else []
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with (out / f"{name}.log").open("w") as log:
        status = subprocess.run(command, env=os.environ | quiet, stdout=log).returncode
    if status == 130 or status < 0:
        raise KeyboardInterrupt
    if not set(results.rglob("*_results.json")) - before:
        print("awares-bench doctor says:", file=sys.stderr)
        with redirect_stdout(sys.stderr):
            doctor.run()
        raise RuntimeError(
            f"lmms-eval left no results for {name} (exit status {status}); its messages are above and in {out / f'{name}.log'}"
        )


def report(out: Path) -> None:
    """Rebuild tables, figures, gallery and ``summary.json`` of a demo folder from its runs, without a model."""
    settings = json.loads((out / "demo.json").read_text())
    runs = [out / "runs" / name for name in settings["methods"]]
    from awares_bench.reports import report as reports
    from awares_bench.reports.gallery import markup, select

    shown = "awares" if "awares" in settings["methods"] else settings["methods"][0]
    suite = Path(settings["suite"])
    count = select.write(str(out / "runs" / shown), out / "gallery.html", images=suite, choose=markup.choose)
    _, frame, said = reports.write(runs, out)
    frame.to_csv(out / "documents.csv", index=False, float_format="%.9g")
    print((out / "table.md").read_text(encoding="utf-8"))
    for sentence in said:
        print(f"note: {sentence}", file=sys.stderr)
    print(f"{'gallery.html':<18} {out / 'gallery.html'} ({count} trajectories of {shown})")
    for name in ("index.html", "accuracy_rtr.png", "summary.json"):
        print(f"{name:<18} {out / name}")
