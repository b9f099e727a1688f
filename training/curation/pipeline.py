"""From questions and images to trajectories, in stages whose results can be inspected and resumed. Paper Sec. 3.2 and 4.2.

``rows``     the questions, with answers and, where the data has them, evidence boxes
``answers``  what the base model answers at half and at full resolution
``labels``   the judge's verdict, and the label: low resolution is enough (LR) or not (HR)
``crops``    for HR: the crops that the evidence boxes map to, or that a search finds

The results are ``trajectories.parquet`` (for SFT), ``labels.parquet`` (for GRPO) and ``summary.json``. Each stage is a folder of
parquet chunks; a chunk that exists is not computed again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tqdm import tqdm

from awares_bench.awares import AwaRes
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel, SampledReply
from awares_bench.methods.conversation import Failure, Sample
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.registry import build
from awares_bench.tasks.nano import world

from .. import examples, recipe
from ..recipe import Recipe, RecipeError, acquire_run_folder, option
from ..rollouts import SamplingModel
from ..trainer import device_of, open_vlm
from . import crop_oracles, judges

NANO_START = 8 << 36
"""First of the training seeds that curation draws nano documents from."""


@dataclass(frozen=True)
class Curate(Recipe):
    """A recipe of curation. ``start`` is the base model; ``data`` are rows (see ``examples``), or ``nano:COUNT``."""

    split: str = option("train")
    columns: dict = option({})  # noqa: RUF009
    """Our name of a column -> the dataset's, such as ``{answers: answer, question: query}``."""
    suffix: str = option("")
    """What the task appends to a question."""
    limit: int = option(-1, low=-1)
    """Rows to use; -1 uses all."""
    batch: int = option(16, low=1, log_only=True)
    """Conversations in flight."""
    max_new_tokens: int = option(32, low=1)
    judge: str = option("anls", one_of=("exact", "relaxed", "anls", "local", "endpoint"))
    """What decides whether an answer is right: a rule, or a language model ``local`` or at an ``endpoint`` (paper: of 70B)."""
    judge_model: str = option("")
    judge_url: str = option("")
    second_judge: str = option("", one_of=("", *judges.RULES))
    """A rule whose labels are compared with the judge's, as in paper Table 2; by default none."""
    ties: str = option("split", one_of=("split", "paper"))
    """``split``: both answers right is LR, both wrong drops the row. ``paper``: both are LR."""
    sure: float = option(0.0, low=0, high=1)
    """Lowest probability of the base model's half-size answer that counts as knowing it. A right answer below it is taken for a
    guess, and labelled HR if full resolution is right too. 0 labels as the paper does."""
    oracle: str = option("search", one_of=("boxes", "search", "endpoint"))
    """Source of crops: the data's ``boxes``, a ``search`` on the base model, or an ``endpoint``'s grounding model (paper)."""
    oracle_model: str = option("")
    oracle_url: str = option("")
    mapping: str = option("coverage", one_of=("coverage", "iou_argmax", "iou_literal"))
    """How boxes map to crops: see ``crop_oracles.crops_for``."""
    chunk: int = option(256, low=1)
    """Rows of a parquet chunk."""
    parallel: int = option(8, low=1, high=256, log_only=True)
    """Questions sent to an endpoint at once. A local judge takes them one by one."""


RECIPE = Curate


