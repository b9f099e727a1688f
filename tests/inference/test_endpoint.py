"""A served model: what is sent, counted and retried; and a real server that is killed and comes back."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image, ImageChops

from awares_bench.awares import AwaRes
from awares_bench.baselines.all_crops import AllCrops
from awares_bench.baselines.full import Full
from awares_bench.errors import RunError
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.openai_server import Endpoint
from awares_bench.methods.conversation import Failure, Sample, Turn
from awares_bench.methods.policy import Policy
from awares_bench.models.packaged import resolve
from awares_bench.training.curation import judges

from ..helpers.lmms_runs import FOLDER, lmms_eval, lmms_eval_process, records
from ..helpers.openai_fake import LIMITS, endpoint, processor, prompt_tokens, start
from ..helpers.stock import stock
from ..helpers.tiny import picture


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Between the tries of one request."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setattr("awares_bench.inference.openai_client.FIRST_WAIT", 0.02)
    monkeypatch.setattr("awares_bench.inference.openai_server.POLL_SECONDS", 0.1)


def jobs(n):
    return [Job(Sample((picture(224, 224, i),), f"which {i}?", str(i)), 8, ("\n\n",)) for i in range(n)]


def one(model, policy=None, tokens=8, until=()):
    """The outcome of one document."""
    job = Job(Sample((picture(224, 224, 0),), "which 0?", "0"), tokens, until)
    return dict(Engine(model, policy or Full(), 1).run([job]))[0]


def kinds(outcome):
    return [str(e.kind) for e in outcome.events]


def test_two_turns_send_the_whole_conversation_and_count_each_image_once(server):
    job = jobs(1)[0]
    (outcome,) = dict(Engine(endpoint(server), AwaRes(), 1).run([job])).values()
    assert (outcome.answer, outcome.crops, outcome.rtr, outcome.events) == ("7", ("bottom-right",), 0.5, ())
    first, second = server.state["bodies"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][:2] == first["messages"] and second["messages"][2]["content"] == "GET_CROPS: ['3']"
    assert first["temperature"] == 0 and (first["max_tokens"], second["max_tokens"]) == (32, 8)
    assert first["stop"] == second["stop"] == ["\n\n"]
    url = second["messages"][3]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert ImageChops.difference(sent, job.sample.images[0].crop((112, 112, 224, 224))).getbbox() is None


def test_a_picture_is_encoded_once_a_conversation(server, monkeypatch):
    from awares_bench.inference import openai_server

    sizes, encode = [], openai_server.image_part
    monkeypatch.setattr(openai_server, "image_part", lambda image: [sizes.append(image.size), encode(image)][1])
    one(endpoint(server), AwaRes())
    assert sizes == [(112, 112), (112, 112)] and len(server.state["bodies"]) == 2


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize("policy", [Full(), AwaRes(), AllCrops()], ids=["full", "awares", "all_crops"])
def test_text_and_output_tokens_are_those_that_our_own_loop_feeds_and_writes(server, policy):
    """Our own loop says what the server is to say; its counts are the oracle for all the others."""
    ours = one(LocalModel.load(resolve("nano"), constrained=False), policy)
    said = iter([r.text for t, r in zip(ours.turns, ours.replies, strict=True) if t.forced_reply is None])
    server.state["choice"] = lambda body: {"message": {"role": "assistant", "content": next(said)}}
    theirs = one(endpoint(server), policy)
    counts = [
        [(r.text, r.usage.text, r.usage.output, r.usage.encoded, r.usage.prefill) for r in o.replies] for o in (ours, theirs)
    ]
    assert counts[0] == counts[1] and (ours.answer, ours.rtr) == (theirs.answer, theirs.rtr) and not theirs.events


def test_a_cut_first_reply_gives_its_last_token_to_the_second_turn_as_in_our_own_loop(server):
    class Twice(Policy):
        def turns(self, sample):
            yield Turn(sample.images, "Describe.", is_final=False, until=())
            return (yield Turn((), "And?", until=()))

    model = LocalModel.load(resolve("nano"), constrained=False)
    ours = one(model, Twice(), tokens=1)
    said = iter([r.text for r in ours.replies])
    server.state["choice"] = lambda body: {
        "message": {"role": "assistant", "content": next(said)}, "finish_reason": "length", "usage": {"completion_tokens": 1},
    }  # fmt: skip
    theirs = one(endpoint(server), Twice(), tokens=1)
    assert not any(r.complete for r in (*ours.replies, *theirs.replies))
    assert [r.usage.text for r in ours.replies] == [r.usage.text for r in theirs.replies]


def test_text_tokens_are_the_servers_where_its_template_is_another(server):
    plain = one(endpoint(server), AwaRes())
    server.state["more"] = 3
    told = one(endpoint(server), AwaRes())
    assert kinds(told) == ["token_count"] * 2 and "templates differ" in told.events[0].detail
    extra = [b.usage.text - a.usage.text for a, b in zip(plain.replies, told.replies, strict=True)]
    assert extra == [3, 0] and told.rtr == plain.rtr  # what the second prompt has more, the first had already
    server.state["more"] = None
    assert kinds(one(endpoint(server), Full())) == ["token_count"]


def test_a_reply_is_cut_at_the_tasks_tokens_by_the_servers_count_never_by_reading_its_text_again(server):
    text = "\ufffd" * 14  # bytes that are no UTF-8 read as more tokens than were written
    own = processor().tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(own) > 16
    server.state["choice"] = {
        "message": {"role": "assistant", "content": text},
        "usage": {"completion_tokens": 16},
        "finish_reason": "length",
    }
    outcome = one(endpoint(server), Full(), tokens=16)
    assert (outcome.answer, outcome.usage.output, outcome.events) == (text, 16, ())
    # AwaRes' first turn may be longer than the task's answer: then the written tokens decide, or nothing can
    server.state["choice"] = {"message": {"role": "assistant", "content": text}, "usage": {"completion_tokens": 17}}
    outcome = one(endpoint(server), AwaRes(), tokens=8)
    assert isinstance(outcome, Failure) and "16 tokens, the task allows 8" in outcome.error
    ids = processor().tokenizer("one two three four five six", add_special_tokens=False)["input_ids"]
    server.state["choice"] = {"message": {"role": "assistant", "content": "one two three four five six"}, "token_ids": [*ids, 0]}
    outcome = one(endpoint(server), AwaRes(), tokens=3)
    assert outcome.answer == processor().tokenizer.decode(ids[:3]) and kinds(outcome) == ["answer_cut"]
    assert outcome.usage.output == len(ids)
    # vLLM's text leaves out bytes at the end that are no whole character; the tokens have them
    part = processor().tokenizer("\U0001f600", add_special_tokens=False)["input_ids"][:1]
    server.state["choice"] = {
        "message": {"content": ""},
        "token_ids": part * 8,
        "finish_reason": "length",
        "usage": {"completion_tokens": 8},
    }
    outcome = one(endpoint(server))
    assert outcome.answer == processor().tokenizer.decode(part * 8) != "" and outcome.usage.output == 8


# ---------------------------------------------------------------------- nothing is scored that the server did not finish

UNFINISHED = {
    "context": ({"message": {"content": "Z"}, "finish_reason": "length", "usage": {"completion_tokens": 1}}, "after 1 of 8 tokens.*--max-model-len"),
    "uncounted": ({"message": {"content": "Z"}, "finish_reason": "length", "usage": {"completion_tokens": None}}, "does not count its tokens"),
    "filter": ({"message": {"content": None}, "finish_reason": "content_filter"}, "content filter"),
    "filtered text": ({"message": {"content": "Z"}, "finish_reason": "content_filter"}, "content filter"),
    "reasoning": ({"message": {"content": None, "reasoning_content": "hm"}}, "whole reply for reasoning.*--reasoning-parser"),
    "reasoning, new name": ({"message": {"content": None, "reasoning": "hm"}}, "whole reply for reasoning.*--reasoning-parser"),
    "tool": ({"message": {"content": None, "tool_calls": [{"id": "1"}]}, "finish_reason": "tool_calls"}, "--enable-auto-tool-choice"),
    "tool, stop": ({"message": {"content": "", "tool_calls": [{"id": "1"}]}}, "--enable-auto-tool-choice"),
    "null": ({"message": {"content": None}, "usage": {"completion_tokens": 9}}, "no content .*9 tokens"),
    "unknown": ({"message": {"content": "Z"}, "finish_reason": "abort"}, "not known here .*'abort'"),
    "no reason": ({"message": {"content": "Z"}, "finish_reason": None}, "not known here .*None"),
    "parts": ({"message": {"content": [{"type": "text", "text": "Z"}]}}, "is no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFINISHED)
def test_what_the_server_did_not_finish_is_a_failure_with_its_cause(server, name):
    server.state["choice"], said = UNFINISHED[name]
    outcome = one(endpoint(server))
    assert isinstance(outcome, Failure) and re.search(said, outcome.error), outcome


def test_what_it_did_finish_is_an_answer(server):
    server.state["choice"] = {"message": {"content": "ZZ ZZ"}, "finish_reason": "length", "usage": {"completion_tokens": 8}}
    outcome = one(endpoint(server))
    assert outcome.answer == "ZZ ZZ" and not outcome.replies[0].complete and outcome.usage.output == 8
    server.state["choice"] = {"message": {"content": None}, "usage": {"completion_tokens": 1}}  # the end token alone
    outcome = one(endpoint(server))
    assert (outcome.answer, outcome.usage.output, outcome.replies[0].complete) == ("", 0, True)
    server.state["choice"] = {"message": {"content": "4", "reasoning_content": "2 and 2"}}
    outcome = one(endpoint(server))
    assert outcome.answer == "4" and kinds(outcome) == ["reasoning_apart"]
    # a stop string ended it, which the server left out as vLLM does, or left in: its tokens are all the reply's
    for content, more in (("7", {"stop_reason": "\n\n"}), ("7\n\nrest", {})):
        server.state["choice"] = {"message": {"content": content}, "usage": {"completion_tokens": 3}, **more}
        outcome = one(endpoint(server), until=("\n\n",))
        assert (outcome.answer, outcome.usage.output, outcome.replies[0].complete) == ("7", 3, True)


# ---------------------------------------------------------------------- what is tried again


def test_rate_limits_and_failing_servers_are_retried_and_refusals_are_not(server):
    server.state["trouble"] = [429, 503, 429]
    outcomes = dict(Engine(endpoint(server), Full(), 1).run(jobs(1)))
    assert not isinstance(outcomes[0], Failure) and len(server.state["bodies"]) == 4
    server.state["trouble"] = [400]
    outcomes = dict(Engine(endpoint(server), Full(), 1).run(jobs(2)))
    assert "refused the request (400)" in outcomes[0].error and not isinstance(outcomes[1], Failure)
    server.state["trouble"] = [503] * 9
    with pytest.raises(RuntimeError, match="goes on where it stopped"):
        dict(Engine(endpoint(server, retries=1), Full(), 1).run(jobs(1)))


BODIES = [
    b"<html>busy</html>",
    b'{"choices": [',
    b"{}",
    b'{"choices": []}',
    b'{"error": "x", "choices": null}',
    b"[1]",
    b'{"choices": [{}]}',
]


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_is_no_completion_is_tried_again_and_named(server, body):
    server.state["trouble"] = [body]
    assert one(endpoint(server, retries=1)).answer == "GET_CROPS: ['3']" and len(server.state["bodies"]) == 2
    server.state["trouble"] = [body]
    outcome = one(endpoint(server, retries=0))
    assert isinstance(outcome, Failure) and "failed at this request 1 times (a body " in outcome.error
    assert body.decode()[:9] in outcome.error
    server.state["trouble"] = [body] * 9
    with pytest.raises(RunError, match=r"did not answer after 0 retries \(a body .*goes on where it stopped"):
        one(endpoint(server, retries=0))


def until(condition) -> float:
    """Waits for it, a minute at most -> 0, as ``seconds`` of the fake server."""
    deadline = time.time() + 60
    while not condition() and time.time() < deadline:
        time.sleep(0.01)
    return 0


def test_a_server_that_hangs_is_noticed_after_timeout_times_tries(server):
    server.state["seconds"] = lambda body: 40 if "which" in str(body["messages"]) else 0
    start = time.time()
    outcome = one(endpoint(server, retries=1, timeout=0.5))
    assert isinstance(outcome, Failure) and "timed out" in outcome.error and time.time() - start < 30


def test_a_conversation_goes_on_when_its_own_reply_is_there(server):
    seen = server.state["bodies"]

    def seconds(body):  # the first document's first turn is answered when all turns of the others were asked
        slow = "which 0?" in str(body["messages"]) and len(body["messages"]) == 2
        return until(lambda: len(seen) == 1 + 2 * 5) if slow else 0

    server.state["seconds"] = seconds
    outcomes = list(Engine(endpoint(server, concurrency=2), AwaRes(), 2).run(jobs(6)))
    assert [i for i, _ in outcomes][-1] == 0 and sorted(i for i, _ in outcomes) == list(range(6))
    assert server.state["most"] == 2 and len(seen) == 12


def test_replies_that_are_finished_are_kept_when_another_ends_the_run(server):
    seen = server.state["bodies"]
    server.state["trouble"] = lambda body: 401 if "which 0?" in str(body["messages"]) else 200

    def seconds(body):  # both are in flight when the first is refused, and the other is answered after it
        until(lambda: len(seen) == 2)
        return 1 if "which 1?" in str(body["messages"]) else 0

    server.state["seconds"] = seconds
    kept = []
    with pytest.raises(RunError, match="401"):
        for i, outcome in Engine(endpoint(server, concurrency=2), Full(), 2).run(jobs(8)):
            kept.append((i, outcome.answer))
    assert kept == [(1, "GET_CROPS: ['3']")] and len(seen) == 2


def test_turns_to_a_model_in_this_process_are_batched_beside_the_servers(server, monkeypatch):
    class Asks(Policy):
        def turns(self, sample):
            yield Turn(sample.images, "Where?", model="cropper")
            return (yield Turn(sample.images, sample.question))

    local = LocalModel.load(resolve("nano"), constrained=False)
    sizes, reply = [], local.reply
    monkeypatch.setattr(local, "reply", lambda requests, pruner=None: [sizes.append(len(requests)), reply(requests, pruner)][1])
    outcomes = dict(Engine(endpoint(server, concurrency=4), Asks(), 4, models={"cropper": local}).run(jobs(11)))
    assert sorted(outcomes) == list(range(11)) and not any(isinstance(o, Failure) for o in outcomes.values())
    assert max(sizes) == 4 and sum(sizes) == 11 and len(server.state["bodies"]) == 11
    assert outcomes[3].usage.aux_encoded == 64


def test_both_turns_of_a_conversation_go_to_one_replica(server):
    dict(Engine(endpoint(server, concurrency=4, replicas=3), AwaRes(), 4).run(jobs(7)))
    met = {}
    for body, rank in zip(server.state["bodies"], server.state["ranks"], strict=True):
        met.setdefault(body["messages"][1]["content"][-1]["text"], []).append(rank)
    assert all(len(ranks) == 2 and len(set(ranks)) == 1 for ranks in met.values()) and len(met) == 7
    assert {ranks[0] for ranks in met.values()} == {"0", "1", "2"}
    one(endpoint(server))
    assert server.state["ranks"][-1] is None  # a server without replicas refuses every rank


# ---------------------------------------------------------------------- the first question


def test_the_server_is_asked_first_for_its_models_and_about_one_picture(server):
    endpoint(server, replicas=4).warm_up()
    (body,) = server.state["bodies"]
    assert body["max_tokens"] == 1 and body["messages"][0]["content"][0]["type"] == "image_url" and server.state["ranks"] == ["3"]
    server.state["models"] = ["nano", "other"]
    with pytest.raises(RunError, match=r"does not serve the model 'm' \(404.*it serves nano, other"):
        endpoint(server).warm_up()
    server.state["key"] = "sesame"
    with pytest.raises(RunError, match=r"\(401\).*OPENAI_API_KEY"):
        endpoint(server).warm_up()
    os.environ["OPENAI_API_KEY"] = "sesame"
    try:
        server.state["models"] = ["m"]
        endpoint(server).warm_up()
    finally:
        del os.environ["OPENAI_API_KEY"]


def test_an_address_without_v1_and_a_server_of_another_kind_are_told_apart(server):
    server.state["models"] = None
    server.state["trouble"] = [404]
    with pytest.raises(RunError, match="it lists no models; does the address end in /v1"):
        endpoint(server).warm_up()
    endpoint(server).warm_up()  # a server without a list, which answers
    server.state["trouble"] = [b"<html>hello</html>"]
    with pytest.raises(RunError, match=r"is no OpenAI-compatible server.*<html>hello"):
        endpoint(server, retries=0).warm_up()
    server.state["trouble"] = [400]
    with pytest.raises(RunError, match=r"a question about a picture was not answered.*\(400\)"):
        endpoint(server).warm_up()


def test_other_pixel_limits_at_the_server_stop_the_run_with_the_flag_that_mends_it(server):
    server.state["limits"] = LIMITS | {"longest_edge": 56 * 56}
    flag = r"--mm-processor-kwargs '\{\"size\": \{\"shortest_edge\": 3136, \"longest_edge\": 12845056\}\}'"
    with pytest.raises(RunError, match=rf"sees 4 visual tokens in a picture of 448x448 where 256 are counted.*{flag}"):
        endpoint(server).warm_up()
    with pytest.raises(RunError, match="sees 4 visual tokens in a picture of 224x224 where 64 are counted"):
        one(endpoint(server))
    server.state["limits"] = LIMITS | {"longest_edge": 448 * 448}  # found at the first picture that is larger
    model = endpoint(server)
    model.warm_up()
    assert not isinstance(one(model), Failure)
    big = Job(Sample((picture(504, 504),), "which?", "0"), 8)
    with pytest.raises(RunError, match="sees 256 visual tokens in a picture of 504x504 where 324"):
        dict(Engine(model, Full(), 1).run([big]))
    server.state["more"] = 5  # another template is no reason to stop
    model.warm_up()


def test_a_server_that_starts_late_or_goes_away_is_waited_for(server, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    model = Endpoint(f"http://127.0.0.1:{port}/v1", "m", "nano", 2, retries=0, wait_for_server=0.5)
    later = []
    threading.Timer(1.0, lambda: later.append(start(port))).start()
    model.warm_up()
    assert "does not answer (Connection error.); waiting up to 0.5 minutes for it (wait_for_server)" in capsys.readouterr().err
    begun = []
    for i, outcome in Engine(model, AwaRes(), 2).run(jobs(8)):
        assert not isinstance(outcome, Failure), outcome
        begun.append(i)
        if len(begun) == 3:  # it goes away for a while
            later[0].shutdown()
            later[0].server_close()
            threading.Timer(1.0, lambda: later.append(start(port))).start()
    assert sorted(begun) == list(range(8)) and capsys.readouterr().err.count("waiting up to") == 1
    later[1].shutdown()
    later[1].server_close()
    model.wait_for_server = 0
    with pytest.raises(RunError, match="did not answer after 0 retries"):
        dict(Engine(model, Full(), 2).run(jobs(2)))


def test_less_than_the_first_turn_in_the_cache_is_an_event_and_said_once(server, capsys):
    def events(cached, n=3):
        server.state["cached"] = cached
        outcomes = dict(Engine(endpoint(server), AwaRes(), 1).run(jobs(n)))
        return [e.detail for o in outcomes.values() for e in o.events], capsys.readouterr().err

    assert events(lambda body: prompt_tokens(body) - 40)[0] == []
    said, screen = events(lambda body: 16)  # the system prompt alone: the picture was lost
    assert len(said) == 3 and "kept 16 of the first turn's" in said[0]
    assert screen.count("--enable-prefix-caching") == screen.count("replicas=N") == 1
    said, _ = events(lambda body: 0)
    assert "kept nothing of" in said[0]
    server.state["cached"] = None
    said, screen = events(None)
    assert len(said) == 3 and "does not say" in said[0] and screen.count("--enable-prompt-tokens-details") == 1


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
    server.state["refuses"] = {"repetition_penalty", "return_token_ids"}
    outcomes = dict(Engine(own, Full(), 1).run(jobs(2)))
    assert [[e.kind for e in outcomes[i].events] for i in (0, 1)] == [["repetition_penalty"]] * 2
    assert "1.05" in outcomes[0].events[0].detail and "repetition_penalty" not in server.state["bodies"][-1]
    own.repetition_penalty = 1.0  # the user wants none, and the server would apply the checkpoint's: not to be scored
    (outcome,) = dict(Engine(own, Full(), 1).run(jobs(1))).values()
    assert isinstance(outcome, Failure) and "repetition_penalty" in outcome.error


def test_a_template_that_can_think_is_told_not_to_as_it_is_rendered_here(server):
    model = endpoint(server)
    one(model)
    assert "chat_template_kwargs" not in server.state["bodies"][-1]
    model.processor.chat_template += "{# enable_thinking #}"
    one(model)
    assert server.state["bodies"][-1]["chat_template_kwargs"] == {"enable_thinking": False}
    server.state["refuses"] = {"chat_template_kwargs"}
    assert "(422)" in one(model).error


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
    with pytest.raises(ValueError, match="allowed: transformers, generic, openai, vllm"):
        model(engine="sglang")
    with pytest.raises(ValueError, match="needs base_url and model"):
        model(engine="openai", model="m")
    with pytest.raises(ValueError, match="is an option of engine=openai"):
        model(**address)
    with pytest.raises(ValueError, match="cuts tokens inside the model"):
        pruned(engine="openai", **address)
    given = {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager", "constrained": True, "reuse_features": 1}
    for name, value in (given | {"max_batch_tokens": 9000}).items():
        with pytest.raises(ValueError, match=f"engine=openai does not read {name}, .*; leave it out, or set it where"):
            model(engine="openai", **address, **{name: value})
    with pytest.raises(ValueError, match="allowed: true, false"):
        model(constrained="maybe")
    with pytest.raises(ValueError, match="max_batch_tokens is 'x'"):
        model(max_batch_tokens="x")
