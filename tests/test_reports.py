"""Tables and figures equal hand computations from raw records; what must not be reported is refused with the reason."""

import json
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from awares_bench.record import Record, RunFolder
from awares_bench.usage import Usage

load = import_module("awares_bench.reports.load")
tables = import_module("awares_bench.reports.tables")
figure = import_module("awares_bench.reports.accuracy_rtr")
gallery = import_module("awares_bench.reports.gallery")


def write(folder, documents, scored=None, metric="anls", task="nano_doc"):
    """documents: (score, [prefill tokens per turn], crops) each with 64 full tokens."""
    run = RunFolder(folder / "run", {"method": "x"})
    lines = []
    for i, (score, spent, crops) in enumerate(documents):
        usage = [Usage(encoded=t, prefill=float(t), text=10, output=2).as_dict() for t in spent]
        replies = ["GET_CROPS: ['3']"] * (len(spent) - 1) + ["a"]
        run.add(Record(task, i, "test", "q", "a", replies, crops, sum(spent) / 64, 64, usage))
        lines.append(json.dumps({"doc_id": i, metric: score}))
    run.close()
    out = folder / "lmms" / "model"
    out.mkdir(parents=True)
    (out / f"20260101_samples_{task}.jsonl").write_text("\n".join(lines[:scored]) + "\n")
    return folder / "run", folder / "lmms"


DOCUMENTS = [(1.0, [16], []), (0.5, [16, 16], ["top-left"]), (0.0, [16, 64], ["all"]), (1.0, [16], [])]


def test_the_summary_is_the_hand_computation(tmp_path):
    frame = load.load("x", *write(tmp_path, DOCUMENTS))
    cell = tables.summary(frame)["x"]["nano_doc"]
    assert cell == {
        "accuracy": 0.625,
        "rtr": (0.25 + 0.5 + 1.25 + 0.25) / 4,
        "documents": 4,
        "call_rate": 0.5,
        "malformed_rate": 0.0,
    }
    assert tables.summary(frame)["x"]["mean"] == cell


def test_the_mean_is_over_tasks_not_documents():
    rows = [("a", 1.0, 0.25)] * 3 + [("b", 0.0, 1.0)]
    frame = pd.DataFrame(
        [{"method": "m", "task": t, "score": s, "rtr": r, "called": False, "malformed": False} for t, s, r in rows]
    )
    mean = tables.summary(frame)["m"]["mean"]
    assert (mean["accuracy"], mean["rtr"], mean["documents"], mean["malformed_rate"]) == (0.5, 0.625, 4, None)


def test_a_score_in_a_dictionary_is_found(tmp_path):
    documents = [({"score": 1.0}, [16], []), ({"score": 0}, [16], [])]
    frame = load.load("x", *write(tmp_path, documents, metric="pope_accuracy", task="nano_pope"))
    assert frame["score"].tolist() == [1.0, 0.0]


def test_a_score_without_a_record_is_refused(tmp_path):
    run, lmms = write(tmp_path, DOCUMENTS)
    records = run / "records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(load.ReportError, match=r"no record for 2 of them.*--use_cache"):
        load.load("x", run, lmms)


def test_a_limited_run_counts_what_was_scored(tmp_path):
    assert len(load.load("x", *write(tmp_path, DOCUMENTS, scored=3))) == 3


@pytest.mark.parametrize(("score", "why"), [(None, "has no anls score"), (float("nan"), "has no anls score")])
def test_a_missing_score_is_refused_not_counted_as_wrong(tmp_path, score, why):
    with pytest.raises(load.ReportError, match=why):
        load.load("x", *write(tmp_path, [(score, [16], [])]))


def test_duplicates_unknown_tasks_and_empty_folders_are_refused(tmp_path):
    run, lmms = write(tmp_path / "a", DOCUMENTS)
    (samples,) = lmms.rglob("*.jsonl")
    samples.write_text(samples.read_text() * 2)
    with pytest.raises(load.ReportError, match="appears twice"):
        load.load("x", run, lmms)
    samples.write_text('{"doc_id": 0')
    with pytest.raises(load.ReportError, match="not JSON"):
        load.load("x", run, lmms)
    samples.rename(samples.with_name("1_samples_other.jsonl"))
    with pytest.raises(load.ReportError, match="no accuracy is defined"):
        load.load("x", run, lmms)
    (tmp_path / "empty").mkdir()
    with pytest.raises(load.ReportError, match="holds no samples file"):
        load.load("x", run, tmp_path / "empty")


def test_the_axes_hold_the_data(tmp_path):
    frame = load.load("awares", *write(tmp_path, DOCUMENTS))
    points = figure.data(frame)
    axes = figure.draw(points, "nano").axes[0]
    (x,), (y,) = axes.containers[0].lines[0].get_data()
    assert (x, y) == (pytest.approx(0.5625), pytest.approx(62.5))
    assert points["low"][0] <= 0.625 <= points["high"][0]
    assert "ratio" in axes.get_xlabel() and "%" in axes.get_ylabel()


def test_the_interval_covers_the_mean_of_a_known_sample():
    scores = np.array([0.0, 1.0] * 200)
    low, high = tables.interval(scores)
    assert 0.44 < low < 0.46 and 0.54 < high < 0.56  # 0.5 ± 1.96 * 0.5 / 20


def test_a_missing_value_is_a_dash():
    assert tables.markdown(pd.DataFrame([{"a": None, "b": 0.0}])).splitlines()[-1] == "| – | 0.0 |"


def test_the_gallery_shows_every_kind_escapes_text_and_ends(tmp_path):
    frame = load.load("x", *write(tmp_path, [(1.0, [16], []), (0.0, [16, 16], ["top-left"])] * 10))
    chosen = gallery.choose(frame)
    assert len(chosen) == 12 and set(chosen["called"]) == {True, False}
    assert len(gallery.choose(frame[frame["score"] < 0.5])) == 10
    frame.loc[:, "question"] = "<script>alert(1)</script>"
    page = gallery.page(frame.head(4), lambda task, doc: Image.new("RGB", (224, 224), "white"), "nano")
    assert "<script>" not in page and "GET_CROPS" in page and page.count("<article>") == 4
