"""A served model: what is sent, counted and retried; and a real server that is killed and comes back."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image, ImageChops

from awares_bench.awares import AwaRes
from awares_bench.baselines.full import Full
from awares_bench.errors import RunError
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.openai_server import Endpoint
from awares_bench.methods.conversation import Failure, Sample
from awares_bench.models.packaged import resolve
from awares_bench.training.curation import judges

from .lmms_runs import FOLDER, lmms_eval, lmms_eval_process, records
from .stock import stock
from .tiny import picture


class Server(BaseHTTPRequestHandler):
    """Calls for a quadrant, then answers; what it does first is in ``trouble``: status codes."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        with state["lock"]:
            state["flying"] += 1
            state["most"] = max(state["most"], state["flying"])
            state["bodies"].append(body)
            status = state["trouble"].pop(0) if state["trouble"] else 200
            strict = state.get("strict") and "repetition_penalty" in body
            status = 422 if strict else status
        time.sleep(0.05)
        said = "7\n\nrest" if len(body["messages"]) > 2 else "GET_CROPS: ['3']"
        reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]}
        reply |= {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        if state["usage"]:
            reply["usage"] = {"prompt_tokens": state["usage"], "completion_tokens": 5, "total_tokens": 0}
        data = json.dumps(
            reply if status == 200 else {"error": {"message": "no repetition_penalty" if strict else "no"}}
        ).encode()
        with state["lock"]:
            state["flying"] -= 1
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.state = {"lock": threading.Lock(), "flying": 0, "most": 0, "bodies": [], "trouble": [], "usage": None}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def endpoint(server, **more):
    return Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", "nano", **more)


def jobs(n):
    return [Job(Sample((picture(224, 224, i),), f"which {i}?", str(i)), 8, ("\n\n",)) for i in range(n)]


def test_two_turns_send_the_whole_conversation_and_count_each_image_once(server):
    job = jobs(1)[0]
    (outcome,) = dict(Engine(endpoint(server), AwaRes(), 1).run([job])).values()
    assert (outcome.answer, outcome.crops, outcome.rtr) == ("7", ("bottom-right",), 0.5)
    assert [e.kind for e in outcome.events] == ["prefix_cache"]
    first, second = server.state["bodies"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][:2] == first["messages"] and second["messages"][2]["content"] == "GET_CROPS: ['3']"
    assert first["temperature"] == 0 and (first["max_tokens"], second["max_tokens"]) == (32, 8)
    url = second["messages"][3]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert ImageChops.difference(sent, job.sample.images[0].crop((112, 112, 224, 224))).getbbox() is None


def test_text_tokens_are_those_that_our_own_loop_feeds(server):
    job = jobs(1)[0]
    (ours,) = dict(Engine(LocalModel.load(resolve("nano"), constrained=False), Full(), 1).run([job])).values()
    (theirs,) = dict(Engine(endpoint(server), Full(), 1).run([job])).values()
    assert theirs.usage.text == ours.usage.text and theirs.usage.encoded == ours.usage.encoded == theirs.full_tokens
    server.state["usage"] = ours.usage.text + ours.usage.encoded
    (told,) = dict(Engine(endpoint(server), Full(), 1).run([job])).values()
    assert (told.usage.text, told.usage.output, told.events) == (ours.usage.text, 5, ())
    server.state["usage"] += 3
    (told,) = dict(Engine(endpoint(server), Full(), 1).run([job])).values()
    assert told.usage.text == ours.usage.text + 3 and [e.kind for e in told.events] == ["token_count"]


def test_rate_limits_and_failing_servers_are_retried_and_refusals_are_not(server):
    server.state["trouble"] = [429, 503, 429]
    outcomes = dict(Engine(endpoint(server), Full(), 1).run(jobs(1)))
    assert not isinstance(outcomes[0], Failure) and len(server.state["bodies"]) == 4
    server.state["trouble"] = [400]
    outcomes = dict(Engine(endpoint(server), Full(), 1).run(jobs(2)))
    assert "refused the request (400)" in outcomes[0].error and not isinstance(outcomes[1], Failure)
    server.state["trouble"] = [503] * 3
    with pytest.raises(RuntimeError, match="goes on where it stopped"):
        dict(Engine(endpoint(server, retries=1), Full(), 1).run(jobs(1)))


@pytest.mark.parametrize(("status", "remedy"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "/v1/models")])
def test_a_wrong_key_address_or_model_ends_the_run_at_the_first_document(server, status, remedy):
    server.state["trouble"] = [status] * 9
    with pytest.raises(RunError, match=rf"model m: the server refused the request \({status}\).*{remedy}"):
        dict(Engine(endpoint(server, concurrency=1), Full(), 1).run(jobs(4)))
    assert len(server.state["bodies"]) == 1


