"""Finds the runs behind a path: sweep and demo folders, single run folders, foreign models' lmms-eval outputs, compact records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from . import compact, names
from .load import TEXT, ReportError, Run, left_out, load, samples_files


def runs(
    paths: Sequence[str | Path], metrics: dict[str, str] | None = None, leave_out_partial: bool = False
) -> tuple[list[Run], list[str]]:
    """Paths, or ``NAME=PATH`` to rename a single run -> the runs below them, in the order given, and a sentence on each run left out.

    A path is a folder with ``runs/`` and ``lmms/`` in it (as demo and run write them), one run folder below ``runs/``, a folder
    of lmms-eval's output or a samples file (a foreign model: no token counts), or a folder of compact records.
    metrics: task -> metric, for tasks whose accuracy is not known. leave_out_partial: leave runs without scores out, not refuse them.
    Raises ReportError for a path without runs, two runs of one name, and whatever ``load.load`` refuses.
    """
    found: list[Run] = []
    sentences: list[str] = []
    for item in paths:
        name, path = _split(str(item))
        inside = list(_below(path, name, metrics, leave_out_partial))
        if not inside:
            raise ReportError(
                f"{path} holds no runs; expected {path}/runs/NAME and {path}/lmms/NAME, or lmms-eval's samples files"
            )
        if name and len(inside) > 1:
            raise ReportError(f"{name}={path}: the folder holds {len(inside)} runs; NAME=PATH renames a single one")
        found += [run for run in inside if isinstance(run, Run)]
        sentences += [run for run in inside if isinstance(run, str)]
    # Tables tell runs apart by their names alone.
    first: dict[str, Run] = {}
    for run in found:
        other = first.setdefault(run.name, run)
        if other is not run:
            raise ReportError(
                f"two runs are named {run.name} ({other.folder} and {run.folder}); give one another name: NAME=PATH"
            )
    return found, sentences


def one(path: str | Path, metrics: dict[str, str] | None = None) -> Run:
    """The single run behind a path; raises ReportError where there are several."""
    found, _ = runs([path], metrics)
    if len(found) > 1:
        raise ReportError(f"{path} holds {len(found)} runs; name one: {path}/runs/{found[0].name}")
    return found[0]


def _split(item: str) -> tuple[str | None, Path]:
    match = re.fullmatch(r"([\w.+-]+)=(.+)", item)
    name, path = (match[1], Path(match[2])) if match and not Path(item).exists() else (None, Path(item))
    if not path.exists():
        raise ReportError(f"{path} does not exist")
    return name, path


Metrics = dict[str, str] | None


def _below(path: Path, name: str | None, metrics: Metrics, leave_out_partial: bool) -> Iterator[Run | str]:
    """What a path holds, told by its files: runs, and sentences on those that are left out."""
    if (path / compact.RUNS).exists():  # compact records
        for run in compact.read(path):
            yield Run(name or run.name, run.about, named(run.documents, name or run.name, run.about), path, {})
    elif (path / "runs").is_dir():  # a demo or a sweep
        for folder in sorted(p for p in (path / "runs").iterdir() if p.is_dir()):
            yield _ours(name or folder.name, folder, path / "lmms" / folder.name, metrics, leave_out_partial)
    elif (path / "run.json").exists():  # one run, its scores beside ``runs/`` or inside
        beside = path.parent.parent / "lmms" / path.name
        yield _ours(name or path.name, path, beside if beside.is_dir() else path, metrics, leave_out_partial)
    elif path.is_file() or samples_files(path):  # lmms-eval's output of another model
        yield _foreign(name, path, metrics)


def _ours(name: str, folder: Path, output: Path, metrics: Metrics, leave_out_partial: bool) -> Run | str:
    if not (folder / "run.json").exists():
        raise ReportError(f"{folder} holds no run.json; it is not a run folder")
    about = json.loads((folder / "run.json").read_text())
    files = samples_files(output) if output.is_dir() else {}
    if not files and about.get("status") != "complete":
        if leave_out_partial:
            return f"{name} is left out: partial run without scores"
        raise ReportError(
            f"{name} is a partial run ({folder}) and has no scores; finish it with the command that started it, "
            "or pass --allow partial to leave it out"
        )
    if not files:
        raise ReportError(
            f"{name}: no samples file of lmms-eval in {output}; run it with --log_samples --output_path {output}, "
            "or move its output there"
        )
    return _run(name, about, folder, output, files, metrics)


def _foreign(name: str | None, path: Path, metrics: Metrics) -> Run:
    folder = path.parent if path.is_file() else path
    results = settings(folder)
    name = name or results.get("config", {}).get("model") or folder.name
    about = {"status": "foreign", "identity": {"method": name, "pretrained": results.get("model_name")}}
    return _run(name, about, None, folder, samples_files(folder), metrics)


def _run(name: str, about: dict, folder: Path | None, output: Path, files: dict[str, Path], metrics: Metrics) -> Run:
    results = settings(output)
    configs = {task: config for task, config in results.get("configs", {}).items() if task in files}
    evaluation = {
        "limit": results.get("config", {}).get("limit"),
        "lmms_eval": results.get("lmms_eval_version"),
        "versions": {t: results.get("versions", {}).get(t) for t in files},
        "documents": {t: results.get("n-samples", {}).get(t) for t in files},
        "datasets": {t: {k: c[k] for k in DATASET if c.get(k)} for t, c in configs.items()},
    }
    documents = load(name, folder, output, metrics)
    lost = left_out(folder, documents)
    about = {k: v for k, v in about.items() if k != "left_out"} | {"evaluation": evaluation}
    about |= {"left_out": lost} if lost else {}
    return Run(name, about, named(documents, name, about), folder or output, files)


DATASET = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")
"""What of a task's configuration tells where its pictures are."""


def named(documents: pd.DataFrame, name: str, about: dict) -> pd.DataFrame:
    """The documents under a run's name, with the display name and family that its identity gives them."""
    identity = about.get("identity")
    display = {"label": names.label(name, identity, about.get("label")), "family": names.family(name, identity)}
    for column, value in {"method": name, **display}.items():
        documents[column] = pd.Series(value, documents.index, dtype="category")
    return documents


def settings(folder: Path) -> dict:
    """What lmms-eval's newest results file below a folder says; {} without one."""
    paths = sorted(folder.rglob("*_results.json"), key=lambda p: p.name)
    return json.loads(paths[-1].read_text()) if paths else {}


def together(runs: list[Run]) -> pd.DataFrame:
    """Every run's documents in one frame, methods in the order of ``names.METHODS`` and then by name; equal labels gain the run's name."""
    order = list(names.METHODS)

    def place(run: Run) -> tuple:
        family = str(run.documents["family"].iloc[0])
        return order.index(family) if family in order else len(order), family, run.name

    # Categories differ from run to run, so words are joined as words and made categories of the whole again.
    frames = [run.documents for run in sorted(runs, key=place)]
    out = pd.concat([f.astype({c: object for c in f.columns if f[c].dtype == "category"}) for f in frames], ignore_index=True)
    # Where two runs have one label, the run named like its method keeps it.
    first = out.drop_duplicates("method").set_index("method")
    labels, is_namesake = first["label"], [m in (f, f"awares_{f}") for m, f in first["family"].items()]
    ambiguous = labels.duplicated(keep=False) & ~pd.Series(is_namesake, labels.index)
    out["label"] = out["method"].map(labels.where(~ambiguous, labels + " (" + labels.index + ")"))
    for column in TEXT:
        out[column] = pd.Categorical(out[column], categories=out[column].unique())
    return out
