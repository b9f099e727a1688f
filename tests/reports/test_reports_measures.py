"""Agreement, calibration, accuracy where half size is wrong, and accuracy at equal cost, on runs that a reader can follow by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from awares_bench.evaluation.records import Record, RunFolder
from awares_bench.reports.data import compact, discover
from awares_bench.reports.data.agreement import agreement, calibration_error
from awares_bench.reports.data.matched import matched
from awares_bench.reports.report import write
from awares_bench.reports.tables import main, measures

from ..helpers.runs import full, low, write_run


def frame_of(*folders):
    runs, _ = discover.runs(folders)
    return runs, discover.together(runs)


@pytest.fixture
def four(tmp_path):
    """Full is right always, half size on documents 1 and 3; AwaRes on 0 and 3 (0.5 on 1); random tokens at half the tokens on 2 and 3."""
    write_run(tmp_path, "full", {"nano_doc": full()})
    write_run(tmp_path, "low", {"nano_doc": low()})
    write_run(
        tmp_path, "awares", {"nano_doc": [(1.0, [16], []), (0.5, [16, 16], ["left"]), (0.0, [16, 32], ["all"]), (1.0, [16], [])]}
    )
    half = [(0.0, [32], []), (0.0, [32], []), (1.0, [32], []), (1.0, [32], [])]
    write_run(
        tmp_path, "random_tokens", {"nano_doc": half}, {"fields": {"retention": 0.5}, "pruner": "random_tokens", "policy": "full"}
    )
    return tmp_path


def test_agreement_counts_flips_both_ways(four):
    rows = agreement(frame_of(four)[1]).set_index("method")
    assert rows.loc["low", ["same", "lost", "gained"]].tolist() == [0.5, 0.5, 0.0]
    assert rows.loc["awares", ["same", "lost", "gained"]].tolist() == [0.75, 0.25, 0.0]
    assert pd.isna(rows.loc["full", "same"]) and rows["ece"].isna().all()


def test_a_document_that_full_resolution_gets_wrong_can_be_gained(tmp_path):
    write_run(tmp_path, "full", {"nano_doc": [(0.0, [64], []), (1.0, [64], [])]})
    write_run(tmp_path, "low", {"nano_doc": [(1.0, [16], []), (0.0, [16], [])]})
    row = agreement(frame_of(tmp_path)[1]).set_index("method").loc["low"]
    assert (row["same"], row["lost"], row["gained"]) == (0.0, 0.5, 0.5)


def test_the_calibration_error_is_that_of_its_definition():
    probability, right = np.array([0.95, 0.95, 0.95, 0.95, 0.15, 0.15, 1.0, 0.0]), np.array([1, 1, 1, 0, 0, 1, 1, 0])
    by_hand = (5 * abs(4 / 5 - 4.8 / 5) + 2 * abs(0.5 - 0.15) + 1 * 0.0) / 8  # bins 0.9 to 1, 0.1 to 0.2, 0 to 0.1
    assert calibration_error(probability, right) == pytest.approx(by_hand)
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    assert calibration_error(p, rng.uniform(size=20_000) < p) < 0.02
    assert (
        calibration_error(np.array([0.5, np.nan]), np.array([1, 0])) is None
        and calibration_error(np.array([]), np.array([])) is None
    )


def test_the_probability_of_the_answer_goes_from_the_record_into_compact_records_and_the_table(four, tmp_path):
    path = four / "runs" / "low"
    run = RunFolder(path, json.loads((path / "run.json").read_text())["identity"])
    for record in list(run._latest.values()):
        run.add(Record(**vars(record) | {"answer_logprob": math.log(0.25)}))
    run.close()
    told = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(told | {"status": "complete"}))
    runs, frame = frame_of(four)
    row = agreement(frame).set_index("method").loc["low"]
    assert row["probability"] == pytest.approx(0.25) and row["ece"] == pytest.approx(0.25)
    compact.write(runs, tmp_path / "small")
    again = agreement(discover.together(compact.read(tmp_path / "small"))).set_index("method").loc["low"]
    assert again["ece"] == pytest.approx(0.25, abs=1e-5)
    printed = measures.agreement_table(frame)
    assert "calibration error" in printed.printed.to_string() and len(printed.numbers) == 4


def test_the_main_table_has_the_documents_that_half_size_gets_wrong(four):
    runs, frame = frame_of(four)
    from awares_bench.reports.data import published

    numbers = main.accuracy(frame, published.cells(runs, frame)).numbers.set_index("method")["where half size is wrong"]
    assert numbers["awares"] == 50.0 and numbers["full"] == 100.0 and pd.isna(numbers["low"])


def test_accuracy_at_equal_cost_is_that_of_a_mixture_of_the_two_runs_around_it(four):
    rows = matched(frame_of(four)[1], times=False).set_index("curve")
    (at,) = set(rows["at"])
    assert at == pytest.approx((16 + 32 + 48 + 16) / 4 / 64) and set(rows["method"]) == {"awares"}
    share = (at - 0.25) / 0.75  # between half size (2 of 4) and full resolution (4 of 4)
    assert rows.loc["low", "fixed"] == pytest.approx(0.5 * (1 - share) + share)
    assert (
        rows.loc["low", "difference"] == pytest.approx(0.625 - rows.loc["low", "fixed"])
        and rows.loc["low", "between"] == "low, full"
    )
    assert "random_tokens" not in rows.index  # its cheapest run, 0.5, is dearer
    seconds = matched(frame_of(four)[1])
    assert set(seconds["cost"]) <= {"RTR", "seconds"}


def test_the_report_writes_both_tables(four, tmp_path):
    out = tmp_path / "report"
    write([four], out, formats=("svg",))
    assert (out / "agreement.md").is_file() and (out / "matched.md").is_file()
    assert "where half size is wrong" in (out / "table.md").read_text()


def test_without_full_resolution_there_is_no_agreement(tmp_path):
    write_run(tmp_path, "low", {"nano_doc": low()})
    write_run(tmp_path, "awares", {"nano_doc": low()})
    frame = frame_of(tmp_path)[1]
    assert measures.agreement_table(frame) is None and measures.matched_table(frame) is None


def test_boxes_that_the_model_names_are_calls_and_those_of_an_auxiliary_model_are_not():
    from awares_bench.reports.data.load import _spent

    record = {"usage": [], "question": "q", "boxes": [[0, 0, 5, 5]]}
    assert _spent(record)["called"] and not _spent(record | {"models": ["cropper", ""]})["called"]
    assert _spent(record)["answer_logprob"] is None
