"""What must not be reported is refused with the run, the reason and the remedy; what is allowed is printed."""

import csv
import gzip
import io
import json
import lzma

import pandas as pd
import pytest

from awares_bench.reports import report
from awares_bench.reports.data import compact, comparability, discover, load

from ..helpers.runs import DOCUMENTS, full, low, write_run

ReportError = load.ReportError


def check(path, allow=(), times=True):
    runs, _ = discover.runs([path])
    return comparability.check(runs, discover.together(runs), allow, times)


DIFFERENT = {
    "pixels": ({"identity": {"max_pixels": 1605632}}, r"a and b differ in processor limits .*12845056.*1605632"),
    "weights": ({"identity": {"weights": "w2"}}, r"a and b name the checkpoint nano and hold different weights \(w1, w2\)"),
    "versions": ({"lmms_eval": "0.7.1"}, r"a and b differ in versions of lmms-eval.*0\.7\.3.*0\.7\.1"),
    "prompts": ({"question": "please: {}?"}, r"a and b asked nano_doc document 0 with different words"),
    "hardware": ({"machine": "cpu B"}, r"a and b differ in machine.*cpu A.*cpu B.*--no-times.*--allow hardware"),
    "partial": ({"status": "partial"}, r"b is a partial run .*finish it"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_runs_that_differ_are_refused_and_allowed_by_name(tmp_path, name):
    settings, message = DIFFERENT[name]
    write_run(tmp_path, "a", {"nano_doc": full()})
    write_run(tmp_path, "b", {"nano_doc": low()}, **settings)
    with pytest.raises(ReportError, match=message) as refused:
        check(tmp_path)
    assert f"--allow {name}" in str(refused.value)
    (said,) = check(tmp_path, (name,))
    assert said.startswith(f"allowed ({name})")


def test_batch_sizes_are_hardware_and_matter_only_to_times(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()}, batch_size=1)
    write_run(tmp_path, "b", {"nano_doc": low()}, batch_size=8)
    with pytest.raises(ReportError, match=r"batch 1.*batch 8"):
        check(tmp_path)
    assert check(tmp_path, times=False) == []


def test_runs_of_different_documents_are_refused_with_the_limit(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()})
    write_run(tmp_path, "b", {"nano_doc": low(2)}, limit=2)
    with pytest.raises(
        ReportError, match=r"b, nano_doc: 2 documents, a has 4 \(b ran with --limit 2\); document 2 is in one only"
    ):
        check(tmp_path)
    assert check(tmp_path, ("documents",))


def test_an_equal_limit_is_no_refusal_but_a_note(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()}, limit=4)
    write_run(tmp_path, "b", {"nano_doc": low()}, limit=4)
    assert check(tmp_path) == []
    assert comparability.notes(discover.runs([tmp_path])[0]) == ["--limit 4: only the first documents of each task"]


def test_a_run_without_a_task_is_refused(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full(), "nano_chart": full()})
    write_run(tmp_path, "b", {"nano_doc": low()})
    with pytest.raises(ReportError, match=r"b has no scores for nano_chart; its mean would be over other tasks"):
        check(tmp_path)
    _, _, said = report.write([tmp_path], tmp_path / "out", allow=("tasks",), formats=("png",))
    assert any(s.startswith("allowed (tasks)") for s in said)
    assert "allowed (tasks)" in (tmp_path / "out" / "table.md").read_text()


def test_every_reason_is_named_at_once(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()})
    write_run(tmp_path, "b", {"nano_doc": low()}, {"max_pixels": 1}, machine="cpu B", status="partial")
    with pytest.raises(ReportError) as refused:
        check(tmp_path)
    assert len(str(refused.value).splitlines()) == 3


def test_an_unscored_partial_run_is_refused_or_left_out_by_name(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()})
    write_run(tmp_path, "b", {"nano_doc": low()}, status="partial")
    for path in (tmp_path / "lmms" / "b").rglob("*samples*"):
        path.unlink()
    with pytest.raises(ReportError, match=r"b is a partial run .* has no scores.*--allow partial to leave it out"):
        discover.runs([tmp_path])
    _, frame, said = report.write([tmp_path], tmp_path / "out", allow=("partial",), formats=("png",))
    assert set(frame["method"]) == {"a"} and any("b is left out" in s for s in said)


def test_unknown_exceptions_formats_and_folders_are_named(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()})
    with pytest.raises(ReportError, match=r"--allow limits: unknown; allowed: pixels"):
        check(tmp_path, ("limits",))
    with pytest.raises(ReportError, match=r"--formats jpg: unknown"):
        report.write([tmp_path], tmp_path / "out", formats=("jpg",))
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    with pytest.raises(ReportError, match=r"holds no runs; expected"):
        discover.runs([tmp_path / "empty"])
    with pytest.raises(ReportError, match=r"two runs are named a .*NAME=PATH"):
        discover.runs([tmp_path, tmp_path / "runs" / "a"])
    assert [r.name for r in discover.runs([tmp_path, f"again={tmp_path / 'runs' / 'a'}"])[0]] == ["a", "again"]


def samples(path):
    (found,) = path.rglob("*_samples_*.jsonl")
    return found


def test_a_score_without_a_record_is_refused(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": DOCUMENTS})
    path = tmp_path / "runs" / "a" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ReportError, match=r"no record for 2 of them.*--use_cache"):
        discover.runs([tmp_path])
    path.write_text("")
    with pytest.raises(ReportError, match=r"holds no records"):
        discover.runs([tmp_path])


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_missing_score_is_refused_not_counted_as_wrong(tmp_path, score):
    write_run(tmp_path, "a", {"nano_doc": [(score, [16], [])]})
    with pytest.raises(ReportError, match=r"document 0 has no anls score"):
        discover.runs([tmp_path])


