"""A sweep: methods x options x tasks from one recipe, as one command that resumes; a run folder for each cell.

    OUT/runs/CELL/{run.json,records.jsonl}     what was spent
    OUT/lmms/CELL/…                            what was scored, as lmms-eval saves it
    OUT/sweep.json                             the cells and how they ended
    OUT/claims/CELL.N                          who works on what, where several workers share the sweep (``claims``)

Cells run in this process through lmms-eval's evaluator, not as lmms-eval commands: that loads each set of weights once for
all its cells, and an exception names what failed (the command exits 0 on failure).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import yaml

from awares_bench.methods import registry
from awares_bench.methods.options import unknown_option

from . import run_options
from .claims import STALE_SECONDS, Claim, Claims, TakenOver
from .provenance import fingerprint
from .run_options import WEIGHTS, RunOptions

RECIPE_KEYS = ("tasks", "include_path", "limit", "batch_size", "options", "methods")
"""What a recipe may hold; ``options`` are model arguments of every cell, ``methods`` a list of names or of options with ``method``."""

OPTIONS = tuple(name for name in run_options.NAMES if name not in ("output_dir", "label"))
"""Options of a run that a cell may have; ``output_dir`` is the sweep's, ``label`` the cell's own."""

CHANGES_NOTHING = ("batch_size", "max_batch_tokens", "on_error")
"""Options with which a finished cell stays finished."""


@dataclass(frozen=True)
class Cell:
    """One method with its options on the tasks."""

    name: str
    """Of its folder."""
    label: str
    """How tables name it."""
    method: str
    options: dict
    """As the recipe gives them: those of the run and of the method."""
    tasks: tuple[str, ...]
    limit: int | None
    """Documents per task; None for all."""
    include: str | None = None
    """A digest of the folder that holds the recipe's own task files and data; None without one."""

    @property
    def spec(self) -> dict:
        """What must be equal for a finished cell to count as done."""
        options = {k: v for k, v in self.options.items() if k not in CHANGES_NOTHING}
        spec = {"method": self.method, "options": options, "tasks": list(self.tasks), "limit": self.limit}
        return spec | ({"include": self.include} if self.include else {})


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked."""

    cells: tuple[Cell, ...]
    """In the order they run."""
    include_path: str | None = None
    """Folder of task files beside lmms-eval's and this package's own."""


def shipped() -> dict[str, Path]:
    """Recipes of this package by name."""
    return {
        p.name.removesuffix(".yaml"): Path(str(p))
        for p in (files("awares_bench") / "evaluation" / "sweeps").iterdir()
        if p.name.endswith(".yaml")
    }


def read(path: str | Path, limit: int | None = None, **options) -> Recipe:
    """A recipe file, or the name of a shipped one -> its cells, all of them checked before any model is loaded.

    limit, options: in place of the recipe's own, where they are not None. An option whose value is a list makes one cell
    for each value. Raises ValueError that names the entry.
    """
    file = Path(path) if Path(path).is_file() else shipped().get(str(path))
    if file is None:
        raise ValueError(f"no recipe {path}; pass a YAML file or one of: {', '.join(sorted(shipped()))}")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not recipe.get("tasks") or not recipe.get("methods"):
        raise ValueError(f"{file} needs tasks: [...] and methods: [...]; allowed keys: {', '.join(RECIPE_KEYS)}")
    for key in recipe:
        if key not in RECIPE_KEYS:
            raise ValueError(f"{file}: {unknown_option(key, list(RECIPE_KEYS))}")
    limit = recipe.get("limit") if limit is None else limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is {limit!r}; it is a number of documents per task, at least 1")

    # every method with its options, one cell for each combination of their values
    common = {"batch_size": recipe.get("batch_size", 1)} | (recipe.get("options") or {})
    overrides = {k: v for k, v in options.items() if v is not None}
    cells = []
    for entry in recipe["methods"]:
        entry = {"method": entry} if isinstance(entry, str) else dict(entry)
        if "method" not in entry:
            raise ValueError(f"{file}: {entry} names no method; write - {{method: NAME, ...}}")
        for combination in _grid(common | entry | overrides):
            cells.append(_cell(file, combination, _listed(recipe["tasks"]), limit, set(entry) & set(WEIGHTS)))
    names = [c.name for c in cells]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise ValueError(f"{file} has two cells named {twice}; give one of them a label of its own")

    # cells that share weights side by side, in the order in which the recipe names the weights
    order = list(dict.fromkeys(_weights(c) for c in cells))
    include = (file.parent / recipe["include_path"]).resolve() if recipe.get("include_path") else None
    if include and not include.is_dir():
        raise ValueError(f"{file}: include_path is {recipe['include_path']}; there is no folder {include}")
    cells = [replace(c, include=fingerprint(include) if include else None) for c in cells]
    return Recipe(tuple(sorted(cells, key=lambda c: order.index(_weights(c)))), str(include) if include else None)


def _cell(file: Path, options: dict, tasks: tuple[str, ...], limit: int | None, own: set[str]) -> Cell:
    """One combination of options -> a cell. own: options of the entry itself that say which weights, and so belong to its label."""
    name, label = str(options.pop("method")), options.pop("label", None)
    try:
        method = registry.build(name, {k: v for k, v in options.items() if k not in OPTIONS or k == "seed"}, OPTIONS)
        RunOptions.parse({k: v for k, v in options.items() if v is not None})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    label = label or " ".join([method.label, *(f"{k}={Path(str(options[k])).name}" for k in WEIGHTS if k in own)])
    return Cell(re.sub(r"[^A-Za-z0-9.+=_-]+", "_", label), label, name, options, tasks, limit)


def _grid(options: dict) -> list[dict]:
    """Options, some of them lists -> every combination."""
    values = [v if isinstance(v, list) else [v] for v in options.values()]
    return [dict(zip(options, combination, strict=True)) for combination in itertools.product(*values)]


def _listed(tasks: str | list) -> tuple[str, ...]:
    return tuple(tasks.split(",")) if isinstance(tasks, str) else tuple(tasks)


def _weights(cell: Cell) -> tuple:
    return tuple(str(cell.options.get(k)) for k in WEIGHTS)


def run(recipe: Recipe, out: Path) -> list[dict]:
    """Run every cell that is not done yet -> the cells with ``status`` (done, failed), seconds and, when failed, the error.

    A cell that fails does not stop the others; what it answered is kept, and the next call goes on from there.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo = [c for c in recipe.cells if not _is_done(out, c)]
    say = _speaker()
    if len(todo) < len(recipe.cells):
        say(f"{len(recipe.cells) - len(todo)} of {len(recipe.cells)} cells are done in {out}")
    results, began, loaded, index = [], time.time(), None, None
    vlms: dict = {}
    for number, cell in enumerate(todo, 1):
        if _weights(cell) != loaded:
            vlms.clear()  # the weights before this are not needed again
            loaded = _weights(cell)
        spent = time.time() - began
        left = f", about {_clock(spent / (number - 1) * (len(todo) - number + 1))} left" if number > 1 else ""
        say(f"[{number}/{len(todo)}] {cell.label} on {','.join(cell.tasks)} ({_clock(spent)} so far{left})")
        start = time.time()
        try:
            index = index or _index(recipe)
            message = _attempt(cell, out, index, vlms)
        except Exception as error:  # processes that no longer agree cannot go on together
            say(f"    failed: {type(error).__name__}: {error}")
            raise
        if message:
            say(f"    failed: {message}")
        status = {"status": "failed", "error": message} if message else {"status": "done"}
        results.append({"cell": cell.name, "label": cell.label, **cell.spec, **status, "seconds": round(time.time() - start, 1)})
    before = [{"cell": c.name, "label": c.label, **c.spec, "status": "done"} for c in recipe.cells if c not in todo]
    _write(out / "sweep.json", json.dumps({"cells": before + results}, indent=1, default=str))
    return before + results


