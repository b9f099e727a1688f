"""The plugin as a user runs it: lmms-eval's command, the six official task names, records, resume, batch sizes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ..helpers import official
from ..helpers.lmms_runs import FOLDER, environment, lmms_eval, lmms_eval_process, records, samples


def test_the_six_official_tasks_run_unchanged_with_telemetry_in_both_places(tmp_path, checkpoint):
    official.write(tmp_path)
    arguments = [
        "--model",
        "awares",
        "--tasks",
        official.TASKS,
        "--batch_size",
        3,
        "--log_samples",
        "--output_path",
        tmp_path / "out",
    ]
    model = f"pretrained={checkpoint},output_dir={tmp_path / 'run'}"
    from lmms_eval.api.reasoning import (
        strip_reasoning_tags,
    )  # lmms-eval scores answers without thoughts, which random weights may utter

    said = lmms_eval(tmp_path, *arguments, "--model_args", model)
    assert list((tmp_path / "out").rglob("*_results.json")), said[-3000:]
    lines = records(tmp_path / "run")
    assert len(lines) == 6 * official.COUNT and {x["task"] for x in lines} == set(official.TASKS.split(","))
    by_key = {(x["task"], x["doc_id"]): x for x in lines}
    for task, rows in samples(tmp_path / "out").items():
        for row in rows:
            told, kept = row["token_counts"][0], by_key[task, row["doc_id"]]
            assert told["rtr"] == kept["rtr"] and told["usage"] == kept["usage"] and told["full_tokens"] == kept["full_tokens"]
            said_by = row["filtered_resps"] if isinstance(row["filtered_resps"], str) else row["filtered_resps"][0]
            assert said_by.strip() == strip_reasoning_tags(kept["answer"], [["<think>", "</think>"]]).strip()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"

    before = (tmp_path / "run" / "records.jsonl").read_text()
    (tmp_path / "run" / "records.jsonl").write_text("".join(before.splitlines(keepends=True)[:7]) + '{"task": "cut')
    said = lmms_eval(tmp_path, *arguments, "--model_args", model)
    assert f"7 of {6 * official.COUNT} answers are taken from" in said
    strip = lambda x: {k: v for k, v in x.items() if k != "usage"}  # noqa: E731
    assert {(x["task"], x["doc_id"]): strip(x) for x in records(tmp_path / "run")} == {k: strip(v) for k, v in by_key.items()}


def test_an_unknown_option_names_the_nearest_and_a_missing_checkpoint_says_what_to_do(tmp_path, checkpoint):
    nano = ["--tasks", "nano_doc", "--include_path", FOLDER, "--limit", 1]
    said = lmms_eval(tmp_path, "--model", "awares", "--model_args", f"pretrained={checkpoint},on_malformd=full", *nano)
    assert "Did you mean 'on_malformed'?" in said and "call_budget" in said
    said = lmms_eval(tmp_path, "--model", "awares_low", "--model_args", "pretrained=./nowhere", *nano)
    assert "no checkpoint folder at './nowhere'" in said


@pytest.mark.slow
def test_data_parallel_ranks_find_the_plugin_by_its_entry_point_and_record_every_document_once(tmp_path, checkpoint):
    out = ["--log_samples", "--output_path", tmp_path / "out", "--batch_size", 2]
    model = ["--model", "awares_full", "--model_args", f"pretrained={checkpoint},output_dir={tmp_path / 'run'}"]
    tasks = ["--tasks", "nano_doc,nano_pope", "--include_path", FOLDER, "--limit", 5]
    said = lmms_eval_process(tmp_path, *model, *tasks, *out, ranks=2, env={"ACCELERATE_USE_CPU": "true"})
    lines = records(tmp_path / "run")
    assert sorted((x["task"], x["doc_id"]) for x in lines) == [(t, i) for t in ("nano_doc", "nano_pope") for i in range(5)], said[
        -3000:
    ]
    assert {len(rows) for rows in samples(tmp_path / "out").values()} == {5}


def test_batch_size_changes_no_prediction_and_no_order(checkpoint):
    from awares_bench.inference.engine import Engine, Job
    from awares_bench.inference.local_model import LocalModel
    from awares_bench.methods.conversation import Sample
    from awares_bench.methods.registry import method_class

    from ..helpers.tiny import picture

    vlm = LocalModel.load(str(checkpoint))
    sizes = [(224, 224), (57, 400), (112, 300), (500, 90), (64, 64), (224, 112), (300, 300)]
    jobs = [Job(Sample((picture(*s, seed=i),), f"What is the value of bar {i}?", str(i)), 4 + i) for i, s in enumerate(sizes)]
    for name in ("full", "low", "awares"):
        runs = [dict(Engine(vlm, method_class(name)(), n).run(jobs)) for n in (1, 3, 8)]
        answers = [[run[i].answer for i in range(len(jobs))] for run in runs]
        tokens = [[[r.tokens for r in run[i].replies] for i in range(len(jobs))] for run in runs]
        assert answers[0] == answers[1] == answers[2] and tokens[0] == tokens[1] == tokens[2]


def test_masks_are_in_the_record_only_when_asked_for_and_answers_without_them_are_given_again(tmp_path, checkpoint):
    arguments = ["--model", "visionzip", "--tasks", "nano_doc", "--include_path", FOLDER, "--limit", 3, "--model_args"]
    options = f"pretrained={checkpoint},retention=0.5,output_dir={tmp_path / 'run'}"
    lmms_eval(tmp_path, *arguments, options)
    assert [r["keep_masks"] for r in records(tmp_path / "run")] == [None] * 3
    assert "the masks that keep_masks asks for" in lmms_eval(tmp_path, *arguments, f"{options},keep_masks=true")
    for record in records(tmp_path / "run")[3:]:
        ((cut,),) = record["keep_masks"]
        kept = bin(int(cut["kept"], 16)).count("1")
        assert (
            cut["layer"] is None
            and kept == record["usage"][0]["prefill"]
            and len(cut["kept"]) * 4 >= cut["grid"][0] * cut["grid"][1]
        )


@pytest.mark.parametrize("of_its_own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "process"])
def test_an_interrupted_run_keeps_what_it_answered_and_goes_on(tmp_path, checkpoint, of_its_own):
    arguments = ["--model", "awares", "--tasks", "nano_doc", "--include_path", FOLDER, "--limit", 80, "--log_samples"]
    arguments += ["--output_path", tmp_path / "out", "--model_args", f"pretrained={checkpoint},output_dir={tmp_path / 'run'}"]
    run = tmp_path / "run"

    def answered(before, going_on):
        deadline = time.time() + 240
        while len(records(run)) < before + 5 and time.time() < deadline and going_on():
            time.sleep(0.05)

    def kept(before):
        lines = records(run)
        assert before + 5 <= len(lines) < 80 and json.loads((run / "run.json").read_text())["status"] == "partial"
        return len(lines)

    before = 0
    if of_its_own:  # first a process, which is then gone
        command = [sys.executable, "-m", "lmms_eval", *map(str, arguments)]
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs do not hear it
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment(tmp_path), **quiet, **heard)
        answered(0, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        process.wait(120)
        before = kept(0)

    def interrupt():
        answered(before, lambda: True)
        os.kill(os.getpid(), signal.SIGINT)

    as_it_was = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        watching = threading.Thread(target=interrupt)
        watching.start()
        with pytest.raises(KeyboardInterrupt):
            lmms_eval(tmp_path, *arguments)
        watching.join()
    finally:
        signal.signal(signal.SIGINT, as_it_was)
    after = kept(before)
    said = lmms_eval(tmp_path, *arguments)
    assert f"{after} of 80 answers are taken from" in said
    assert sorted(x["doc_id"] for x in records(tmp_path / "run")) == list(range(80))
    assert {len(rows) for rows in samples(tmp_path / "out").values()} == {80}


def test_documents_that_cannot_be_answered_are_named_kept_apart_and_never_scored(tmp_path, checkpoint):
    official.write(tmp_path, broken=True)
    arguments = [
        "--model",
        "awares_full",
        "--tasks",
        "chartqa",
        "--batch_size",
        2,
        "--log_samples",
        "--output_path",
        tmp_path / "out",
    ]
    said = lmms_eval(tmp_path, *arguments, "--model_args", f"pretrained={checkpoint},output_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "out").rglob("*_results.json"))
    lines = records(tmp_path / "run")
    failed = {x["doc_id"]: x["error"] for x in lines if x["error"]}
    assert set(failed) == {1, 2}, said[-3000:]
    assert "chartqa document" in said and "2 of 4 documents could not be answered" in said
    assert all(x["answer"] is None for x in lines if x["error"]) and sum(x["error"] is None for x in lines) == 2
