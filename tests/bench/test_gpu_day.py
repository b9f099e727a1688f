"""The GPU day: sections resume and survive what fails, every one is rehearsed at tiny geometry, and the report names the device."""

import json
import subprocess
import sys
from dataclasses import replace
from time import monotonic

import pandas as pd
import pytest
import torch

from awares_bench.bench import equality, gpu_day, gpu_records, gpu_sections
from awares_bench.bench.gpu_records import TINY, Item, Record, Section, measure
from awares_bench.cli import main
from awares_bench.errors import RunError
from awares_bench.inference.padded_batch import PaddedBatch
from awares_bench.inference.ragged_batch import RaggedBatch
from awares_bench.reports.data import gpu_day as read_gpu_day
from awares_bench.reports.data.load import ReportError

LATER = 10**9


def section(items, name="device"):
    return Section(name, "a title", 1.0, lambda scale, device, out, seconds: items)


def test_a_cut_section_goes_on_and_a_failure_is_tried_again(tmp_path):
    ran = []

    def item(key, error=None):
        def measured():
            ran.append(key)
            if error:
                raise error
            return {"value": key}

        return Item(key, measured)

    broken = [item("a"), item("b", MemoryError("no room")), item("c")]
    one = section(broken)
    record = Record(tmp_path, one, TINY, "cpu")
    measure(record, broken[:1], monotonic() + LATER)
    measure(record, broken, monotonic() + LATER)
    assert ran == ["a", "b", "c"] and not record.complete and record.state["missing"] == ["b"]
    assert "1 missing" in record.sentence() and "MemoryError: no room" in record.sentence()
    again = Record(tmp_path, one, TINY, "cpu")
    measure(again, broken, monotonic() + LATER)
    assert ran == ["a", "b", "c"]  # within a run a failure stands
    again.forget_failures()
    mended = [broken[0], item("b"), broken[2]]
    measure(again, mended, monotonic() + LATER)
    assert ran == ["a", "b", "c", "b"] and again.complete
    saved = json.loads((tmp_path / "device.json").read_text())
    assert saved["items"]["b"]["result"] == {"value": "b"} and saved["device"] == again.state["device"]
    assert saved["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0] or saved["provenance"]["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["device.json"]  # no draft is left


def test_an_item_that_would_outlast_the_time_is_left_out_and_smaller_ones_are_not(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_records.time, "monotonic", lambda: now[0])

    def taking(seconds):
        def measured():
            now[0] += seconds
            return {}

        return measured

    items = [Item("small", taking(2.0), 1.0), Item("large", taking(100.0), 50.0), Item("another", taking(2.0), 1.0)]
    record = Record(tmp_path, section(items), TINY, "cpu")
    measure(record, items, 60.0)
    assert list(record.state["items"]) == ["small", "another"] and record.state["missing"] == ["large"] and not record.complete
    measure(record, items, 0.0)
    assert list(record.state["items"]) == ["small", "another"]


def test_records_of_another_device_or_scale_are_refused(tmp_path):
    items = [Item("a", dict)]
    measure(Record(tmp_path, section(items), TINY, "cpu"), items, monotonic() + LATER)
    with pytest.raises(RunError, match="pass another --out, or delete the file"):
        Record(tmp_path, section(items), replace(TINY, answer=4), "cpu")
    found = json.loads((tmp_path / "device.json").read_text())
    (tmp_path / "device.json").write_text(json.dumps(found | {"device": "another card"}))
    with pytest.raises(RunError, match="'another card'"):
        Record(tmp_path, section(items), TINY, "cpu")


DIES = """
import json, os, pathlib, signal, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]); path = out / "device.json"
state = json.loads(path.read_text())
left = [k for k in ("a", "b", "c") if k not in state["items"]]
key = left[0]
if key == "b":
    path.write_text(json.dumps(state | {"running": key}))
    os.kill(os.getpid(), signal.SIGKILL)
state["items"][key] = {"seconds": 1.0, "result": {}}
path.write_text(json.dumps(state | {"running": None}))
sys.exit(3 if key == "a" else 0)  # after the first, its device answers nothing more
"""


def test_a_process_that_dies_costs_one_measurement(tmp_path, monkeypatch):
    script = tmp_path / "python"
    (tmp_path / "dies.py").write_text(DIES)
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/dies.py "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(gpu_day.sys, "executable", str(script))
    out = tmp_path / "out"
    out.mkdir()
    one = section([])
    Record(out, one, TINY, "cpu").write()
    gpu_day.in_a_process(one, out, TINY, "cpu", 60.0)
    items = Record(out, one, TINY, "cpu").state["items"]
    assert list(items) == ["a", "b", "c"] and "ended with status -9" in items["b"]["error"] and "result" in items["c"]


def test_words_that_cannot_be_are_refused(tmp_path, capsys):
    assert main(["bench", "gpu-day", "--out", str(tmp_path), "--geometry", "tiny", "--sections", "speed"]) == 1
    assert "--sections holds 'speed'; known: device, equality, engine," in capsys.readouterr().err
    assert main(["bench", "gpu-day", "--out", str(tmp_path), "--geometry", "tiny", "--minutes", "0"]) == 1
    assert "it must be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_machine_without_our_other_packages_can_run_it():
    """The packages that the machine with the GPU lacks are taken away."""
    code = """
import sys
for name in ("lmms_eval", "datasets", "openai", "rapidfuzz"):
    sys.modules[name] = None
import awares_bench.bench.gpu_day, awares_bench.bench.grpo_step, awares_bench.training.nano.tower, awares_bench.reports.report
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- a rehearsal

SMALLEST = replace(TINY, matrix=64, copied=2**16, unequal=(9, 4), pages=(16,), batches=(1,), answer=2, pruned=16, page=16)
QUICK = ("device", "equality", "engine", "pruners", "grpo")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Every section but the second engine, which is the first again, and nano, whose pictures take long."""
    out = tmp_path_factory.mktemp("day")
    gpu_day.run(out, 20.0, SMALLEST, "cpu", QUICK, here=True)
    return out


def test_every_section_is_measured_at_the_smallest_geometry(rehearsed):
    day = read_gpu_day.read(rehearsed)
    for name in QUICK:
        assert day.sections[name]["status"] == "complete", day.sections[name]["items"]
    frame = read_gpu_day.equality(day)
    exact = frame[frame["dtype"] == "float32"]
    assert len(exact) == 6 and (exact["largest"] < 1e-4).all() and (exact["same_choice"].dropna() == 1).all()
    rounded = frame[frame["dtype"] == "bfloat16"]
    assert rounded["relative"].max() < 0.02 and rounded["question"].str.contains("beside float32").sum() == 6
    (step,) = day.items("grpo").values()
    tokens = step["tokens"]
    assert tokens["loss"] == tokens["reference"] == tokens["backward"] > tokens["decode"] > 0 and tokens["prefill"] > 0
    assert step["metrics"]["call_rate"] == 0.5 and step["floor"]["seconds"] == pytest.approx(sum(step["floor"]["parts"].values()))
    assert step["over_floor"] > 1
    (engine,) = day.items("engine").values()
    assert [r["name"] for r in engine["rows"]][:2] == ["full: ours", "AwaRes: ours, one cache"] and len(engine["rows"]) == 6
    assert all(r["peak_memory_bytes"] for r in engine["rows"]) and engine["about"]["layout"] == "RaggedBatch"


def test_a_pruner_that_fails_is_named_and_the_others_are_measured(monkeypatch, tmp_path):
    def run(*_, only, **__):
        if only in ("", "fastv"):
            raise RuntimeError("indices should be on the same device")
        return {"pruners": [{"pruner": only}]}

    monkeypatch.setattr(gpu_sections.pruner_bench, "run", run)
    result = gpu_sections.pruners(TINY, "cpu", tmp_path, 60.0)[0].measure()
    names = {p["pruner"] for p in result["pruners"]}
    assert "fastv" not in names and {"divprune", "visionzip"} <= names
    assert result["failed"] == {"fastv": "RuntimeError: indices should be on the same device"}


def test_scores_that_differ_show_in_every_number():
    right = [torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 3.0, 0.0]])]
    wrong = [torch.tensor([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0]]), torch.tensor([[3.0, 0.0, 0.0]])]
    out = equality.compare(wrong, right)
    assert out == {
        "largest": 3.0, "relative": pytest.approx((18 / 30) ** 0.5), "same_choice": 0.5, "largest_score": 4.0, "compared": 2,
    }  # fmt: skip
    assert equality.compare(right, right)["largest"] == 0


