"""A run has one bar, and none where nobody watches; the demo ends with what came out in words."""

import io
import json
import sys

from awares_bench.evaluation import demo
from awares_bench.evaluation.progress import Follower, Progress
from awares_bench.methods.conversation import Failure, Reply, Trajectory, Turn
from awares_bench.methods.usage import Usage


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trajectory(crops=()):
    return Trajectory((Turn(crops=crops),), (Reply("a", usage=Usage(prefill=16.0, text=10, output=2)),), "a", (), 64)


def test_the_bar_tells_documents_tokens_a_second_time_left_calls_and_failures():
    terminal = Terminal()
    with Progress(4, "AwaRes", terminal) as bar:
        for outcome in (trajectory(), trajectory(("left",)), Failure("no"), trajectory(("all",))):
            bar.answered(outcome)
        bar.bar.refresh()
    last = terminal.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    assert "AwaRes: 100%" in last and "4/4 documents" in last and "left" in last and "tokens/s" in last
    assert "2 calls, 1 failed" in last and bar.tokens == 3 * 28


def test_nothing_is_drawn_where_the_stream_is_no_terminal_or_the_process_is_quiet():
    pipe, terminal = io.StringIO(), Terminal()
    for bar in (Progress(1, "x", pipe), Progress(1, "x", terminal, shown=False)):
        with bar:
            bar.answered(trajectory())
        assert bar.tokens == 28
    assert pipe.getvalue() == terminal.getvalue() == ""


def test_what_another_process_records_is_told_once_and_an_unfinished_line_later(tmp_path):
    path = tmp_path / "records.jsonl"
    record = json.dumps({"usage": [{"prefill": 16.0, "text": 10, "output": 2}], "crops": ["left"], "error": None}) + "\n"
    path.write_text(record)  # of an earlier call
    follower, bar = Follower(path), Progress(3, "x", io.StringIO())
    follower.tell(bar)
    assert bar.tokens == 0
    with path.open("a") as file:
        file.write(record + record[:20])
        file.flush()
        follower.tell(bar)
        follower.tell(bar)
        assert (bar.tokens, bar.calls) == (28, 1)
        file.write(record[20:])
    follower.tell(bar)
    assert (bar.tokens, bar.calls) == (56, 2)
    Follower(tmp_path / "nowhere").tell(bar)


def test_the_demo_keeps_what_lmms_eval_prints_in_a_log_and_shows_its_own_bar(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = json.dumps({"usage": [], "crops": [], "error": None})
    (tmp_path / "run").mkdir()
    code = f"import sys; print('a wall of bars', file=sys.stderr); open(r'{tmp_path / 'run' / 'records.jsonl'}', 'w').write({line + chr(10)!r})"
    status = demo._watched([sys.executable, "-c", code], {}, tmp_path / "log", tmp_path / "run", 1, "[1/3] low")
    assert status == 0 and (tmp_path / "log").read_text() == "a wall of bars\n"
    assert "wall" not in terminal.getvalue() and "[1/3] low" in terminal.getvalue() and "1/1 documents" in terminal.getvalue()


def test_the_demo_ends_with_five_lines_that_need_no_table():
    def cell(accuracy, rtr, calls):
        return {"mean": {"accuracy": accuracy, "rtr": rtr, "call_rate": calls}}

    summary = {"awares_full": cell(0.998, 1.0, 0), "awares_low": cell(0.833, 0.25, 0), "awares": cell(0.979, 0.41, 0.45)}
    assert demo._in_words(summary, "awares") == [
        "full resolution:  99.8 % of the answers right, shown every picture whole; its visual tokens are the 100 % of the others",
        "half size:        83.3 % of the answers right, with 25 % of the visual tokens",
        "AwaRes:           97.9 % of the answers right, with 41 % of the visual tokens; it looked closer at 45 % of the documents",
        "So AwaRes saves 59 % of the visual tokens and loses 1.9 points. This is nano, a toy model: it shows that the code works, "
        "not how a 7B model does.",
    ]
    assert demo._in_words({"awares": cell(0.9, None, 0.1)}, "awares") == ["AwaRes:           90.0 % of the answers right"]
