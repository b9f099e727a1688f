"""Runs resume, never mix, and lose nothing that was answered."""

import json

import pytest

from awares_bench.evaluation.records import Record, RunFolder, read_records


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


def test_an_answer_counts_for_its_own_content_and_arguments_only(tmp_path):
    run = RunFolder(tmp_path, {})
    run.add(record(0, content="c0", generation={"max_new_tokens": 8}))
    run.close()
    again, key = RunFolder(tmp_path, {}), ("t", 0, "q0")
    assert again.holds(key, {"max_new_tokens": 8}, lambda: "c0")
    assert not again.holds(key, {"max_new_tokens": 8}, lambda: "c1")
    never = lambda: pytest.fail("the document was read")  # noqa: E731
    assert not again.holds(key, {"max_new_tokens": 1}, never) and not again.holds(("t", 0, "other"), {}, never)


def test_records_of_an_earlier_release_are_read_and_answered_again(tmp_path):
    old = {"task": "t", "doc_id": 0, "split": "test", "question": "q0", "answer": "a0", "version": 1}
    (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n")
    (read,) = read_records(tmp_path)
    assert (read.answer, read.content, read.generation, read.attempt) == ("a0", None, None, 0)
    run = RunFolder(tmp_path, {})
    assert not run.holds(("t", 0, "q0"), {"max_new_tokens": 8}, lambda: "c0")
    run.add(record(0, content="c0", generation={"max_new_tokens": 8}))
    run.close()
    assert [r.content for r in read_records(tmp_path)] == ["c0"]


def test_what_version_1_said_in_events_is_in_fields_now(tmp_path):
    def event(kind, detail):
        return {"kind": kind, "detail": detail}

    old = {"task": "t", "split": "test", "question": "q", "answer": "a", "version": 1, "crops": ["all"]}
    events = [
        [event("box", "8,0,40,20"), event("image_exif", "x")],
        [event("malformed_call", "no region 99")],
        [event("malformed_box", "y")],
    ]
    lines = [json.dumps(old | {"doc_id": i, "events": some}) for i, some in enumerate(events)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    box, call, other = read_records(tmp_path)
    assert box.boxes == [[8, 0, 40, 20]] and box.events == events[0][1:] and box.malformed_call is None
    assert call.malformed_call == "no region 99" and call.events == events[1] and call.boxes == []
    assert (other.malformed_call, other.boxes, other.crops, other.version) == (None, [], ["all"], 2)
    run = RunFolder(tmp_path, {})  # a run of an earlier release goes on: lines of both versions are read
    run.add(record(3))
    run.close()
    assert [json.loads(line)["version"] for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [1, 1, 1, 2]
    assert list(read_records(tmp_path))[:3] == [box, call, other]


def test_the_last_attempt_is_in_force_whatever_file_it_is_in(tmp_path):
    for rank, error in ((0, "broken"), (1, None), (0, None)):  # records-1.jsonl is read before records.jsonl
        run = RunFolder(tmp_path, {}, rank)
        run.add(Record("t", 0, "test", f"q{rank}", None if error else f"by {rank}", error=error))
        run.close()
        (found,) = read_records(tmp_path)
        assert (found.answer, found.error) == (None if error else f"by {rank}", error)
    assert found.attempt == 2 and set(RunFolder(tmp_path, {}).done) == {("t", 0, "q0")}


def test_a_document_that_fails_now_has_no_answer_any_more(tmp_path):
    run = RunFolder(tmp_path, {})
    run.add(record(0, content="c0"))
    run.add(Record("t", 0, "test", "q0", None, error="broken", content="c1"))
    assert not run.done and next(read_records(tmp_path)).error == "broken"


def test_tasks_join_a_folder_one_by_one_and_another_of_the_same_name_is_refused(tmp_path):
    run = RunFolder(tmp_path, {"method": "full"})
    run.expect({"a": {"version": 1, "split": "test"}})
    run.expect({"b": {"version": 1}})
    run.finish()
    run.close()
    again = RunFolder(tmp_path, {"method": "full"})
    again.expect({"a": {"version": 1, "split": "test"}, "c": {"version": 2}})
    assert set(json.loads((tmp_path / "run.json").read_text())["tasks"]) == {"a", "b", "c"}
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r"holds answers to another a \(version was 1, is 2\)\. Pass another output_dir"):
            RunFolder(tmp_path, {"method": "full"}, rank).expect({"a": {"version": 2, "split": "test"}})
    with pytest.raises(ValueError, match="dataset was None, is 'x'"):
        again.expect({"b": {"version": 1, "dataset": "x"}})


def test_what_an_earlier_release_did_not_know_of_a_run_is_added(tmp_path):
    RunFolder(tmp_path, {"method": "full"}).close()
    RunFolder(tmp_path, {"method": "full", "code": "x"}).close()
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == {"method": "full", "code": "x"}
    with pytest.raises(ValueError, match="code was 'x', is 'y'"):
        RunFolder(tmp_path, {"method": "full", "code": "y"})


def test_other_packages_are_said_and_kept_in_the_folder(tmp_path, capsys):
    run = RunFolder(tmp_path, {})
    run.add(record(0))
    run.close()
    RunFolder(tmp_path, {}).close()
    assert not capsys.readouterr().err
    told = json.loads((tmp_path / "run.json").read_text())
    told["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(told))
    RunFolder(tmp_path, {}).close()
    assert "torch was '1.0', is" in capsys.readouterr().err
    RunFolder(tmp_path, {}).close()
    (earlier,) = json.loads((tmp_path / "run.json").read_text())["earlier"]
    assert earlier["versions"]["torch"] == "1.0"


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
