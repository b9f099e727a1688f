"""The Python API and ``awares-bench ask``: what lmms-eval's records hold, on one picture; refusals in sentences; nothing unescaped."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import awares_bench
from awares_bench import api, cli
from awares_bench.card import page
from awares_bench.errors import AnswerError, AwaresError, OptionError
from awares_bench.methods.conversation import Event, Reply
from awares_bench.tasks import nano as nano_suite

from .helpers.tiny import picture, tiny_vlm

pytestmark = pytest.mark.usefixtures("task_files_read_once")

TASKS = Path(nano_suite.__file__).parent
EXAMPLE = Path(__file__).parent / "helpers" / "example_method.py"
METHODS = [
    "full",
    "low",
    "awares",
    "visionzip retention=0.25",
    "awares pruner=visionzip retention=0.5",
    f"{EXAMPLE}:Strip share=0.5",
]


@pytest.fixture(scope="module")
def nano():
    return awares_bench.load("nano")


@pytest.fixture(scope="module")
def document():
    row = pd.read_parquet(TASKS / "nano_doc.parquet").iloc[0]
    return row["image"]["bytes"], row["question"]


@pytest.fixture(scope="module")
def tiny():
    return api.Model(tiny_vlm(), {})


def test_every_public_name_is_there_and_comes_when_asked_for():
    code = (
        "import sys, awares_bench; assert not {'torch', 'PIL', 'numpy'} & set(sys.modules);"
        "from awares_bench import Policy, Turn, Event, Sample, AwaRes, AwaresError; assert 'torch' not in sys.modules;"
        "assert set(awares_bench.__all__) <= set(dir(awares_bench))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(getattr(awares_bench, name) is not None for name in awares_bench.__all__)
    with pytest.raises(AttributeError, match="'awares_bench' has no attribute 'lod'"):
        awares_bench.lod  # noqa: B018


def test_an_answer_holds_what_the_model_saw_said_and_cost(nano, document):
    answer = nano.ask(*document)
    assert answer.text and answer.error is None and str(answer) == answer.text
    assert len(answer.turns) == len(answer.replies) == (2 if answer.crops else 1)
    assert answer.tokens == sum(r.usage.prefill for r in answer.replies)
    assert answer.rtr == pytest.approx(answer.tokens / answer.full_tokens)
    assert answer.seconds == pytest.approx(sum(r.usage.seconds for r in answer.replies)) and answer.seconds > 0
    assert answer.malformed is False and answer.image.size == Image.open(io.BytesIO(document[0])).size


def test_it_is_the_answer_that_lmms_eval_records(nano, document, tmp_path):
    from awares_bench.evaluation import lmms_model as lmms
    from awares_bench.evaluation import lmms_run

    model = lmms.awares(output_dir=str(tmp_path / "run"), batch_size=1)
    lmms_run.evaluate(model, ("nano_doc",), 1, lmms_run.task_index(), tmp_path / "lmms")
    (record,) = awares_bench.evaluation.records.read_records(tmp_path / "run")
    answer = nano.ask(document[0], record.question, max_new_tokens=record.generation["max_new_tokens"])
    assert (answer.text, list(answer.crops), answer.rtr) == (record.answer, record.crops, record.rtr)
    assert [r.text for r in answer.replies] == record.replies


def test_a_run_ends_with_a_table(tmp_path, capsys):
    from awares_bench.evaluation import lmms_model as lmms
    from awares_bench.evaluation import lmms_run

    lmms_run.evaluate(lmms.low(output_dir=str(tmp_path / "run")), ("nano_doc",), 2, lmms_run.task_index(), tmp_path / "lmms")
    said = capsys.readouterr().err
    assert f"records: {tmp_path / 'run'}" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("nano_doc"))
    assert row[:5] == ["nano_doc", "2", "0.250", "0", "%"]


def test_any_kind_of_picture_gets_the_same_answer(nano, document, tmp_path):
    data, question = document
    (tmp_path / "a.png").write_bytes(data)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", data, io.BytesIO(data), image, np.asarray(image), {"bytes": data}]
    assert len({nano.ask(kind, question).text for kind in kinds}) == 1
    with (tmp_path / "a.png").open("rb") as file:
        assert len(awares_bench.compare(nano, file, question, ["low", "full"])) == 2
        with pytest.raises(AnswerError, match="nothing left to read"):
            nano.ask(file, question)
    with pytest.raises(AnswerError, match=r"open for str.*'rb'"):
        nano.ask(io.StringIO("x"), question)


def test_many_questions_keep_their_order_and_one_that_fails_is_alone(tiny):
    pairs = [(picture(112, 84, i), f"question {i}?") for i in range(5)]
    odd = [
        *pairs[:2],
        ("nowhere.png", "what?"),
        (pairs[0][0], 7),
        (pairs[0][0], "<|image_pad|>"),
        *pairs[2:],
        (b"no picture", "?"),
    ]
    answers = tiny.ask_many(iter(odd), batch_size=3, max_new_tokens=4)
    assert [a.question for a in answers] == [str(q) for _, q in odd]
    assert [a.error is None for a in answers] == [True, True, False, False, False, True, True, True, False]
    assert "no image file at 'nowhere.png'" in answers[2].error and "type int" in answers[3].error
    lost = answers[2]
    assert (lost.text, lost.rtr, lost.tokens, lost.seconds, lost.full_tokens, lost.image) == (None,) * 6
    alone = [tiny.ask(*pair, max_new_tokens=4).text for pair in pairs]
    assert [a.text for a in answers if a.error is None] == alone
    assert tiny.ask_many([]) == []


@pytest.mark.parametrize("text", METHODS)
def test_a_method_is_named_as_in_lmms_eval(tiny, text):
    (answer,) = awares_bench.compare(tiny, picture(112, 112), "?", [text], max_new_tokens=3)
    assert answer.error is None and answer.tokens > 0 and "<div" in answer._repr_html_()


def test_a_method_with_a_model_of_its_own_loads_it_once(nano, document, monkeypatch):
    loads = []
    real = api.LocalModel.load.__func__
    monkeypatch.setattr(api.LocalModel, "load", classmethod(lambda cls, *key: loads.append(key) or real(cls, *key)))
    for _ in range(2):
        answer = nano.ask(*document, method="cropvlm", cropper="nano-sft")
    assert len(loads) == 1 and {t.model for t in answer.turns} == {"", "cropper"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "visionzp"}, "unknown method 'visionzp'. Did you mean visionzip?"),
        ({"method": "visionzip", "retenton": 0.5}, "unknown option 'retenton'. Did you mean 'retention'?"),
        ({"method": "visionzip", "retention": 2}, "retention is 2; it must be a number above 0"),
        ({"method": "low", "pruner": "awares"}, "awares is not a pruner"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number"),
        ({"method": "nowhere.py:Mine"}, "no file nowhere.py"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(tiny, given, said):
    with pytest.raises(OptionError) as error:
        tiny.ask(picture(56, 56), "?", **given)
    assert said in str(error.value) and isinstance(error.value, (AwaresError, ValueError))


def test_options_of_loading_are_refused_as_in_lmms_eval():
    for given, said in [
        ({"min_pixels": 0}, "min_pixels is 0; it must be at least 1"),
        ({"constrained": "yes"}, "constrained is 'yes'; allowed: true, false"),
        ({"pretrained": "nano-giant"}, "no weights named 'nano-giant'"),
    ]:
        with pytest.raises(ValueError, match=said):
            awares_bench.load(**given)


def test_a_comparison_is_an_aligned_table_and_refuses_before_it_asks(tiny):
    answers = awares_bench.compare(tiny, picture(112, 84), "what?", ["full", "low", "visionzip retention=0.25"], max_new_tokens=3)
    lines = str(answers).splitlines()
    assert lines[0].split() == ["method", "answer", "crops", "visual", "tokens", "RTR", "ms"] and len(lines) == 4
    assert len({len(line) for line in lines}) == 1 and answers[0].rtr == 1 and "1.000" in lines[1]
    for methods, said in [
        ("low", "pass a list"),
        ([], "methods is empty"),
        (["low", "lwo"], "unknown method"),
        (["low x"], "not KEY=VALUE"),
        (["'"], "cannot be read"),
    ]:
        with pytest.raises(OptionError, match=said):
            awares_bench.compare(tiny, "nowhere.png", "what?", methods)
    assert awares_bench.compare(tiny, "nowhere.png", "what?", ["low"])[0].error


def test_a_card_shows_views_crops_turns_and_costs(nano, document):
    answer = next(a for a in (nano.ask(document[0], q, method="all_crops") for q in [document[1]]))
    shown = answer._repr_html_()
    assert shown.count("<img") == sum(len(t.images) for t in answer.turns) + (1 if answer.crops else 0)
    for word in ("half-size view", "message", "visual tokens", "prefill ms", f"RTR {answer.rtr:.2f}", "turn 2"):
        assert word in shown
    assert "http" not in shown and "<script" not in shown


def test_nothing_of_a_user_or_a_model_is_markup(tiny):
    evil = "<script>alert('1')</script>&\x1b[2J"
    answer = tiny.ask(picture(112, 84), evil, max_new_tokens=2)
    reply = Reply(evil)
    event = Event(evil, evil)
    answer = api.Answer(evil, evil, answer.image, evil, evil, (evil,), 0.5, 1, 2, 0.1, answer.turns, (reply,), (event,))
    compared = api.Comparison([answer])
    for shown in (answer._repr_html_(), compared._repr_html_(), page("", evil)):
        assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "\x1b" not in str(compared) + api.summary(answer)
    api.Answer("low", "half \ud800", error="half \ud800")._repr_html_().encode()


def test_ask_prints_the_answer_and_its_numbers(capsys, document, tmp_path):
    (tmp_path / "a.png").write_bytes(document[0])
    asked = ["ask", str(tmp_path / "a.png"), document[1]]
    assert cli.main([*asked, "--html", str(tmp_path / "new" / "card.html")]) == 0
    words = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert {"answer", "crops", "visual", "RTR", "seconds", "method"} <= set(words)
    assert "awares-card" in (tmp_path / "new" / "card.html").read_text()
    assert (
        cli.main(
            [*asked, "--method", "visionzip", "--option", "retention=0.25", "--option", "dtype=float32", "--compare", "full,low"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "visionzip", "full", "low"] and "retention=0.25" in lines[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "no image file at"),
        (["--method", "visionzp"], "Did you mean visionzip?"),
        (["--option", "retention"], "'retention' is not KEY=VALUE"),
        (["--option", "retentin=1"], "unknown option 'retentin'"),
        (["--compare", "full,,low"], "the method '' cannot be read"),
        (["--option", "max_new_tokens=none much"], "max_new_tokens is 'none much'"),
    ],
)
def test_ask_refuses_in_a_sentence_before_it_loads(more, said, capsys, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("loaded"))
    assert cli.main(["ask", "nowhere.png", "what?", *more]) == 1
    err = capsys.readouterr().err
    assert err.startswith("awares-bench ask: ") and said in err and "Traceback" not in err


@pytest.mark.slow
def test_the_example_runs(document, tmp_path):
    (tmp_path / "a.png").write_bytes(document[0])
    example = Path(__file__).parents[1] / "examples" / "one_image.py"
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path / "a.png"), document[1]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "RTR" in done.stdout and (tmp_path / "answer.html").exists()
