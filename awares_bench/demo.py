"""Full, low and AwaRes on the nano suite through lmms-eval itself, then the table, the figure and the gallery."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from .method import unknown_option

MODELS = ("awares_full", "awares_low", "awares")


def run(
    out: Path,
    methods: list[str],
    suite: Path | None = None,
    limit: int | None = None,
    pretrained: str = "nano",
    batch_size: int = 8,
) -> None:
    """Evaluate ``methods`` on a suite and write ``out``: runs/, lmms/, documents.csv, table.md, table.csv, accuracy_rtr.*, gallery.html, summary.json.

    Raises RuntimeError when lmms-eval leaves no results (it exits 0 on failure, so the results file is what counts).
    """
    for name in methods:
        if name not in MODELS:
            raise ValueError(f"--methods: {unknown_option(name, list(MODELS))}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; it must be at least 1")
    suite = Path(suite) if suite else Path(str(files("awares_bench.tasks") / "nano_chart.yaml")).parent
    if not (suite / "nano_chart.parquet").exists():
        raise ValueError(
            f"{suite} holds no nano suite (nano_chart.parquet is missing); make one: awares-bench nano-data --seed 1 --out {suite}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "demo.json").write_text(json.dumps({"methods": methods, "suite": str(suite.resolve()), "limit": limit}))
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}; pass --out FOLDER") from error
    for number, name in enumerate(methods, 1):
        print(f"[{number}/{len(methods)}] {name} on the nano suite", file=sys.stderr)
        _evaluate(name, out, suite, limit, pretrained, batch_size)
    report(out)


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
        raise RuntimeError(
            f"lmms-eval left no results for {name} (exit status {status}); its messages are above and in {out / f'{name}.log'}"
        )


def report(out: Path) -> None:
    """Rebuild table, figure, gallery and ``summary.json`` of a demo folder from its runs, without a model."""
    import pandas as pd

    if not (out / "demo.json").exists():
        raise ValueError(f"{out} was not written by awares-bench demo (no demo.json)")
    settings = json.loads((out / "demo.json").read_text())
    load, tables = import_module("awares_bench.reports.load"), import_module("awares_bench.reports.tables")
    figure, gallery = import_module("awares_bench.reports.accuracy_rtr"), import_module("awares_bench.reports.gallery")
    frame = pd.concat([load.load(m, out / "runs" / m, out / "lmms" / m) for m in settings["methods"]], ignore_index=True)

    frame.drop(columns=["replies", "question", "usage", "events"]).to_csv(out / "documents.csv", index=False)
    summaries = tables.summary(frame)
    (out / "summary.json").write_text(json.dumps(summaries, indent=1))
    table = tables.main_table(summaries)
    table.to_csv(out / "table.csv", index=False)
    said = tables.markdown(table)
    (out / "table.md").write_text(said)

    documents = frame.groupby("task").size().max() // frame["method"].nunique()
    points = figure.data(frame)
    points.to_csv(out / "accuracy_rtr.csv", index=False)
    drawn = figure.draw(points, f"nano suite, {documents} documents a task")
    for kind in ("png", "svg", "pdf"):
        figure.save(drawn, out / f"accuracy_rtr.{kind}")

    shown = "awares" if "awares" in settings["methods"] else settings["methods"][0]
    chosen = gallery.choose(frame[frame["method"] == shown])
    page = gallery.page(chosen, _images(Path(settings["suite"])), f"{shown} on the nano suite: {len(chosen)} trajectories")
    (out / "gallery.html").write_text(page, encoding="utf-8")
    print(said)
    for name in ("table.md", "accuracy_rtr.png", "gallery.html", "summary.json"):
        print(f"{name:<18} {out / name}")


def _images(suite: Path):
    """(task, doc_id) -> the document's picture, read from the suite's parquet."""
    from functools import lru_cache

    import pandas as pd
    from PIL import Image

    columns = lru_cache(maxsize=None)(lambda task: pd.read_parquet(suite / f"{task}.parquet", columns=["image"])["image"])
    return lambda task, doc_id: Image.open(io.BytesIO(columns(task)[doc_id]["bytes"])).convert("RGB")