@pytest.mark.parametrize("address", ["127.0.0.1:8000/v1", "localhost", "http://", "http://host:port/v1", "ftp://host/v1"])
def test_an_address_that_cannot_be_one_is_refused_at_once(address):
    for opened in (lambda: Endpoint(address, "m", "nano"), lambda: judges.judge("endpoint", "m", address)):
        with pytest.raises(ValueError, match=r"such as http://localhost:8000/v1") as caught:
            opened()
        assert repr(address) in str(caught.value)


def test_a_judge_retries_as_the_engine_does_and_says_what_it_got_instead_of_an_answer(server):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    server.state["trouble"] = [429, 503]
    judge = judges.Endpoint(address, "m")
    assert judge.say("hello") == "GET_CROPS: ['3']" and len(server.state["bodies"]) == 3
    assert server.state["bodies"][-1]["messages"] == [{"role": "user", "content": "hello"}]
    server.state["trouble"] = [401]
    with pytest.raises(judges.JudgeError, match=r"refused the request \(401\).*OPENAI_API_KEY"):
        judge.say("hello")
    assert len(server.state["bodies"]) == 4
    for body in (None, "<html>", SimpleNamespace(choices=[]), SimpleNamespace(choices=None)):
        judge.client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=lambda body=body, **_: body)))
        with pytest.raises(judges.JudgeError, match=r"no chat completion.*already judged is kept"):
            judge.say("hello")


def test_requests_fly_together_and_answers_are_those_of_one_by_one(server):
    outcomes = dict(Engine(endpoint(server, concurrency=4), AwaRes(), 4).run(jobs(9)))
    assert sorted(outcomes) == list(range(9)) and {o.answer for o in outcomes.values()} == {"7"}
    assert 2 <= server.state["most"] <= 4


def test_what_needs_the_inside_of_the_model_is_refused():
    model = Endpoint("http://127.0.0.1:9/v1", "m", "nano")
    with pytest.raises(ValueError, match="inside the model"):
        model.reply([], pruner=object())
    with pytest.raises(ValueError, match="leave engine=openai out"):
        model.hidden_states([])


def test_the_checkpoints_penalty_is_sent_and_a_server_that_knows_none_is_trusted_with_it(server):
    dict(Engine(endpoint(server), Full(), 1).run(jobs(1)))
    assert "repetition_penalty" not in server.state["bodies"][-1]  # nano asks for none
    dict(Engine(endpoint(server, repetition_penalty=1.2), Full(), 1).run(jobs(1)))
    assert server.state["bodies"][-1]["repetition_penalty"] == 1.2
    own = endpoint(server)
    own.own_penalty = own.repetition_penalty = 1.05
    (outcome,) = dict(Engine(own, Full(), 1).run(jobs(1))).values()
    assert server.state["bodies"][-1]["repetition_penalty"] == 1.05 and not outcome.events
    server.state["strict"] = True
    outcomes = dict(Engine(own, Full(), 1).run(jobs(2)))
    assert [[e.kind for e in outcomes[i].events] for i in (0, 1)] == [["repetition_penalty"]] * 2
    assert "1.05" in outcomes[0].events[0].detail and "repetition_penalty" not in server.state["bodies"][-1]
    own.repetition_penalty = 1.0  # the user wants none, and the server would apply the checkpoint's: not to be scored
    (outcome,) = dict(Engine(own, Full(), 1).run(jobs(1))).values()
    assert isinstance(outcome, Failure) and "repetition_penalty" in outcome.error


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.05, 1.0])
def test_a_served_stock_checkpoint_says_what_our_own_loop_says(tmp_path, penalty):
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    folder, port = str(stock(penalty=penalty)), free_port()
    server = serve(port, tmp_path, folder)
    sizes = ((224, 168), (56, 392), (196, 84), (448, 336), (28, 140), (308, 308), (252, 112), (140, 476))
    asked = [Job(Sample((picture(*size, seed=i),), f"What is value {i}?", str(i)), 48) for i, size in enumerate(sizes)]
    try:
        served = Endpoint(f"http://127.0.0.1:{port}/v1", folder, folder, 1)
        theirs = dict(Engine(served, Full(), 1).run(asked))
    finally:
        server.kill()
        server.wait()
    ours = dict(Engine(LocalModel.load(folder, "float32", "cpu"), Full(), 1).run(asked))
    assert len({o.answer for o in ours.values()}) > 4
    for i in ours:
        assert not isinstance(theirs[i], Failure), (theirs[i].error, (tmp_path / "server.log").read_text()[-2000:])
        assert (theirs[i].answer.strip(), theirs[i].rtr) == (ours[i].answer.strip(), ours[i].rtr)  # this server strips answers
        assert [e.kind for e in theirs[i].events] == ["repetition_penalty"] * (penalty != 1)


