"""Runs resume, never mix, and lose nothing that was answered."""

import json

import pytest

from awares_bench.record import Record, RunFolder, read_records


def record(i, **more):
    return Record("t", i, "test", f"q{i}", f"a{i}", **more)


def test_a_run_resumes_with_what_it_has(tmp_path):
    run = RunFolder(tmp_path, {"method": "full"})
    run.add(record(0))
    run.add(record(1, rtr=0.5))
    run.close()
    again = RunFolder(tmp_path, {"method": "full"})
    assert set(again.done) == {("t", 0, "q0"), ("t", 1, "q1")}
    assert again.done["t", 1, "q1"].rtr == 0.5 and again.done["t", 0, "q0"].rtr is None


def test_an_unfinished_last_line_is_cut_off_and_answered_again(tmp_path):
    run = RunFolder(tmp_path, {})
    run.add(record(0))
    run.close()
    with (tmp_path / "records.jsonl").open("a") as f:
        f.write('{"task": "t", "doc_')
    again = RunFolder(tmp_path, {})
    assert len(again.done) == 1
    again.add(record(1))
    again.close()
    assert [r.doc_id for r in read_records(tmp_path)] == [0, 1]


def test_a_failed_document_is_recorded_and_tried_again(tmp_path):
    run = RunFolder(tmp_path, {})
    run.add(Record("t", 0, "test", "q0", None, error="broken"))
    run.close()
    assert not RunFolder(tmp_path, {}).done
    assert next(read_records(tmp_path)).error == "broken"


def test_another_run_in_the_folder_is_refused_with_what_differs(tmp_path):
    RunFolder(tmp_path, {"method": "full", "max_pixels": 1}).close()
    with pytest.raises(ValueError, match="max_pixels was 1, is 2"):
        RunFolder(tmp_path, {"method": "full", "max_pixels": 2})


def test_a_broken_line_in_the_middle_and_another_version_are_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        list(read_records(tmp_path))
    (tmp_path / "records.jsonl").write_text(json.dumps({"version": 99}) + "\n")
    with pytest.raises(ValueError, match="version 99"):
        list(read_records(tmp_path))


def test_an_unwritable_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="pass output_dir"):
        RunFolder(tmp_path / "file" / "run", {})


def test_a_run_is_partial_until_it_is_whole(tmp_path):
    run = RunFolder(tmp_path, {"method": "full"})
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "partial"
    run.finish(documents=3)
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["status"], told["documents"], told["identity"]) == ("complete", 3, {"method": "full"})


def test_a_full_disk_says_what_is_kept(tmp_path):
    run = RunFolder(tmp_path, {})
    run.add(record(0))

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    run._file.close()
    run._file = Full()
    with pytest.raises(OSError, match=r"No space left on device\. 1 answers are kept"):
        run.add(record(1))