def test_a_layout_that_is_wrong_is_not_measured(rehearsed, tmp_path):
    vlm = equality.Equality("nano", 1, torch.float32, "cpu", (4,), 2).vlm
    assert gpu_sections.trusted_layout(vlm, rehearsed) is None and vlm.own_layout() is RaggedBatch
    record = json.loads((rehearsed / "equality.json").read_text())
    record["items"]["float32: own layout"]["result"]["a batch beside one by one"]["relative"] = 0.5
    (tmp_path / "equality.json").write_text(json.dumps(record))
    assert gpu_sections.trusted_layout(vlm, tmp_path) is PaddedBatch
    # recorded steps fail, and steps from Python are right
    record["items"]["float32: own layout, steps from Python"] = record["items"]["float32: rectangle"]
    record["items"]["float32: own layout"] = {"seconds": 1.0, "error": "no graph"}
    (tmp_path / "equality.json").write_text(json.dumps(record))
    assert gpu_sections.trusted_layout(vlm, tmp_path) is equality.PlainSteps


def test_the_report_names_the_device_in_every_table_and_figure(rehearsed, tmp_path, capsys):
    assert main(["report", str(rehearsed), "--out", str(tmp_path), "--formats", "svg"]) == 0
    device = read_gpu_day.read(rehearsed).device
    said = capsys.readouterr()
    assert "Not measured: engine_large; nano." in said.err and "a rehearsal" in said.err
    for name in ("gpu_engine", "gpu_equality", "gpu_pruners", "gpu_grpo", "gpu_device"):
        assert device in (tmp_path / f"{name}.md").read_text() and device in (tmp_path / f"{name}.tex").read_text()
        assert len(pd.read_csv(tmp_path / f"{name}.csv"))
    figures = sorted(p.stem for p in tmp_path.glob("*.svg"))
    assert figures == ["gpu_engine_seconds", "gpu_pruners_share"]
    page = (tmp_path / "index.html").read_text()
    assert page.count(device) >= 6 and "rehearsal" in page
    engine = pd.read_csv(tmp_path / "gpu_engine.csv").iloc[0]
    assert engine["AwaRes / full"] == pytest.approx(engine["AwaRes, ours seconds"] / engine["full, ours seconds"])
    assert engine["rtr"] == pytest.approx(0.5, abs=0.2)


