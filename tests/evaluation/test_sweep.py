"""A recipe as one command: cells, resume, failures, and scores as lmms-eval's own command saves them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from awares_bench import cli
from awares_bench.evaluation import lmms_run, run_options, sweep
from awares_bench.methods import registry
from awares_bench.methods.pruner import Pruner

from ..helpers.lmms_runs import FOLDER, lmms_eval, samples

pytestmark = pytest.mark.usefixtures("task_files_read_once")


def recipe(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_lists_become_a_cell_for_each_combination(tmp_path):
    text = """
    tasks: nano_doc,nano_pope
    batch_size: 4
    options: {pretrained: nano, min_pixels: 6272}
    methods:
      - full
      - {method: [pooling, random_tokens], retention: [0.25, 0.5]}
      - {method: full, pretrained: nano-base}
      - {method: awares, pruner: pooling, retention: 0.5, label: both}
    """
    cells = sweep.read(recipe(tmp_path, text), limit=3).cells
    assert [c.label for c in cells] == [
        "full",
        "pooling retention=0.25",
        "pooling retention=0.5",
        "random_tokens retention=0.25",
        "random_tokens retention=0.5",
        "both",
        "full pretrained=nano-base",  # cells that share weights run one after the other
    ]
    assert cells[1].name == "pooling_retention=0.25" and cells[1].limit == 3 and cells[1].tasks == ("nano_doc", "nano_pope")
    assert cells[1].options == {"batch_size": 4, "pretrained": "nano", "min_pixels": 6272, "retention": 0.25}


def test_a_cell_may_have_every_option_that_a_model_has(tmp_path):
    values = {f.name: f.default for f in fields(run_options.RunOptions) if f.name != "output_dir"}
    text = json.dumps({"tasks": ["nano_doc"], "options": values, "methods": ["full"]})
    assert (
        sweep.read(recipe(tmp_path, text)).cells[0].options.items() >= {k: v for k, v in values.items() if k != "label"}.items()
    )
    with pytest.raises(ValueError, match="unknown option 'output_dir'"):
        sweep.read(recipe(tmp_path, text.replace('"options": {', '"options": {"output_dir": "x", ')))


def test_the_shipped_recipes_hold_what_they_promise():
    nano = sweep.read("nano").cells
    pruners = {n for n in registry.names() if issubclass(registry.method_class(n), Pruner)}
    for name in pruners:
        assert {c.options["retention"] for c in nano if c.method == name} == {0.25, 0.5, 0.7}
    untrained = {n for n in registry.names() if n not in pruners}
    assert {c.method for c in nano} == pruners | untrained
    table = sweep.read("paper_table1").cells
    assert {
        "full",
        "low",
        "holov retention=0.7",
        "sparsevlm retention=0.5",
        "visionzip retention=0.7",
        "VisionThink",
        "AwaRes",
    } <= {c.label for c in table}
    assert len(table) == 10 and len({sweep._weights(c) for c in table}) == 3
    slim = sweep.read("angelslim_11").cells
    assert len(slim) == 19 and {c.options["retention"] for c in slim if c.method != "full"} == {0.25, 0.1}
    assert {c.options["limits"] for c in slim} == {"angelslim"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [nano_doc]", "needs tasks: .* and methods: "),
        ("tasks: [nano_doc]\nmethod: [full]\nmethods: [full]", r"unknown option 'method'\. Did you mean 'methods'"),
        ("tasks: [a]\nmethods: [fulll]", "Did you mean full"),
        ("tasks: [a]\nmethods: [{retention: 0.5}]", "names no method"),
        ("tasks: [a]\nmethods: [{method: pooling, retention: 2}]", "above 0 and at most 1"),
        ("tasks: [a]\nmethods: [full, full]", "two cells named full"),
        ("tasks: [a]\noptions: {on_error: ignore}\nmethods: [full]", "on_error is 'ignore'; allowed: stop, skip"),
        ("tasks: [a]\nlimit: 0\nmethods: [full]", "limit is 0"),
        ("tasks: [a\nmethods", "is not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_run_says_why_before_anything_is_loaded(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        sweep.read(recipe(tmp_path, text))
    with pytest.raises(
        ValueError, match="no recipe nothing; pass a YAML file or one of: angelslim_11, nano, nano_ablations, paper_table1"
    ):
        sweep.read("nothing")


def test_a_task_is_loaded_anew_each_time_so_that_ocrbenchs_global_sums_start_at_zero():
    from awares_bench.evaluation.lmms_run import task_index

    index = task_index()
    first, second = (index._get_config("ocrbench")["metric_list"][0]["aggregation"] for _ in range(2))
    assert first.__globals__["OCRBench_score"] is not second.__globals__["OCRBench_score"]


def test_a_sweep_saves_what_lmms_evals_command_saves_resumes_and_goes_on_after_a_failure(tmp_path, checkpoint, capsys):
    text = f"""
    tasks: [nano_doc, nano_ocr]
    batch_size: 3
    limit: 2
    options: {{pretrained: {checkpoint}}}
    methods:
      - full
      - {{method: cares, gate: nowhere.safetensors}}
      - {{method: low, pruner: pooling, retention: 0.5}}
      - {{method: "{Path(__file__).parents[1] / "helpers" / "example_method.py"}:Strip", label: strip}}
    """
    out = tmp_path / "out"
    arguments = ["run", str(recipe(tmp_path, text)), "--out", str(out)]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert "[4/4] strip on nano_doc,nano_ocr" in said and "3 of 4 cells are done" in said
    assert "cares" in said and "is not a gate that can be read" in said
    assert {p.parent.name for p in out.glob("runs/*/records.jsonl")} == {"full", "low+pooling_retention=0.5", "strip"}
    for name, policy, pruner in (("full", "full", None), ("low+pooling_retention=0.5", "low", "pooling")):
        run = json.loads((out / "runs" / name / "run.json").read_text())
        assert (run["status"], run["identity"]["policy"], run["identity"]["pruner"]) == ("complete", policy, pruner)
        assert run["label"] == name.replace("_", " ")

    stamps = {p: p.stat().st_mtime_ns for p in out.glob("lmms/*/*/*")}
    assert cli.main(arguments) == 1  # the cell that failed is tried again, the others are not
    said = capsys.readouterr().err
    assert "3 of 4 cells are done" in said and "[1/1] cares" in said
    assert {p: p.stat().st_mtime_ns for p in out.glob("lmms/*/*/*")} == stamps

    lmms_eval(
        tmp_path, "--model", "full", "--tasks", "nano_doc,nano_ocr", "--include_path", FOLDER, "--limit", 2, "--batch_size", 3,
        "--log_samples", "--output_path", tmp_path / "cli", "--model_args", f"pretrained={checkpoint},output_dir={tmp_path / 'r'}",
    )  # fmt: skip
    ours, theirs = samples(out / "lmms" / "full"), samples(tmp_path / "cli")
    assert ours.keys() == theirs.keys() == {"nano_doc", "nano_ocr"}
    for task in ours:
        strip = [{k: v for k, v in row.items() if k != "token_counts"} for row in ours[task]]
        assert strip == [{k: v for k, v in row.items() if k != "token_counts"} for row in theirs[task]]
    results = [next(p.rglob("*_results.json")) for p in (out / "lmms" / "full", tmp_path / "cli")]
    ours, theirs = (json.loads(p.read_text()) for p in results)
    assert ours["config"]["limit"] == theirs["config"]["limit"] == 2
    for task in ("nano_doc", "nano_ocr"):
        assert {k: v for k, v in ours["results"][task].items() if "stderr" not in k} == {
            k: v for k, v in theirs["results"][task].items() if "stderr" not in k
        }


def test_a_folder_s_tasks_win_over_the_package_s_of_the_same_name(tmp_path):
    (tmp_path / "nano_doc.yaml").write_text((FOLDER / "nano_doc.yaml").read_text())
    index = lmms_run.task_index(str(tmp_path)).task_index
    assert index["nano_doc"]["yaml_path"] == str(tmp_path / "nano_doc.yaml")
    assert index["nano_pope"]["yaml_path"] == str(FOLDER / "nano_pope.yaml")
