"""lmms-eval's own command for tests: in this process where the claim is about what it does, as a process where the claim is about one."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import subprocess
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from awares_bench.tasks import nano as nano_suite

FOLDER = Path(nano_suite.__file__).parent


def environment(cwd: Path) -> dict[str, str]:
    """Variables of a run in ``cwd``: nothing is fetched, and data sets are kept there."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return quiet | {"HF_DATASETS_CACHE": str(cwd / "cache")}


def lmms_eval_process(cwd: Path, *arguments, env: dict[str, str] | None = None, ranks: int = 0) -> str:
    """``python -m lmms_eval`` in a process of its own, or in ``ranks`` of them -> what it printed."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, "-m", "lmms_eval", *map(str, arguments)]
    more = os.environ | environment(cwd) | (env or {})
    done = subprocess.run(command, cwd=cwd, env=more, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


def lmms_eval(cwd: Path, *arguments) -> str:
    """What ``python -m lmms_eval`` calls, in this process -> what it printed; nothing of it stays but the files it wrote.

    KeyboardInterrupt comes through, an exit does not: of a process only the text would be read.
    """
    from lmms_eval.cli.dispatch import main

    printed = io.StringIO()
    try:
        with _as_a_process(cwd, ["lmms_eval", *map(str, arguments)]), redirect_stdout(printed), redirect_stderr(printed):
            main()
    except SystemExit:
        pass
    finally:
        gc.collect()  # the model, its open record file and its weights, which a process would take with it
    return printed.getvalue()


@contextmanager
def _as_a_process(cwd: Path, argv: list[str]):
    """What the command reads or sets of its process is new to it and is put back after it."""
    import accelerate.state
    from lmms_eval.api import task
    from loguru import logger

    shared = [getattr(accelerate.state, name)._shared_state for name in ("PartialState", "AcceleratorState", "GradientState")]
    kept = [dict(state) for state in shared]
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()
    variables, path = dict(os.environ), list(sys.path)
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), tasks_read_once():
            patch.chdir(cwd)
            patch.setattr(sys, "argv", argv)
            os.environ.update(environment(cwd))
            for name, value in (  # read from the variables when these are imported, which was before
                ("huggingface_hub.constants.HF_HUB_OFFLINE", True),
                ("datasets.config.HF_HUB_OFFLINE", True),
                ("datasets.config.HF_DATASETS_CACHE", cwd / "cache"),
            ):
                patch.setattr(name, value)
            task._resolve_hf_datasets_cache_dir.cache_clear()
            for state in shared:
                state.clear()
            yield
    finally:
        for state, before in zip(shared, kept, strict=True):
            state.clear()
            state.update(before)
        task._resolve_hf_datasets_cache_dir.cache_clear()
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:] = path
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])
        torch.set_rng_state(seeds[2])
        logger.remove()  # the command's own writes into its standard output
        logger.add(lambda text: sys.stdout.write(text), level="WARNING")


_index: dict[str, dict] = {}


@contextmanager
def tasks_read_once():
    """lmms-eval's own task files, over a thousand of them, are read once a process; a folder of tasks is read each time."""
    from lmms_eval import tasks

    read, own = tasks.TaskManager._get_task_and_group, str(Path(tasks.__file__).parent)

    def once(self, folder):
        if str(Path(folder)) != own:
            return read(self, folder)
        if own not in _index:
            _index[own] = read(self, folder)
        return deepcopy(_index[own])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.TaskManager, "_get_task_and_group", once)
        yield


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("records*.jsonl")) for line in path.read_text().splitlines()]


def samples(folder: Path) -> dict[str, list[dict]]:
    return {
        p.stem.split("_samples_")[1]: [json.loads(x) for x in p.read_text().splitlines()]
        for p in folder.rglob("*_samples_*.jsonl")
    }