def serve(port, cwd, model=None):
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model or resolve("nano"), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=quiet, stdout=(cwd / "server.log").open("a"), stderr=subprocess.STDOUT)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_a_run_outlives_a_server_that_is_killed_and_comes_back(tmp_path):
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    port, out = free_port(), tmp_path / "served"
    server = serve(port, tmp_path)
    arguments = ["--model", "awares", "--tasks", "nano_doc", "--include_path", FOLDER, "--limit", 24, "--batch_size", 2]
    said, address = [], f"engine=openai,base_url=http://127.0.0.1:{port}/v1,model={resolve('nano')}"
    served = [*arguments, "--model_args", f"{address},output_dir={out}"]
    client = threading.Thread(target=lambda: said.append(lmms_eval_process(tmp_path, *served)))
    try:
        client.start()  # before the server listens: the client waits for it
        deadline = time.time() + 400
        while len(records(out)) < 4 and time.time() < deadline and client.is_alive():
            time.sleep(0.2)
        killed_at = len(records(out))
        server.kill()
        server.wait()
        server = serve(port, tmp_path)
        client.join(500)
    finally:
        server.kill()
        server.wait()
    assert 4 <= killed_at < 24, (said, (tmp_path / "server.log").read_text()[-2000:])
    lines = {x["doc_id"]: x for x in records(out)}
    assert sorted(lines) == list(range(24)) and not any(x["error"] for x in lines.values()), said[-1][-2000:]

    ours = tmp_path / "ours"
    lmms_eval(tmp_path, *arguments, "--model_args", f"dtype=float32,constrained=false,output_dir={ours}")
    for x in records(ours):
        other = lines[x["doc_id"]]
        assert (other["answer"], other["crops"], other["rtr"]) == (x["answer"], x["crops"], x["rtr"])
        assert [e["kind"] for e in other["events"]] == ["prefix_cache"] * (len(x["replies"]) - 1)


def test_a_server_is_recorded_with_the_limits_that_count_its_tokens(tmp_path):
    from awares_bench.evaluation import lmms_model

    address = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    lmms_model.awares(engine="openai", max_pixels=200_704, output_dir=str(tmp_path), **address)
    identity = json.loads((tmp_path / "run.json").read_text())["identity"]
    assert (identity["max_pixels"], identity["served"], identity["dtype"]) == (200_704, "m", None)


def test_options_that_do_not_fit_the_engine_say_what_to_do():
    from awares_bench.evaluation import lmms_model

    model, pruned = (getattr(lmms_model, name) for name in ("awares", "visionzip"))
    address = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    with pytest.raises(ValueError, match="allowed: transformers, openai"):
        model(engine="vllm")
    with pytest.raises(ValueError, match="needs base_url and model"):
        model(engine="openai", model="m")
    with pytest.raises(ValueError, match="is an option of engine=openai"):
        model(**address)
    with pytest.raises(ValueError, match="cuts tokens inside the model"):
        pruned(engine="openai", **address)
    with pytest.raises(ValueError, match="allowed: true, false"):
        model(constrained="maybe")
    with pytest.raises(ValueError, match="max_batch_tokens is 'x'"):
        model(max_batch_tokens="x")