def run_stage(out: Path, name: str, rows: list[dict], chunk: int, work: Callable[[list[dict]], list[dict]]) -> list[dict]:
    """Apply ``work`` to chunks of rows and keep each result as parquet, in ``out/name``; read the chunks that exist."""
    import pyarrow
    from pyarrow import parquet

    results: list[dict] = []
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(rows), chunk), desc=name, disable=None):
        path = folder / f"{start:07d}.parquet"
        if not path.exists():
            parquet.write_table(pyarrow.Table.from_pylist(work(rows[start : start + chunk])), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        results += parquet.read_table(path).to_pylist()
    return results


def load_rows(recipe: Curate):
    """The recipe's rows as a table whose images are not decoded. Raises DataError, BoxError, RecipeError."""
    if recipe.data.startswith("nano:"):
        return asked_nano_rows(recipe.data, recipe.seed)
    table = examples.rows(recipe.data, ("image", "question", "answers"), recipe.columns, recipe.split)
    if recipe.limit > 0:
        table = table.select(range(min(recipe.limit, len(table))))
    if recipe.oracle == "boxes":
        if "boxes" not in table.column_names:
            raise examples.DataError(f"{recipe.data!r} has no column boxes; map one with columns, or set oracle: search")
        for i, row in enumerate(table):
            image = examples.pictures(row, 10**9)[0]
            crop_oracles.check_boxes(row["boxes"] or [], *image.size, where=f"row {i}")
    return table


def asked_nano_rows(data: str, seed: int = 0, labelled: bool = False):
    """``nano:COUNT`` -> so many ``nano_rows``. Raises RecipeError for anything else."""
    count = data.removeprefix("nano:")
    if not count.isdigit() or not int(count):
        raise RecipeError(f"data is {data!r}; nano rows are asked for as nano:COUNT, such as nano:4000")
    return nano_rows(int(count), seed, labelled)


def nano_rows(count: int, seed: int = 0, labelled: bool = False):
    """Nano documents of training seeds as a table. labelled: with the label of the world, which needs no model's answers."""
    from datasets import Dataset, Image

    rows = []
    for i in range(count):
        family = world.FAMILIES[i % len(world.FAMILIES)]
        document, png = world.document(family, NANO_START + seed * 2**24 + i), io.BytesIO()
        document.image.save(png, "PNG")
        rows.append(
            {
                "id": f"{document.family}-{document.seed}",
                "image": {"bytes": png.getvalue(), "path": None},
                "question": world.prompt(document.family, document.question, document.options),
                "answers": [document.answer],
                "boxes": [list(box) for box in document.evidence],
            }
            | ({"label": "LR" if document.low_is_enough else "HR"} if labelled else {})
        )
    return Dataset.from_list(rows).cast_column("image", Image(decode=False))


def run(recipe: Curate, say: Callable[[str], None] = print) -> dict:
    """Run all stages -> the summary, which is also written.

    Raises DataError, BoxError, RecipeError, JudgeError before a model is loaded when rows or recipe cannot be used.
    """
    # 1) Check everything that needs no model.
    table = load_rows(recipe)
    judge = judges.judge(recipe.judge, recipe.judge_model, recipe.judge_url, device_of(recipe))
    if recipe.oracle == "endpoint" and not (recipe.oracle_model and recipe.oracle_url):
        raise RecipeError("oracle: endpoint needs oracle_model and oracle_url")
    out = acquire_run_folder(recipe, "curate")

    @cache
    def model() -> LocalModel:  # loaded when a stage first needs it: not at all when its chunks exist
        return open_vlm(recipe)

    # 2) Answer, label, and find crops for the rows that need them.
    indices = [{"index": i} for i in range(len(table))]
    answered = run_stage(out, "answers", indices, recipe.chunk, lambda rows: answer_rows(recipe, table, rows, model()))
    labelled = run_stage(out, "labels", answered, recipe.chunk, lambda rows: label_rows(recipe, table, rows, judge))
    hard = [r for r in labelled if r["label"] == "HR"]
    cropped = run_stage(out, "crops", hard, recipe.chunk, lambda rows: crop_rows(recipe, table, rows, model))

    # 3) Write what the trainers read, and a summary.
    summary = summarise(recipe, labelled, cropped)
    _write(recipe, table, labelled, {r["index"]: tuple(r["crops"]) for r in cropped}, out)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    say(json.dumps(summary, indent=1))
    return summary


def _question(recipe: Curate, row: dict) -> str:
    return row["question"] + recipe.suffix


def _sample(recipe: Curate, row: dict, index: int) -> Sample:
    return replace(examples.sample(row, index, recipe.largest_side), question=_question(recipe, row))


def answer_rows(recipe: Curate, table, rows: list[dict], vlm: LocalModel) -> list[dict]:
    """The base model's greedy answers at half (``low``) and at full resolution (``full``).

    ``error`` says why a row could not be answered; ``sure`` is the probability of the answer at half resolution, or None where
    the recipe does not ask for it.
    """
    results = [dict(row, sure=None) for row in rows]
    for name in ("low", "full"):
        samples = [_sample(recipe, table[row["index"]], row["index"]) for row in rows]
        jobs = [Job(sample, recipe.max_new_tokens) for sample in samples]
        policy, needs_logprobs = build(name, {}).policy, name == "low" and recipe.sure > 0
        if needs_logprobs:
            outcomes = Engine(SamplingModel(vlm, 0.0), policy, recipe.batch).run(jobs)
        else:
            outcomes = Engine(vlm, policy, recipe.batch).run(jobs)
        for i, outcome in outcomes:
            if isinstance(outcome, Failure):
                results[i] |= {name: None, "error": outcome.error}
                continue
            results[i] |= {name: outcome.answer, "error": results[i].get("error")}
            if isinstance(last := outcome.replies[-1], SampledReply):
                results[i]["sure"] = math.exp(sum(last.logprobs))
    return results


def label_rows(recipe: Curate, table, rows: list[dict], judge) -> list[dict]:
    """The verdict (0 no difference, 1 low better, 2 full better) and the label of each row, None where there is none.

    A judge that compares (``judges.Chat``) gives the verdict; otherwise the recipe's rule does.
    """
    rule = _rule(recipe)
    # 1) Ask a judge that compares, several questions at once where it is a server.
    verdicts = {}
    if compare := getattr(judge, "compare", None):
        questions = {
            r["index"]: (_question(recipe, row), examples.answers(row), r["low"], r["full"])
            for r in rows
            if r["error"] is None and (row := table[r["index"]])
        }
        with ThreadPoolExecutor(recipe.parallel if recipe.judge == "endpoint" else 1) as pool:
            verdicts = dict(zip(questions, pool.map(lambda q: compare(*q), questions.values()), strict=True))

    results = []
    for r in rows:
        result = dict(r, verdict=None, right_low=None, right_full=None, label=None, second=None)
        results.append(result)
        if r["error"] is not None:
            continue
        row = table[r["index"]]
        question, accepted = _question(recipe, row), examples.answers(row)
        # 2) The verdict; a right half-size answer that the model was not sure of counts as a guess.
        low, full = (rule(question, accepted, r[name]) >= 0.5 for name in ("low", "full"))
        result["right_low"], result["right_full"] = low, full
        result["verdict"] = verdicts[r["index"]] if compare else _verdict(low, full)
        if recipe.sure and low and full and r["sure"] < recipe.sure:
            result["verdict"] = 2
        # 3) The label, and the one that a second judge gives.
        result["label"] = _label(result["verdict"], low or full, recipe.ties)
        if recipe.second_judge:
            other = judges.judge(recipe.second_judge)
            low, full = (other(question, accepted, r[name]) >= 0.5 for name in ("low", "full"))
            result["second"] = _label(_verdict(low, full), low or full, recipe.ties)
    return results


def _rule(recipe: Curate) -> judges.Judge:
    """The rule that says whether a single answer is right: the recipe's judge where it is one, else ANLS."""
    return judges.judge(recipe.judge) if recipe.judge in judges.RULES else judges.anls


def _verdict(low: bool, full: bool) -> int:
    """Which answers are right -> 0 no difference, 1 low better, 2 full better."""
    return 0 if low == full else 2 if full else 1


def _label(verdict: int | None, any_right: bool, ties: str) -> str | None:
    if verdict is None:
        return None
    if verdict:
        return "HR" if verdict == 2 else "LR"
    return "LR" if any_right or ties == "paper" else None


def crop_rows(recipe: Curate, table, rows: list[dict], model: Callable[[], LocalModel]) -> list[dict]:
    """The crops of rows that need them, and the evidence boxes that they come from; empty where the oracle finds none."""
    results, policy, rule = [], AwaRes(), _rule(recipe)
    endpoint = judges.Endpoint(recipe.oracle_url, recipe.oracle_model) if recipe.oracle == "endpoint" else None
    for r in rows:
        row, boxes = table[r["index"]], []
        if recipe.oracle == "search":
            vlm, sample = model(), _sample(recipe, row, r["index"])
            names = crop_oracles.search(vlm, policy, sample, examples.answers(row), rule, recipe.max_new_tokens)
        else:
            image = examples.pictures(row, 10**9)[0]
            if endpoint is None:
                boxes = crop_oracles.check_boxes(row["boxes"] or [], *image.size)
            else:
                boxes = crop_oracles.ground(endpoint, image, row["question"], examples.answers(row)[0]) or []
            names = crop_oracles.crops_for(boxes, *image.size, recipe.mapping)
        results.append({"index": r["index"], "boxes": [list(b) for b in boxes], "crops": list(names)})
    return results


def _write(recipe: Curate, table, labelled: list[dict], crops: dict[int, tuple[str, ...]], out: Path) -> None:
    """Write the two files that the trainers read. Rows without a label, and HR rows without crops, are left out."""
    from datasets import Dataset, Image, Sequence, Value, concatenate_datasets
    from datasets import Features as Schema

    usable = [r for r in labelled if r["label"] == "LR" or crops.get(r["index"])]
    if not usable:
        raise examples.DataError(f"no row got a label with crops to match; see the chunks in {out}")

    # 1) The columns that curation decides.
    text, texts = Value("string"), Sequence(Value("string"))
    schema = {"id": text, "question": text, "answers": texts, "label": text, "crops": texts, "replies": texts}
    columns: dict[str, list] = {name: [] for name in schema}
    for r in usable:
        row, names = table[r["index"]], crops.get(r["index"], ()) if r["label"] == "HR" else ()
        accepted = examples.answers(row)
        columns["id"].append(str(row.get("id", r["index"])))
        columns["question"].append(_question(recipe, row))
        columns["answers"].append(list(accepted))
        columns["label"].append(r["label"])
        columns["crops"].append(list(names))
        columns["replies"].append([PAPER_GRID.format(names), accepted[0]] if names else [accepted[0]])

    # 2) The pictures beside them, as they were read.
    selected = table.select([r["index"] for r in usable])
    pictures = "image" if "image" in selected.column_names else "images"
    rows = concatenate_datasets([selected.select_columns([pictures]), Dataset.from_dict(columns, Schema(schema))], axis=1)
    rows = rows.cast_column(pictures, Image() if pictures == "image" else Sequence(Image()))
    for name, final in (("trajectories", rows), ("labels", rows.remove_columns("replies"))):
        final.to_parquet(out / f"{name}.tmp")
        os.replace(out / f"{name}.tmp", out / f"{name}.parquet")


def summarise(recipe: Curate, labelled: list[dict], cropped: list[dict]) -> dict:
    """Counts, label shares, crop shares, and the agreement of two judges."""
    labels = Counter(r["label"] or "dropped" for r in labelled)
    chosen = Counter("+".join(r["crops"]) or "none" for r in cropped)
    with_label = [r for r in labelled if r["label"]]
    hard = sum(r["label"] == "HR" for r in with_label)
    out = {
        "rows": len(labelled),
        "failed": sum(r["error"] is not None for r in labelled),
        "labels": dict(labels),
        "share_HR": round(hard / len(with_label), 4) if with_label else None,
        "right_low": _share(labelled, "right_low"),
        "right_full": _share(labelled, "right_full"),
        "lucky": round(sum(r["label"] == "HR" and r["right_low"] for r in with_label) / len(with_label), 4)
        if with_label
        else None,
        "crops": dict(chosen.most_common()),
        "share_without_crops": round(chosen["none"] / len(cropped), 4) if cropped else None,
        "mean_area_of_HR": round(sum(PAPER_GRID.area(r["crops"]) for r in cropped) / len(cropped), 4) if cropped else None,
    }
    if recipe.second_judge:
        pairs = [(r["label"], r["second"]) for r in labelled if r["label"] and r["second"]]
        out["agreement"] = {
            "share": round(sum(a == b for a, b in pairs) / len(pairs), 4) if pairs else None,
            "judge, second": {f"{a}, {b}": n for (a, b), n in sorted(Counter(pairs).items())},
        }
    return out


def _share(rows: list[dict], name: str) -> float | None:
    values = [r[name] for r in rows if r[name] is not None]
    return round(sum(map(bool, values)) / len(values), 4) if values else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe.add_arguments(parser, "nano_curate")


def main(args: argparse.Namespace) -> int:
    """``awares-bench curate``."""
    run(recipe.load(RECIPE, args.recipe, args.set))
    return 0
