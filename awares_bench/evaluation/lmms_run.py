"""Tasks through lmms-eval's evaluator, in this process: a method's model as its command runs it, and its own model to compare with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import get_datetime_str
from PIL import Image

from awares_bench.inference.local_model import LocalModel
from awares_bench.models.packaged import resolve

from .lmms_model import MethodModel

REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""What lmms-eval's command strips from answers before scoring, unless told otherwise."""


def task_index(include_path: str | None = None) -> TaskManager:
    """lmms-eval's tasks and this package's, and those of a folder, whose own win over others of the same name (lmms-eval takes the first).

    A task is loaded anew, its module's globals too, each time.
    """
    folders = [*([include_path] if include_path else []), str(files("awares_bench.tasks") / ".")]
    return TaskManager("WARNING", include_path=folders)


def evaluate(model: MethodModel, tasks: tuple[str, ...], limit: int | None, index: TaskManager, output: Path) -> None:
    """One model on tasks through lmms-eval's evaluator, with what its command does: results and samples files below ``output``.

    Raises ValueError for a task that ``index`` does not have.
    """
    unknown = [task for task in tasks if not index.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"unknown task {unknown[0]!r}; lmms-eval tasks list shows its own, awares-bench tasks the folder of ours; a task file "
            "of your own is found with include_path: FOLDER in the recipe"
        )
    output.mkdir(parents=True, exist_ok=True)
    arguments = f"pretrained={model.run.identity['pretrained']},label={model.label}"
    settings = Namespace(
        output_path=str(output), process_with_media=False, reasoning_tags=REASONING_TAGS, log_samples=True, limit=limit
    )
    now = get_datetime_str()
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=index.match_tasks(list(tasks)),
        limit=limit,
        batch_size=model.batch_size,
        log_samples=True,
        task_manager=index,
        bootstrap_iters=0,  # reports draw their own intervals
        cli_args=settings,
        datetime_str=now,
        verbosity="WARNING",
    )
    if results is None:  # only the first process gets them
        return
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.log_experiment_args(model.method, arguments, None, None, False)
    for task, left_out in model.left_out.items():
        results["n-samples"][task]["effective"] -= len(left_out)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=now)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    if not list(output.rglob(f"{now}_results.json")):  # the tracker only logs when it cannot write
        raise OSError(f"lmms-eval could not save its results to {output}")


def stock_answers(pretrained: str, vlm: LocalModel, batch_size: int) -> Callable[[list[tuple[Image.Image, str]], int], list[str]]:
    """lmms-eval's own model of this family on the same weights, limits and dtype -> a function of pairs of (picture, question) and of
    the number of new tokens, which gives their answers.

    For comparison (``awares-bench bench engine``). Raises ImportError when a package it needs is not installed.
    """
    if missing := [name for name in vlm.host.stock_packages if find_spec(name) is None]:
        raise ImportError(f"No module named {missing[0]!r}")
    stock_model = get_model(vlm.host.model_types[0])
    limits = {"min_pixels": vlm.host.limits["shortest_edge"], "max_pixels": vlm.host.limits["longest_edge"]}
    device = {"device": str(vlm.device), "device_map": str(vlm.device)}
    model = stock_model(resolve(pretrained), batch_size=batch_size, attn_implementation="sdpa", **device, **limits)
    model._model = model._model.to(vlm.host.model.dtype)

    def answers(documents: list[tuple], max_new_tokens: int) -> list[str]:
        model.task_dict = {"bench": {"test": documents}}
        requests = []
        for i in range(len(documents)):
            arguments = ("", _as_messages, {"max_new_tokens": max_new_tokens}, i, "bench", "test")
            requests.append(Instance("generate_until", arguments, 0, {"task": "bench", "doc_id": i, "repeats": 1}))
        return [r.text for r in model.generate_until(requests)]

    return answers


def _as_messages(document: tuple) -> list[dict]:
    image, question = document
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]}]
