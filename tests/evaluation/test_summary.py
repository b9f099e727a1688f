"""The table after a run: means over the documents of a task, a dash where nothing is known, failures apart."""

from awares_bench.evaluation.records import Record, RunFolder
from awares_bench.evaluation.summary import aligned, of_run, table, width


def record(task="chart", doc_id=0, rtr=0.5, visual=(16.0, 16.0), seconds=0.01, crops=(), malformed=None, **more) -> Record:
    usage = [{"prefill": v, "encode_seconds": seconds, "aux_seconds": 0.0} for v in visual]
    fields = {"usage": usage, "rtr": rtr, "crops": list(crops), "malformed_call": malformed}
    return Record(task, doc_id, "test", f"question {doc_id}?", "yes", **fields | more)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_a_row_holds_the_means_of_its_task():
    head, chart, doc = cells(
        table([record(), record(doc_id=1, rtr=0.25, visual=(16.0,), crops=("top",)), record("doc", malformed="no such region")])
    )
    assert head == ["task", "documents", "RTR", "calls", "malformed", "visual tokens", "ms per document"]
    assert chart == ["chart", "2", "0.375", "50 %", "0", "24.0", "15.0"]
    assert doc == ["doc", "1", "0.500", "100 %", "1", "32.0", "20.0"]


def test_what_is_not_known_is_a_dash_and_not_a_zero():
    assert cells(table([record(rtr=None, usage=[])]))[1] == ["chart", "1", "-", "0 %", "0", "-", "-"]


def test_what_could_not_be_answered_is_counted_apart():
    failed = Record("chart", 1, "test", "question 1?", None, error="no image file")
    assert cells(table([record(), failed]))[1] == ["chart", "1", "0.500", "0 %", "0", "32.0", "20.0", "1"]
    assert cells(table([failed]))[1] == ["chart", "0", "-", "-", "0", "-", "-", "1"]
    assert "failed" not in table([record()])


def test_only_documents_of_this_call_count(tmp_path):
    run = RunFolder(tmp_path / "run", {"method": "low"})
    for r in (record(), record(doc_id=1, rtr=1.0), record("other")):
        run.add(r)
    run.close()
    told = of_run(run.folder, {"chart"}, {("chart", 0, "question 0?")})
    assert cells(told)[1][:3] == ["chart", "1", "0.500"] and "other" not in told
    assert told.endswith(f"records: {run.folder}")
    assert cells(of_run(run.folder, {"chart"}))[1][:3] == ["chart", "2", "0.750"]


def test_columns_stand_under_one_another_in_wide_letters_too():
    lines = aligned([["method", "RTR"], ["図", "0.25"], ["e\u0301tude", "1"]]).splitlines()
    assert {width(line) for line in lines} == {width("method  0.25")}
