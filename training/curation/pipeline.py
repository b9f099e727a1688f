"""From questions and images to trajectories, in stages that can be cut and looked at.

``rows``     the questions, with answers and perhaps evidence boxes
``answers``  what the base model says at low and at full resolution
``labels``   the judge's verdict and the label: low resolution is enough (LR) or not (HR)
``crops``    for HR: evidence boxes and the crops they map to, or the crops found by search
Then ``trajectories.parquet`` (for SFT), ``labels.parquet`` (for GRPO) and ``summary.json``. Each stage is a folder of parquet
chunks; a chunk that is there is not made again. Paper Sec. 3.2 and 4.2.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from awares_bench.awares import AwaRes
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import VLM
from awares_bench.methods.conversation import Failure, Trajectory
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.registry import build
from awares_bench.tasks.nano import world

from .. import examples
from ..packing import Features
from ..recipe import RecipeError, Run, claim, key
from ..rollouts import InStep, Sampler
from ..trainer import device_of, open_vlm
from . import crop_oracles, judges

NANO_START = 8 << 36
"""First of the training seeds that curation draws nano documents from."""


@dataclass(frozen=True)
class Curate(Run):
    """A recipe of curation. ``start`` is the base model; ``data`` rows (see ``examples``), or ``nano:COUNT``.

    columns:    our column -> the dataset's, such as ``{answers: answer, question: query}``
    suffix:     what the task appends to a question
    judge:      ``exact``, ``relaxed``, ``anls``, ``local`` or ``endpoint`` (paper: a 70B language model)
    second_judge: a rule whose labels are compared with the judge's, as paper Table 2 does; none by default
    ties:       ``split``: both right is LR, both wrong is dropped; ``paper``: both are LR
    sure:       probability that the base model must give its whole half-size answer for that to be enough; a right one below it
                is a lucky guess, labelled HR where full size is right. 0, the default, labels as the paper does
    oracle:     ``boxes`` of the dataset, ``search`` on the base model, ``endpoint`` of a grounding model (paper)
    parallel:   questions put to an endpoint at once; a local judge takes them one by one
    mapping:    ``coverage``, ``iou_argmax`` or ``iou_literal`` (paper Eq. 3), see ``oracles.crops_for``
    """

    split: str = key("train")
    columns: dict = key({})  # noqa: RUF009
    suffix: str = key("")
    limit: int = key(-1, low=-1)
    batch: int = key(16, low=1, log_only=True)
    max_new_tokens: int = key(32, low=1)
    judge: str = key("anls", one_of=("exact", "relaxed", "anls", "local", "endpoint"))
    judge_model: str = key("")
    judge_url: str = key("")
    second_judge: str = key("", one_of=("", *judges.RULES))
    ties: str = key("split", one_of=("split", "paper"))
    sure: float = key(0.0, low=0, high=1)
    oracle: str = key("search", one_of=("boxes", "search", "endpoint"))
    oracle_model: str = key("")
    oracle_url: str = key("")
    mapping: str = key("coverage", one_of=("coverage", "iou_argmax", "iou_literal"))
    chunk: int = key(256, low=1)
    parallel: int = key(8, low=1, high=256, log_only=True)


RECIPE = Curate


def staged(out: Path, name: str, rows: list[dict], chunk: int, work: Callable[[list[dict]], list[dict]]) -> list[dict]:
    """Apply ``work`` to chunks of rows, keeping each result as parquet; chunks that are there are read."""
    import pyarrow
    from pyarrow import parquet

    made: list[dict] = []
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(rows), chunk), desc=name, disable=None):
        path = folder / f"{start:07d}.parquet"
        if not path.exists():
            parquet.write_table(pyarrow.Table.from_pylist(work(rows[start : start + chunk])), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        made += parquet.read_table(path).to_pylist()
    return made


def source(recipe: Curate):
    """The recipe's rows as a table whose images are not decoded. Raises DataError, BoxError."""
    if recipe.data.startswith("nano:"):
        return _nano(recipe)
    table = examples.rows(recipe.data, ("image", "question", "answers"), recipe.columns, recipe.split)
    if recipe.limit > 0:
        table = table.select(range(min(recipe.limit, len(table))))
    if recipe.oracle == "boxes":
        if "boxes" not in table.column_names:
            raise examples.DataError(f"{recipe.data!r} has no column boxes; map one with columns, or set oracle: search")
        for i, row in enumerate(table):
            image = examples.pictures(row, 10**9)[0]
            crop_oracles.checked(row["boxes"] or [], *image.size, where=f"row {i}")
    return table


