"""Finds the runs behind a path: sweep and demo folders, single run folders, foreign models' lmms-eval outputs, compact records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from . import compact, names
from .load import ReportError, Run, left_out, load, samples_files


def runs(given: list[str | Path], metrics: dict[str, str] | None = None, drop_partial: list[str] | None = None) -> list[Run]:
    """Paths, or ``NAME=PATH`` to rename a single run -> the runs below them, in the order given.

    A path is a folder with ``runs/`` and ``lmms/`` in it (as demo and run write them), one run folder below ``runs/``, a folder
    of lmms-eval's output or a samples file (a foreign model: no token counts), or a folder of compact records.
    metrics: task -> metric, for tasks whose accuracy is not known. drop_partial: a list that is given the sentences on
    unscored runs that are left out; None refuses them.
    """
    found: list[Run] = []
    for item in given:
        name, path = _split(str(item))
        inside = list(_below(path, name, metrics, drop_partial))
        if not inside:
            raise ReportError(
                f"{path} holds no runs; expected {path}/runs/NAME and {path}/lmms/NAME, or lmms-eval's samples files"
            )
        if name and len(inside) > 1:
            raise ReportError(f"{name}={path}: the folder holds {len(inside)} runs; NAME=PATH renames a single one")
        found += inside
    places: dict[str, Run] = {}
    for run in found:
        if run.name in places:
            raise ReportError(
                f"two runs are named {run.name} ({places[run.name].folder} and {run.folder}); give one another name: NAME=PATH"
            )
        places[run.name] = run
    return found


def _split(item: str) -> tuple[str | None, Path]:
    match = re.fullmatch(r"([\w.+-]+)=(.+)", item)
    name, path = (match[1], Path(match[2])) if match and not Path(item).exists() else (None, Path(item))
    if not path.exists():
        raise ReportError(f"{path} does not exist")
    return name, path


def _below(path: Path, name: str | None, metrics, drop_partial) -> Iterator[Run]:
    if (path / compact.RUNS).exists():
        for run in compact.read(path):
            yield Run(name or run.name, run.about, named(run.documents, name or run.name, run.about), path, {})
    elif (path / "runs").is_dir():
        for folder in sorted(p for p in (path / "runs").iterdir() if p.is_dir()):
            run = _ours(name or folder.name, folder, path / "lmms" / folder.name, metrics, drop_partial)
            if run:
                yield run
    elif (path / "run.json").exists():
        beside = path.parent.parent / "lmms" / path.name
        run = _ours(name or path.name, path, beside if beside.is_dir() else path, metrics, drop_partial)
        if run:
            yield run
    elif path.is_file() or samples_files(path):
        yield _foreign(name, path, metrics)


def _ours(name: str, folder: Path, output: Path, metrics, drop_partial: list[str] | None) -> Run | None:
    if not (folder / "run.json").exists():
        raise ReportError(f"{folder} holds no run.json; it is not a run folder")
    about = json.loads((folder / "run.json").read_text())
    files = samples_files(output) if output.is_dir() else {}
    if not files and about.get("status") != "complete":
        said = f"{name} is a partial run ({folder}) and has no scores; finish it with the command that started it"
        if drop_partial is None:
            raise ReportError(f"{said}, or pass --allow partial to leave it out")
        drop_partial.append(f"{name} is left out: partial run without scores")
        return None
    if not files:
        raise ReportError(
            f"{name}: no samples file of lmms-eval in {output}; run it with --log_samples --output_path {output}, "
            "or move its output there"
        )
    return _run(name, about, folder, output, files, metrics)


def _foreign(name: str | None, path: Path, metrics) -> Run:
    folder = path.parent if path.is_file() else path
    results = settings(folder)
    name = name or results.get("config", {}).get("model") or folder.name
    about = {"status": "foreign", "identity": {"method": name, "pretrained": results.get("model_name")}}
    return _run(name, about, None, folder, samples_files(folder), metrics)


def _run(name: str, about: dict, folder: Path | None, output: Path, files: dict[str, Path], metrics) -> Run:
    told = settings(output)
    evaluation = {
        "limit": told.get("config", {}).get("limit"),
        "lmms_eval": told.get("lmms_eval_version"),
        "versions": {t: told.get("versions", {}).get(t) for t in files},
        "documents": {t: told.get("n-samples", {}).get(t) for t in files},
        "datasets": {t: {k: c[k] for k in DATASET if c.get(k)} for t, c in told.get("configs", {}).items() if t in files},
    }
    documents = load(name, folder, output, metrics)
    lost = left_out(folder, documents)
    about = (
        {k: v for k, v in about.items() if k != "left_out"} | {"evaluation": evaluation} | ({"left_out": lost} if lost else {})
    )
    return Run(name, about, named(documents, name, about), folder or output, files)


DATASET = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")


def named(documents: pd.DataFrame, name: str, about: dict) -> pd.DataFrame:
    """The documents under a run's name, with the display name and family that its identity gives them."""
    identity = about.get("identity")
    for column, value in (
        ("method", name),
        ("label", names.label(name, identity, about.get("label"))),
        ("family", names.family(name, identity)),
    ):
        documents[column] = pd.Series(value, documents.index, dtype="category")
    return documents


def settings(folder: Path) -> dict:
    """What lmms-eval's newest results file below a folder says; {} without one."""
    paths = sorted(folder.rglob("*_results.json"), key=lambda p: p.name)
    return json.loads(paths[-1].read_text()) if paths else {}


def together(found: list[Run]) -> pd.DataFrame:
    """Every run's documents in one frame, methods in the order of ``names.METHODS`` and then by name; equal labels gain the run's name."""
    order = list(names.METHODS)

    def place(run: Run) -> tuple:
        family = str(run.documents["family"].iloc[0])
        return order.index(family) if family in order else len(order), family, run.name

    frames = [run.documents for run in sorted(found, key=place)]
    out = pd.concat([f.astype({c: object for c in f.columns if f[c].dtype == "category"}) for f in frames], ignore_index=True)
    first = out.drop_duplicates("method").set_index("method")
    labels, own = first["label"], [m in (f, f"awares_{f}") for m, f in first["family"].items()]
    twice = labels.duplicated(keep=False) & ~pd.Series(own, labels.index)
    out["label"] = out["method"].map(labels.where(~twice, labels + " (" + labels.index + ")"))
    for column in ("method", "label", "family", "task", "crops", "events"):
        values = out[column].unique()
        out[column] = pd.Categorical(out[column], categories=values)
    return out