def test_figures_carry_the_device_and_the_measured_points(rehearsed):
    from awares_bench.reports.plots import gpu_day as figures

    day = read_gpu_day.read(rehearsed)
    frame = read_gpu_day.engine(day)
    figure = figures.draw_engine(frame, day.device, ("a note",))
    drawn = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    ours = frame[frame["way"] == "AwaRes, ours"]
    assert drawn["AwaRes, ours"] == [pytest.approx(1000 * ours["seconds"].iloc[0])] and len(drawn) == 4
    bars = figures.draw_pruners(read_gpu_day.pruners(day), day.device)
    for one in (figure, bars):
        assert day.device.split()[0] in one._suptitle.get_text()


def test_what_cannot_be_reported_together_is_refused(rehearsed, tmp_path):
    for path in rehearsed.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    other = json.loads((tmp_path / "pruners.json").read_text()) | {"device": "another card"}
    (tmp_path / "pruners.json").write_text(json.dumps(other))
    with pytest.raises(ReportError, match="several devices"):
        read_gpu_day.read(tmp_path)
    (tmp_path / "pruners.json").write_text(json.dumps(other | {"format": 9}))
    with pytest.raises(ReportError, match="has format 9; this version reads 1"):
        read_gpu_day.read(tmp_path)
    assert main(["report", str(rehearsed), str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert not read_gpu_day.holds(tmp_path / "nothing") and tuple(s.name for s in gpu_sections.SECTIONS) == read_gpu_day.SECTIONS
    assert read_gpu_day.FORMAT == gpu_records.FORMAT


@pytest.mark.slow
def test_the_whole_day_is_rehearsed_in_processes_and_finished_sections_are_skipped(tmp_path, capfd):
    words = ["bench", "gpu-day", "--out", str(tmp_path), "--geometry", "tiny", "--device", "cpu", "--minutes", "10"]
    start = monotonic()
    assert main(words) == 0
    assert monotonic() - start < 300
    assert {p.stem for p in tmp_path.glob("*.json")} == set(read_gpu_day.SECTIONS)
    day = read_gpu_day.read(tmp_path)
    assert all(record["status"] == "complete" for record in day.sections.values())
    assert day.items("nano")["tower"]["evaluation"]
    capfd.readouterr()
    assert main(words) == 0
    assert capfd.readouterr().out.count(": complete") == len(read_gpu_day.SECTIONS)