def _nano(recipe: Curate):
    count = recipe.data.removeprefix("nano:")
    if not count.isdigit() or not int(count):
        raise RecipeError(f"data is {recipe.data!r}; nano rows are asked for as nano:COUNT, such as nano:4000")
    return nano_rows(int(count), recipe.seed)


def nano_rows(count: int, seed: int = 0, labelled: bool = False):
    """Nano documents of training seeds as a table. labelled: with the label that the world gives, not a model's answers."""
    from datasets import Dataset, Image

    w, rows = world, []
    for i in range(count):
        d, encoded = w.document(w.FAMILIES[i % len(w.FAMILIES)], NANO_START + seed * 2**24 + i), io.BytesIO()
        d.image.save(encoded, "PNG")
        rows.append(
            {
                "id": f"{d.family}-{d.seed}",
                "image": {"bytes": encoded.getvalue(), "path": None},
                "question": w.prompt(d.family, d.question, d.options),
                "answers": [d.answer],
                "boxes": [list(b) for b in d.evidence],
            }
            | ({"label": "LR" if d.low_is_enough else "HR"} if labelled else {})
        )
    return Dataset.from_list(rows).cast_column("image", Image(decode=False))


def run(recipe: Curate, say: Callable[[str], None] = print) -> dict:
    """All stages -> the summary, which is also written. Raises before the model is loaded when the rows cannot be used."""
    table = source(recipe)
    grader = judges.judge(recipe.judge, recipe.judge_model, recipe.judge_url, device_of(recipe))
    if recipe.oracle == "endpoint" and not (recipe.oracle_model and recipe.oracle_url):
        raise RecipeError("oracle: endpoint needs oracle_model and oracle_url")
    out = claim(recipe, "curate")
    vlm: list[VLM] = []  # loaded when a stage first needs it

    def model() -> VLM:
        if not vlm:
            vlm.append(open_vlm(recipe))
        return vlm[0]

    rows = [{"index": i} for i in range(len(table))]
    answered = staged(out, "answers", rows, recipe.chunk, lambda some: answer(recipe, table, some, model()))
    labelled = staged(out, "labels", answered, recipe.chunk, lambda some: label(recipe, table, some, grader))
    hard = [r for r in labelled if r["label"] == "HR"]
    cropped = staged(out, "crops", hard, recipe.chunk, lambda some: crop(recipe, table, some, model))
    summary = summarise(recipe, labelled, cropped)
    _write(recipe, table, labelled, {r["index"]: tuple(r["crops"]) for r in cropped}, out)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    say(json.dumps(summary, indent=1))
    return summary


def _question(recipe: Curate, row: dict) -> str:
    return row["question"] + recipe.suffix


def answer(recipe: Curate, table, some: list[dict], vlm: VLM) -> list[dict]:
    """Stage a: the base model's greedy answers at half and at full size, and how likely it found the one at half size."""
    found = [dict(r, sure=None) for r in some]
    for name in ("low", "full"):
        samples = [examples.sample(table[r["index"]], r["index"], recipe.largest_side) for r in some]
        jobs = [Job(type(s)(s.images, s.question + recipe.suffix, s.key), recipe.max_new_tokens) for s in samples]
        policy, likely = build(name, {}).policy, name == "low" and recipe.sure
        for i, outcome in _likely(vlm, policy, jobs, recipe.batch) if likely else Engine(vlm, policy, recipe.batch).run(jobs):
            if isinstance(outcome, Failure):
                found[i] |= {name: None, "error": outcome.error}
                continue
            found[i] |= {name: outcome.answer, "error": found[i].get("error")}
            if likely:
                found[i]["sure"] = math.exp(sum(outcome.replies[-1].logps))
    return found


