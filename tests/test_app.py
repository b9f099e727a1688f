"""The page to ask on: what a visitor may do, what is refused in a sentence, and, in a browser, that no question is lost."""

import argparse
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
from PIL import Image

from awares_bench import api, app, app_model, cli
from awares_bench.errors import OptionError, RunError
from awares_bench.inference.engine import Scripted

from .helpers.tiny import picture, tiny_vlm


def ask(image=None, question="what is it?", names=("full",), options=("max_new_tokens=2",), vlm=None):
    return list(app_model.answers(api.Model(vlm or tiny_vlm(), {}), image, question, names, options))


def test_methods_answer_side_by_side_in_the_order_of_the_columns():
    given = ask(
        picture(90, 70),
        names=("full", app.NOTHING, "visionzip"),
        options=("max_new_tokens=2", "", "retention=0.5 max_new_tokens=2"),
    )
    assert [a.method for a in given] == ["full", "visionzip retention=0.5"] and all(a.error is None for a in given)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"image": None}, "there is no picture yet"),
        ({"question": "  "}, "there is no question yet"),
        ({"question": "x" * 5000}, "the question has 5,000 characters; at most 4,000 are taken"),
        ({"names": (app.NOTHING,)}, "no method is chosen"),
        ({"names": ("nothing_known",)}, "unknown method"),
        ({"options": ("retention=2",), "names": ("visionzip",)}, "retention is 2"),
        ({"options": ("tokens=2",)}, "unknown option|tokens"),
        ({"options": ("'",)}, "cannot be read"),
        ({"options": ("pruner=evil.py:Evil",)}, "cannot be named here"),
        ({"names": ("cropvlm",), "options": ("cropper=/etc/passwd",)}, "cannot be named here"),
        ({"names": ("folder/mine.py:Mine",)}, "cannot be named here"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(asked, said):
    with pytest.raises(OptionError, match=said):
        ask(**{"image": picture(60, 60), **asked})


def test_a_method_that_does_not_fit_the_model_is_an_answer_with_an_error():
    class Server(Scripted):  # as an endpoint: it cannot cut tokens
        def reply(self, requests, pruner=None):
            from awares_bench.errors import RunError

            if pruner is not None:
                raise RunError("VisionZip cuts tokens inside the model")
            return super().reply(requests)

    given = ask(
        picture(60, 60), names=("full", "visionzip"), options=("", "retention=0.5"), vlm=Server({"what is it?": ["a dog"]})
    )
    assert given[0].text == "a dog" and given[1].text is None and "inside the model" in given[1].error


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"<svg onload=alert(1)>", b"GIF89a"])
def test_a_hostile_upload_gets_a_sentence(tmp_path, content):
    path = tmp_path / "x<script>.png"
    path.write_bytes(content)
    image, said = app.picture_of(str(path))
    assert image is None and said.startswith('<div class="refused">the image') and "<script>" not in said


def test_an_upload_too_large_is_refused_and_none_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD_BYTES", 10)
    (tmp_path / "x.png").write_bytes(b"0" * 11)
    assert "at most 0 are taken" in app.picture_of(str(tmp_path / "x.png"))[1] and app.picture_of(None) == (None, "")
    assert "No such file" in app.picture_of(str(tmp_path / "gone.png"))[1]


def test_the_six_examples_are_rendered_and_are_no_documents_of_the_shipped_suite():
    from awares_bench.tasks.nano import suite

    shown = app.examples()
    assert len(shown) == 6 and len({image.tobytes() for image, _ in shown}) == 6 and all(q.strip() for _, q in shown)
    seed = suite.suite_seeds(1, app.EXAMPLE_SEED + 1)[app.EXAMPLE_SEED]
    assert seed not in suite.suite_seeds(0, suite.DOCUMENTS)


def test_the_log_escapes_and_numbers_what_was_asked():
    given = ask(picture(60, 60))
    text = app.log([("<b>one</b>", "", given), ("two", "no picture", [])])
    assert "&lt;b&gt;one" in text and '<td class="number">2</td>' in text and "no picture" in text and app.log([]) == ""


def test_options_of_the_command_are_checked_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert cli.main(["app"]) == 1 and 'pip install "awares-bench[app]"' in capsys.readouterr().err
    parser = cli.Parser()
    app.add_arguments(parser)
    args = parser.parse_args([])
    assert (args.host, args.share, args.pretrained) == ("127.0.0.1", False, "nano")
    with pytest.raises(OptionError, match="--engine openai needs --base-url and --model"):
        app_model.load_model(parser.parse_args(["--engine", "openai"]))
    with pytest.raises(OptionError, match="--option retention is not of the checkpoint"):
        app_model.load_model(parser.parse_args(["--option", "retention=0.5"]))