def test_a_score_out_of_range_is_refused(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": [(71.2, [16], [])]})
    with pytest.raises(ReportError, match=r"scores 71.2 in anls"):
        discover.runs([tmp_path])


def test_duplicates_truncated_lines_unknown_tasks_and_lost_outputs_are_refused(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": DOCUMENTS})
    path = samples(tmp_path)
    whole = path.read_text()
    path.write_text(whole * 2)
    with pytest.raises(ReportError, match=r"document 0 appears twice"):
        discover.runs([tmp_path])
    path.write_text(whole[:-30])
    with pytest.raises(ReportError, match=r"line 4 is not JSON.*rerun lmms-eval for nano_doc"):
        discover.runs([tmp_path])
    path.write_text(whole)
    other = path.rename(path.with_name("1_samples_other.jsonl"))
    with pytest.raises(ReportError, match=r"no accuracy is defined for task 'other'.*--metric other=METRIC"):
        discover.runs([tmp_path])
    other.unlink()
    with pytest.raises(ReportError, match=r"no samples file of lmms-eval in .*--log_samples"):
        discover.runs([tmp_path])


def test_a_named_metric_scores_an_unknown_task(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": DOCUMENTS})
    path = samples(tmp_path)
    path.rename(path.with_name("1_samples_other.jsonl"))
    records_path = tmp_path / "runs" / "a" / "records.jsonl"
    records_path.write_text(records_path.read_text().replace("nano_doc", "other"))
    run = discover.one(tmp_path, {"other": "anls"})
    assert run.documents["score"].mean() == 0.625


def test_records_of_another_version_and_broken_lines_are_refused(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": DOCUMENTS})
    path = tmp_path / "runs" / "a" / "records.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"version": 2', '"version": 99', 1))
    with pytest.raises(ReportError, match=r"a: .*version 99; this release reads versions 1 and 2"):
        discover.runs([tmp_path])
    path.write_text('{"task": "na\n' + whole)
    with pytest.raises(ReportError, match=r"a: .*line 1 is not JSON"):
        discover.runs([tmp_path])


def test_damaged_compact_records_are_refused(tmp_path):
    write_run(tmp_path / "sweep", "a", {"nano_doc": DOCUMENTS})
    compact.write(discover.runs([tmp_path / "sweep"])[0], tmp_path / "small")
    path = tmp_path / "small" / compact.DOCUMENTS
    (kept,) = discover.runs([tmp_path / "small"])[0]
    path.rename(tmp_path / "aside")
    columns = csv.reader(io.StringIO(lzma.decompress((tmp_path / "aside").read_bytes()).decode()))
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(zip(*columns, strict=True))
    for name, pack in zip(compact.OLDER, (lzma.compress, gzip.compress), strict=True):  # as they were written before
        older = tmp_path / "small" / name
        older.write_bytes(pack(rows.getvalue().encode()))
        (read,) = discover.runs([tmp_path / "small"])[0]
        pd.testing.assert_frame_equal(kept.documents, read.documents)
        older.unlink()
    (tmp_path / "aside").rename(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ReportError, match=r"is damaged"):
        discover.runs([tmp_path / "small"])
    path.unlink()
    with pytest.raises(ReportError, match=r"no columns.csv.xz"):
        discover.runs([tmp_path / "small"])
    told = json.loads((tmp_path / "small" / compact.RUNS).read_text())
    (tmp_path / "small" / compact.RUNS).write_text(json.dumps(told | {"version": 9}))
    with pytest.raises(ReportError, match=r"is of version 9; this release reads version 1"):
        discover.runs([tmp_path / "small"])


def fail(run, task, document, error="the image cannot be decoded"):
    """One more document in a run's records, that could not be answered."""
    from awares_bench.evaluation.records import Record

    line = json.dumps(vars(Record(task, document, "test", f"question {document}?", None, error=error)))
    with (run / "records.jsonl").open("a") as records:
        records.write(line + "\n")


def test_documents_left_out_of_every_run_are_named_under_the_tables(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path, name, {"nano_doc": full()})
        fail(tmp_path / "runs" / name, "nano_doc", 7, "half \ud800 " + "x" * 400)
        fail(tmp_path / "runs" / name, "nano_chart", 1)  # of a task that the run has no scores of
    assert check(tmp_path) == []
    _, frame, notes = report.write([tmp_path], tmp_path / "report", formats=())
    said = [n for n in notes if "left out" in n]
    assert len(frame) == 8 and [n.split(" (the first")[0] for n in said] == [
        f"1 document left out of {name}, which could not answer it: nano_doc 7" for name in ("a", "b")
    ]
    assert all(r"half \ud800" in n and len(n) < 300 for n in said)
    for kind in ("md", "tex"):
        assert "left out of" in (tmp_path / "report" / f"table.{kind}").read_text(encoding="utf-8")


def test_a_document_that_one_run_left_out_is_refused_beside_a_run_that_has_it(tmp_path):
    write_run(tmp_path, "a", {"nano_doc": full()})
    write_run(tmp_path, "b", {"nano_doc": low(3)})
    fail(tmp_path / "runs" / "b", "nano_doc", 3)
    with pytest.raises(
        ReportError, match=r"b, nano_doc: 3 documents, a has 4 \(b could not answer 1\); document 3 is in one only"
    ):
        check(tmp_path)
    assert check(tmp_path, ("documents",))
    assert "left_out" not in discover.runs([tmp_path])[0][0].about