def _likely(vlm: VLM, policy, jobs: list[Job], batch: int) -> Iterator[tuple[int, Trajectory | Failure]]:
    """As the engine's run, with the log-probabilities of the greedy replies."""
    features = Features(vlm, 0)
    for start in range(0, len(jobs), batch):
        for i, outcome in InStep(Sampler(vlm, features, 0.0), policy).run(jobs[start : start + batch]):
            yield start + i, outcome


def label(recipe: Curate, table, some: list[dict], grader) -> list[dict]:
    """Stages b and c: verdict (0 no difference, 1 low better, 2 full better), then the label, null where none is deserved."""
    out, rule, verdicts = [], judges.judge(recipe.judge) if recipe.judge in judges.RULES else judges.anls, {}
    compare = getattr(grader, "compare", None)
    if compare:
        with ThreadPoolExecutor(recipe.parallel if recipe.judge == "endpoint" else 1) as pool:
            asked = {
                r["index"]: (_question(recipe, row), examples.answers(row), r["low"], r["full"])
                for r in some
                if r["error"] is None and (row := table[r["index"]])
            }
            verdicts = dict(zip(asked, pool.map(lambda a: compare(*a), asked.values()), strict=True))
    for r in some:
        row = table[r["index"]]
        accepted, made = examples.answers(row), dict(r, verdict=None, right_low=None, right_full=None, label=None, second=None)
        if r["error"] is None:
            question = _question(recipe, row)
            made["right_low"], made["right_full"] = (rule(question, accepted, r[x]) >= 0.5 for x in ("low", "full"))
            by_rule = 2 * made["right_full"] if made["right_full"] != made["right_low"] else 0
            by_rule = 1 if made["right_low"] and not made["right_full"] else by_rule
            made["verdict"] = verdicts[r["index"]] if compare else by_rule
            if recipe.sure and made["right_low"] and made["right_full"] and r["sure"] < recipe.sure:
                made["verdict"] = 2
            made["label"] = _label(made["verdict"], made["right_low"] or made["right_full"], recipe.ties)
            if recipe.second_judge:
                other = judges.judge(recipe.second_judge)
                low, full = (other(question, accepted, r[x]) >= 0.5 for x in ("low", "full"))
                made["second"] = _label(2 if full and not low else 1 if low and not full else 0, low or full, recipe.ties)
        out.append(made)
    return out


def _label(verdict: int | None, any_right: bool, ties: str) -> str | None:
    if verdict is None:
        return None
    if verdict:
        return "HR" if verdict == 2 else "LR"
    return "LR" if any_right or ties == "paper" else None


def crop(recipe: Curate, table, some: list[dict], model: Callable[[], VLM]) -> list[dict]:
    """Stages d and e: crops of the questions that need them; empty where the oracle finds none."""
    out, policy = [], AwaRes()
    rule = judges.judge(recipe.judge) if recipe.judge in judges.RULES else judges.anls
    for r in some:
        row = table[r["index"]]
        boxes = None
        names: tuple[str, ...] = ()
        if recipe.oracle == "search":
            vlm = model()
            sample = examples.sample(row, r["index"], recipe.largest_side)
            sample = type(sample)(sample.images, _question(recipe, row), sample.key)
            names = crop_oracles.search(
                vlm, policy, sample, examples.answers(row), rule, Features(vlm, 64), recipe.max_new_tokens
            )
        else:
            image = examples.pictures(row, 10**9)[0]
            if recipe.oracle == "boxes":
                boxes = crop_oracles.checked(row["boxes"] or [], *image.size)
            else:
                endpoint = judges.Endpoint(recipe.oracle_url, recipe.oracle_model)
                boxes = crop_oracles.ground(endpoint, image, row["question"], examples.answers(row)[0])
            names = crop_oracles.crops_for(boxes or [], *image.size, recipe.mapping)
        out.append({"index": r["index"], "boxes": [list(b) for b in boxes or []], "crops": list(names)})
    return out