@pytest.fixture
def model_process(monkeypatch):
    """The model's side in a thread of this process, around a scripted model -> (what the page has of it, the end to close)."""
    given = {"one": ["a dog"], "two": ["a cat"]}
    monkeypatch.setattr(app_model, "load_model", lambda args: (api.Model(Scripted(given), {}), "it answers here"))
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=app_model.serve, args=(theirs, None), daemon=True)
    thread.start()
    process = object.__new__(app.ModelProcess)
    process._loading, process._said = threading.Lock(), None
    process._connection, process._process = ours, types.SimpleNamespace(join=lambda seconds: None, exitcode=-9)
    yield process
    ours.close()
    thread.join(5)


def test_the_models_process_answers_refuses_and_goes_on_when_a_visitor_leaves(model_process):
    process = model_process
    assert process.ready() == process.ready() == "it answers here"
    ((drawn, answer),) = process.answers(picture(60, 60), "one", ("full",), ("",))
    assert "a dog" in drawn and answer.text == "a dog" and answer.image is None
    with pytest.raises(OptionError, match="unknown method"):
        list(process.answers(picture(60, 60), "one", ("nothing_known",), ("",)))
    leaving = process.answers(picture(60, 60), "two", ("full", "low"), ("", ""))
    next(leaving)
    leaving.close()  # the second answer is nobody's
    ((_, answer),) = process.answers(picture(60, 60), "two", ("full",), ("",))
    assert answer.text == "a cat"
    kept = process._connection
    process._connection, gone = multiprocessing.Pipe()
    gone.close()
    with pytest.raises(RunError, match="has ended with status -9"):
        list(process.answers(picture(60, 60), "one", ("full",), ("",)))
    process._connection = kept


def test_a_model_that_cannot_be_loaded_is_said_by_the_command(monkeypatch):
    ours, theirs = multiprocessing.Pipe()
    app_model.serve(theirs, argparse.Namespace(engine="openai", base_url=None, model=None, pretrained="nano"))
    process = object.__new__(app.ModelProcess)
    process._connection, process._loading, process._said = ours, threading.Lock(), None
    with pytest.raises(OptionError, match="--engine openai needs --base-url and --model"):
        process.ready()


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("gradio") and find_spec("playwright") and which("chromium")), reason="needs gradio, playwright, chromium"
)
def test_in_a_browser_two_pages_ask_twenty_questions_and_all_are_answered_in_order(tmp_path):
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "awares_bench", "app", "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    hostile = tmp_path / "hostile.png"
    hostile.write_bytes(b"<svg onload=alert(1)>")
    good = tmp_path / "good.png"
    picture(101, 67).save(good)
    try:
        deadline = time.time() + 300
        while time.time() < deadline and socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None
            time.sleep(0.2)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
            pages, elsewhere = [browser.new_page(), browser.new_page()], set()
            for page in pages:
                page.set_default_timeout(900_000)
                page.on("request", lambda r: elsewhere.add(r.url) if f"127.0.0.1:{port}" not in r.url else None)
                page.goto(f"http://127.0.0.1:{port}")
                page.set_input_files("#upload input[type=file]", hostile)
                page.wait_for_selector("#preview .refused")
                page.click("#examples button.thumbnail-item >> nth=4")
                page.wait_for_selector("#preview img")
            for number in range(10):
                for name, page in zip("ab", pages, strict=True):
                    page.fill("#question textarea", f"question {number} of {name}")
                    page.click("#ask")
            for name, page in zip("ab", pages, strict=True):
                page.wait_for_function("document.querySelectorAll('#asked .number').length == 10")
                rows = page.locator("#asked tr").all_text_contents()
                assert [re.search(r"question (\d) of (\w)", row).groups() for row in rows] == [(str(i), name) for i in range(10)]
                assert all("awares" in row and "visionzip" in row and "full" in row for row in rows)
            shown = pages[0].locator("#card2").inner_text()
            assert "tokens go on before the decoder" in shown and "prefill ms" in shown
            assert not [u for u in elsewhere if not u.startswith(("data:", "blob:"))]
            browser.close()
    finally:
        process.terminate()
        process.wait(60)


def test_the_picture_of_an_upload_is_the_file_s(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    image, said = app.picture_of(str(Path(tmp_path / "a.png")))
    assert image.size == (20, 10) and said == ""