def share(recipe: Recipe, out: Path, stale: float = STALE_SECONDS) -> list[dict]:
    """Run cells that no other worker runs, until none is left -> all cells as ``run`` gives them, those of others too; ``running`` is a status.

    Any number of workers may share ``out``, on machines that all see it. A cell whose worker is dead is taken over, and goes on from its
    records; so a worker that finds all cells taken stays until each of their workers has been seen alive, ``stale`` seconds at most.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a worker is one process; start several workers on the same --out instead of several processes of one")
    claims, index, loaded = Claims(out / "claims", stale), None, None
    vlms: dict = {}
    say = _speaker()
    while found := _next_cell(recipe, out, claims, loaded):
        cell, path, before = found
        if before:
            say(
                f"{cell.label}: taken over from a worker that {'failed' if before.ended else 'is gone'} ({before.owner.get('host')})"
            )
        if _weights(cell) != loaded:
            vlms.clear()
            loaded = _weights(cell)
        say(f"{cell.label} on {','.join(cell.tasks)}")
        start = time.time()
        try:
            with claims.held(cell.name, path):
                index = index or _index(recipe)
                message = _attempt(cell, out, index, vlms)
        except TakenOver as error:
            say(f"    {error}")
            continue
        if message:
            say(f"    failed: {message}")
        claims.end(path, "failed" if message else "done", time.time() - start, message)
    cells = [{"cell": c.name, "label": c.label, **c.spec, **_status(out, c, claims)} for c in recipe.cells]
    draft = out / f".sweep-{os.getpid()}.tmp"
    draft.write_text(json.dumps({"cells": cells}, indent=1, default=str))
    os.replace(draft, out / "sweep.json")
    return cells


def _next_cell(recipe: Recipe, out: Path, claims: Claims, loaded: tuple | None) -> tuple[Cell, Path, Claim | None] | None:
    """A cell that this worker has claimed, its claim and the one before; None when all are done, ended, or run by workers that live.

    loaded: weights in memory, whose cells come first.
    """
    waiting_since = None
    while True:
        todo = [c for c in recipe.cells if not _is_done(out, c)]
        alive = True
        for cell in sorted(todo, key=lambda c: _weights(c) != loaded):
            claim = claims.on(cell.name)
            if claims.may_take(claim):
                path = claims.take(cell.name, claim)
                if path and not _is_done(out, cell):
                    return cell, path, claim
                if path:
                    claims.end(path, "done", 0)
                alive = False  # look again
            elif claim and not claim.ended:
                alive = alive and waiting_since is not None and claim.touched > waiting_since
        if alive:
            return None
        waiting_since = waiting_since or claims.now()
        time.sleep(min(2.0, claims.stale / 20))


def _status(out: Path, cell: Cell, claims: Claims) -> dict:
    """How a cell ended, or that another worker runs it."""
    claim = claims.on(cell.name)
    said = {k: claim.owner[k] for k in ("status", "seconds", "error") if k in claim.owner} if claim else {}
    if _is_done(out, cell):
        return said | {"status": "done"}
    return said if said.get("status") == "failed" else {"status": "running", "worker": claim.owner if claim else None}


def _attempt(cell: Cell, out: Path, index, vlms: dict) -> str | None:
    """Run a cell -> what went wrong with it, which also stands in its folder; None when it is done.

    Raises it where several processes run the cell together: they no longer agree.
    """
    try:
        _run_cell(cell, out, index, vlms)
    except Exception as error:  # whatever a cell's method, data or device raises is reported, and the next cell runs
        _write(out / "lmms" / cell.name / "error.txt", traceback.format_exc())
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise
        return f"{type(error).__name__}: {error}"
    return None


def _index(recipe: Recipe):
    from .lmms_run import task_index  # loads torch and lmms-eval

    return task_index(recipe.include_path)


def _run_cell(cell: Cell, out: Path, index, vlms: dict) -> None:
    from . import lmms_model, lmms_run

    name = cell.method if cell.method in registry.names() else lmms_model.COMPOSED
    options = cell.options if name == cell.method else cell.options | {"method": cell.method}
    model = getattr(lmms_model, name)(vlms=vlms, output_dir=out / "runs" / cell.name, label=cell.label, **options)
    try:
        lmms_run.evaluate(model, cell.tasks, cell.limit, index, out / "lmms" / cell.name)
    finally:
        model.run.close()
    (out / "lmms" / cell.name / "error.txt").unlink(missing_ok=True)
    _write(out / "lmms" / cell.name / "cell.json", json.dumps(cell.spec, indent=1, default=str))


def _is_done(out: Path, cell: Cell) -> bool:
    """Whether the cell ended before, with the same specification, and is whole: without documents that were left out."""
    run, scored = out / "runs" / cell.name / "run.json", out / "lmms" / cell.name / "cell.json"
    if not (run.is_file() and scored.is_file()):
        return False
    is_same = json.loads(scored.read_text()) == json.loads(json.dumps(cell.spec, default=str))
    data = json.loads(run.read_text())
    return is_same and data["status"] == "complete" and not data.get("left_out")


def _write(path: Path, text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _speaker():
    """Prints to stderr, on the first process only."""
    first = int(os.environ.get("RANK", 0)) == 0
    return lambda text: print(text, file=sys.stderr, flush=True) if first else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe in the package: nano, paper_table1")
    parser.add_argument("--out", type=Path, help="output folder (default: awares-runs/RECIPE); a second call resumes there")
    parser.add_argument("--limit", type=int, help="documents per task, for a trial (default: the recipe's)")
    parser.add_argument("--pretrained", help="checkpoint of every cell, in place of the recipe's")
    parser.add_argument("--batch-size", type=int, help="conversations in flight, in place of the recipe's")
    parser.add_argument(
        "--worker", action="store_true", help="share the recipe with other workers on the same --out: a cell at a time"
    )
    parser.add_argument(
        "--stale-after",
        type=float,
        default=STALE_SECONDS,
        metavar="SECONDS",
        help="with --worker: a cell whose worker gave no sign of life for so long is taken over (default: %(default)g)",
    )


def main(args: argparse.Namespace) -> int:
    recipe = read(args.recipe, args.limit, pretrained=args.pretrained, batch_size=args.batch_size)
    out = args.out or Path("awares-runs") / Path(args.recipe).stem
    if args.stale_after <= 0:
        raise ValueError(f"--stale-after is {args.stale_after:g}; it must be a number of seconds above 0")
    cells = share(recipe, out, args.stale_after) if args.worker else run(recipe, out)
    failed = [c for c in cells if c["status"] == "failed"]
    for cell in failed:
        print(f"failed: {cell['label']}: {cell['error']} (more in {out / 'lmms' / cell['cell'] / 'error.txt'})", file=sys.stderr)
    running = [c["label"] for c in cells if c["status"] == "running"]
    left = f"; other workers run {', '.join(running)}" if running else ""
    done = len(cells) - len(failed) - len(running)
    print(f"{done} of {len(cells)} cells are done in {out}{left}; awares-bench report {out}", file=sys.stderr)
    return 1 if failed else 0
