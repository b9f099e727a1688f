"""Full, low and AwaRes on the nano suite through lmms-eval itself, then tables, figures, a gallery, and five lines that say what came out."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.resources import files
from pathlib import Path

from awares_bench.methods.options import unknown_option

from . import doctor
from .progress import Follower, Progress

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
        place = f"[{number}/{len(methods)}] {name.removeprefix('awares_')}"
        if not sys.stderr.isatty():  # where the bar is not drawn
            print(f"{place} on the nano suite", file=sys.stderr)
        _evaluate(name, out, suite, limit, pretrained, batch_size, place)
    report(out)


def _same_suite(out: Path, suite: Path) -> None:
    """Raise ValueError when ``out`` holds a demo on another suite: its runs would stand beside the new ones."""
    path = out / "demo.json"
    before = json.loads(path.read_text())["suite"] if path.is_file() else str(suite.resolve())
    if before != str(suite.resolve()):
        raise ValueError(
            f"{out} holds a demo on the suite {before}, not {suite.resolve()}; pass another --out, or delete the folder"
        )


def _evaluate(name: str, out: Path, suite: Path, limit: int | None, pretrained: str, batch_size: int, place: str = "") -> None:
    """Run lmms-eval's command on one method, its messages in a log, our own bar instead. place: what the bar says before it."""
    results = out / "lmms" / name
    before = set(results.rglob("*_results.json"))
    arguments = f"pretrained={pretrained},output_dir={out / 'runs' / name}"
    command = [sys.executable, "-m", "lmms_eval", "--model", name, "--model_args", arguments, "--tasks", "awares_nano"]
    command += ["--include_path", str(suite), "--batch_size", str(batch_size), "--log_samples", "--output_path", str(results)]
    command += ["--limit", str(limit)] if limit else []
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    log = out / f"{name}.log"
    status = _watched(command, os.environ | quiet, log, out / "runs" / name, _documents(suite, limit), place or name)
    if status == 130 or status < 0:
        raise KeyboardInterrupt
    if not set(results.rglob("*_results.json")) - before:
        print("awares-bench doctor says:", file=sys.stderr)
        with redirect_stdout(sys.stderr):
            doctor.run()
        raise RuntimeError(
            f"lmms-eval left no results for {name} (exit status {status}); its messages are in {log}, the last ones:\n{_end(log)}"
        )


def _watched(command: Sequence[str], env: dict[str, str], log: Path, run: Path, documents: int, place: str) -> int:
    """Run a command with all it prints in ``log`` and a bar of what it adds to the records of ``run`` -> its exit status."""
    follower = Follower(run / "records.jsonl")
    with log.open("w") as file, Progress(documents, place) as bar:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                follower.tell(bar)
                time.sleep(0.1)
        except KeyboardInterrupt:  # the process hears it too
            process.wait()
            raise
        follower.tell(bar)
    return process.returncode


def _documents(suite: Path, limit: int | None) -> int:
    """How many documents a method is asked."""
    from pyarrow.parquet import read_metadata

    counts = [read_metadata(path).num_rows for path in suite.glob("nano_*.parquet")]
    return sum(n if limit is None else min(n, limit) for n in counts)


def _end(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else ""


def report(out: Path) -> None:
    """Rebuild tables, figures, gallery and ``summary.json`` of a demo folder from its runs, without a model."""
    settings = json.loads((out / "demo.json").read_text())
    runs = [out / "runs" / name for name in settings["methods"]]
    from awares_bench.reports import report as reports
    from awares_bench.reports.gallery import markup, select

    shown = "awares" if "awares" in settings["methods"] else settings["methods"][0]
    suite = Path(settings["suite"])
    count = select.write(str(out / "runs" / shown), out / "gallery.html", images=suite, choose=markup.choose)
    _, frame, said = reports.write(runs, out, gallery=24, images=suite)
    frame.to_csv(out / "documents.csv", index=False, float_format="%.9g")
    for sentence in said:
        print(f"note: {sentence}", file=sys.stderr)
    print("\n".join(_in_words(json.loads((out / "summary.json").read_text()), shown)))
    print(
        f"Open {out / 'index.html'} for tables and figures, {out / 'gallery.html'} for {count} documents as {_name(shown)} saw them."
    )


def _name(method: str) -> str:
    return {"awares_full": "full resolution", "awares_low": "half size", "awares": "AwaRes"}[method]


def _in_words(summary: dict, shown: str) -> list[str]:
    """What came out, for someone who meets the package first: a line a method, and what follows."""
    lines = []
    for method in MODELS:
        if method not in summary:
            continue
        mean = summary[method]["mean"]
        line = f"{_name(method) + ':':<17}{100 * mean['accuracy']:5.1f} % of the answers right"
        if method == "awares_full":
            line += ", shown every picture whole; its visual tokens are the 100 % of the others"
        elif mean["rtr"] is not None:
            line += f", with {100 * mean['rtr']:.0f} % of the visual tokens"
            line += f"; it looked closer at {100 * mean['call_rate']:.0f} % of the documents" if method == "awares" else ""
        lines.append(line)
    if shown == "awares" and "awares_full" in summary and (rtr := summary["awares"]["mean"]["rtr"]) is not None:
        lost = 100 * (summary["awares_full"]["mean"]["accuracy"] - summary["awares"]["mean"]["accuracy"])
        lines.append(
            f"So AwaRes saves {100 * (1 - rtr):.0f} % of the visual tokens and {'loses' if lost >= 0 else 'gains'} {abs(lost):.1f} points. "
            "This is nano, a toy model: it shows that the code works, not how a 7B model does."
        )
    return lines