def _write(recipe: Curate, table, labelled: list[dict], crops: dict[int, tuple[str, ...]], out: Path) -> None:
    """Stage f: the two files that the trainers read."""
    from datasets import Dataset, Image, Sequence, Value, concatenate_datasets
    from datasets import Features as Schema

    keep = [r for r in labelled if r["label"] == "LR" or crops.get(r["index"])]
    if not keep:
        raise examples.DataError(f"no row got a label with crops to match; see the chunks in {out}")
    picked = table.select([r["index"] for r in keep])
    extra: dict[str, list] = {"id": [], "question": [], "answers": [], "label": [], "crops": [], "replies": []}
    for r in keep:
        row, names = table[r["index"]], crops.get(r["index"], ()) if r["label"] == "HR" else ()
        accepted = examples.answers(row)
        extra["id"].append(str(row.get("id", r["index"])))
        extra["question"].append(_question(recipe, row))
        extra["answers"].append(list(accepted))
        extra["label"].append(r["label"])
        extra["crops"].append(list(names))
        extra["replies"].append([PAPER_GRID.format(names), accepted[0]] if names else [accepted[0]])
    texts = Sequence(Value("string"))
    schema = {
        "id": Value("string"),
        "question": Value("string"),
        "answers": texts,
        "label": Value("string"),
        "crops": texts,
        "replies": texts,
    }
    pictures = "image" if "image" in picked.column_names else "images"
    whole = concatenate_datasets([picked.select_columns([pictures]), Dataset.from_dict(extra, Schema(schema))], axis=1)
    whole = whole.cast_column(pictures, Image() if pictures == "image" else Sequence(Image()))
    for name in ("trajectories", "labels"):
        final = whole if name == "trajectories" else whole.remove_columns("replies")
        final.to_parquet(out / f"{name}.tmp")
        os.replace(out / f"{name}.tmp", out / f"{name}.parquet")


def summarise(recipe: Curate, labelled: list[dict], cropped: list[dict]) -> dict:
    """Counts, label shares, crop shares, and the agreement of two judges."""
    labels = Counter(r["label"] or "dropped" for r in labelled)
    chosen = Counter("+".join(r["crops"]) or "none" for r in cropped)
    known = [r for r in labelled if r["label"]]
    hr = sum(r["label"] == "HR" for r in known)
    out = {
        "rows": len(labelled),
        "failed": sum(r["error"] is not None for r in labelled),
        "labels": dict(labels),
        "share_HR": round(hr / len(known), 4) if known else None,
        "right_low": _share(labelled, "right_low"),
        "right_full": _share(labelled, "right_full"),
        "lucky": round(sum(r["label"] == "HR" and r["right_low"] for r in known) / len(known), 4) if known else None,
        "crops": dict(chosen.most_common()),
        "share_without_crops": round(chosen["none"] / len(cropped), 4) if cropped else None,
        "mean_area_of_HR": round(sum(PAPER_GRID.area(r["crops"]) for r in cropped) / len(cropped), 4) if cropped else None,
    }
    if recipe.second_judge:
        both = [(r["label"], r["second"]) for r in labelled if r["label"] and r["second"]]
        out["agreement"] = {
            "share": round(sum(a == b for a, b in both) / len(both), 4) if both else None,
            "judge, second": {f"{a}, {b}": n for (a, b), n in sorted(Counter(both).items())},
        }
    return out


def _share(rows: list[dict], name: str) -> float | None:
    known = [r[name] for r in rows if r[name] is not None]
    return round(sum(map(bool, known)) / len(known), 4) if known else None
