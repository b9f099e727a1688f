"""Diagnosis: the figures by hand, records of the committed demo, and what is null."""

import pandas
import pytest

from awares_bench.methods.conversation import Sample
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.training.curation import diagnose
from awares_bench.training.curation.diagnose import Decision

from ..helpers.tiny import picture, tiny_vlm


def test_the_figures_are_those_counted_by_hand():
    found = diagnose.decision_metrics(
        [
            Decision(("top-left",), "HR", ("top-left",)),  # right
            Decision(("top",), "HR", ("top-left",)),  # half of it is the oracle's: IoU 0.5
            Decision(("bottom-right",), "HR", ("top-left",)),  # elsewhere
            Decision((), "HR", ("center",)),  # missed
            Decision(("all",), "LR"),  # for nothing
            Decision((), "LR"),
            Decision((), "LR", malformed=True),
            Decision(("left", "top"), None),  # nobody knows
        ]
    )
    assert found["call_precision"] == 3 / 4 and found["call_recall"] == 3 / 4 and found["call_f1"] == pytest.approx(0.75)
    assert found["false_call_rate"] == 1 / 3 and found["call_rate"] == 5 / 8 and found["share_HR"] == 4 / 7
    assert found["exact_region"] == 1 / 3 and found["iou_25"] == 2 / 3
    assert found["mean_area"] == pytest.approx((0.25 + 0.5 + 0.25 + 1 + 0.75) / 5)
    assert found["valid_parse"] == 7 / 8 and found["shares"]["direct"] == 3 / 8 and found["shares"]["several"] == 1 / 8
    assert found["oracle_shares"] == {"direct": 3 / 7, "top-left": 3 / 7, "center": 1 / 7}


def test_what_cannot_be_counted_is_null():
    found = diagnose.decision_metrics([Decision((), "LR")])
    assert found["call_precision"] is None and found["call_recall"] is None and found["call_f1"] is None
    assert found["mean_area"] is None and found["false_call_rate"] == 0
    assert "null" in diagnose.show(found)


def test_a_direct_answer_never_begins_as_a_call():
    vlm = tiny_vlm()
    starts = {vlm.tokenizer(x)["input_ids"][0] for x in ("GET_CROPS:", " GET_CROPS:")}
    text = diagnose.direct(vlm, Sample((picture(112, 112),), "q?", "k"), 4)
    assert vlm.tokenizer(text)["input_ids"][0] not in starts


def test_records_of_an_evaluation_are_read_without_a_model(tmp_path):
    from awares_bench.evaluation.records import Record, RunFolder
    from awares_bench.tasks.nano.suite import write

    write(tmp_path / "suite", 3, 4)
    table = pandas.read_parquet(tmp_path / "suite" / "nano_chart.parquet")
    run = RunFolder(tmp_path / "run", {"method": "oracle"})
    for i, row in table.iterrows():
        crops = () if row.low_is_enough else PAPER_GRID.cheapest_cover([tuple(b) for b in row.evidence], 224, 224)
        run.add(Record("nano_chart", i, "test", row.question, "1", crops=list(crops)))
    run.close()
    found = diagnose.from_records(tmp_path / "run", tmp_path / "suite")
    assert found["all"]["questions"] == 4 and found["all"]["shares"] == found["nano_chart"]["oracle_shares"]
    if found["all"]["share_HR"]:
        assert found["all"]["call_f1"] == found["all"]["exact_region"] == 1
    with pytest.raises(ValueError, match="no record"):
        diagnose.from_records(tmp_path / "run", tmp_path)
