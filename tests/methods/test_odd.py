"""One odd document is its own failure: recorded, the others answered; with on_error=skip it is left out of every score."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from awares_bench.awares import AwaRes
from awares_bench.baselines.full import Full
from awares_bench.errors import RunError
from awares_bench.evaluation import sweep
from awares_bench.evaluation.records import Record, RunFolder, read_records
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.openai_server import Endpoint
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Event, Failure, Reply, Sample, Turn
from awares_bench.methods.policy import Policy
from awares_bench.methods.pruner import Pruner
from awares_bench.models.qwen2_5_vl import Qwen2_5_VL
from awares_bench.reports.data import comparability

from ..helpers import odd, official
from ..helpers.lmms_runs import lmms_eval, lmms_eval_process, records, samples
from ..helpers.openai_fake import Server, endpoint
from ..helpers.tiny import chunk_ids, picture, pixels, tiny_copy, tiny_vlm

pytestmark = pytest.mark.usefixtures("task_files_read_once")

HALF = "\ud83d"


def job(i, question="Which?", image=None, tokens=4):
    return Job(Sample((picture(84 + 28 * (i % 3), 112, i) if image is None else image,), question, str(i)), tokens)


def ended(jobs, vlm=None, policy=None, batch_size=4, **more):
    return dict(Engine(vlm or tiny_vlm(), policy or Full(), batch_size, **more).run(jobs))


def failures(outcomes):
    return {i: o.error for i, o in outcomes.items() if isinstance(o, Failure)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_odd_documents_change_no_answer_of_their_neighbours(batch_size, workers, monkeypatch):
    vlm = tiny_copy()
    whole = Qwen2_5_VL.image_input

    def image_input(self, image, key="", share=1.0):
        if image.size == (99, 99):
            raise ZeroDivisionError("float division by zero")
        return whole(self, image, key, share)

    monkeypatch.setattr(Qwen2_5_VL, "image_input", image_input)
    good = [job(i) for i in range(8)]
    bad = [
        job(10, f"Which {HALF}?"),
        job(11, "Which <|image_pad|>?"),
        job(12, image=Image.new("RGB", (0, 5))),
        job(13, image=b"no picture"),
        job(14, image="https://example.com/a.png"),
        job(15, image=Image.new("RGB", (99, 99))),
        job(16, "word " * 40000),
        Job(Sample((), "  ", "17"), 4),
    ]
    mixed = [j for pair in zip(good, bad, strict=True) for j in pair]
    alone, outcomes = ended(good, vlm, batch_size=batch_size), ended(mixed, vlm, batch_size=batch_size, workers=workers)
    assert sorted(failures(outcomes)) == list(range(1, 16, 2))
    for i in range(8):
        assert [r.tokens for r in outcomes[2 * i].replies] == [r.tokens for r in alone[i].replies]
    said = [outcomes[i].error for i in range(1, 16, 2)]
    for text, wanted in zip(
        said,
        (
            "lone surrogate U+D83D",
            "stands for an image",
            "no pixels (0x5)",
            "cannot be decoded",
            "nothing is downloaded",
            "ZeroDivisionError: float division by zero (test_odd.py, line",
            "max_position_embeddings",
            "neither a question nor an image",
        ),
        strict=True,
    ):
        assert wanted in text


def test_a_batch_that_fails_goes_on_in_halves_and_says_so():
    class Brittle:
        def __init__(self):
            self.vlm, self.rows = tiny_vlm(), []

        def __getattr__(self, name):
            return getattr(self.vlm, name)

        def reply(self, requests, pruner=None):
            self.rows.append(len(requests))
            for r in requests:
                r.session.events.append(Event("half_done"))
                if r.turn.text == "bad":
                    raise IndexError("list index out of range")
            for r in requests:
                r.session.events.pop()
            return self.vlm.reply(requests, pruner)

    model = Brittle()
    outcomes = ended([job(i, "bad" if i == 2 else "Which?") for i in range(4)], model, workers=0)
    assert list(failures(outcomes)) == [2] and "IndexError: list index out of range" in outcomes[2].error
    assert model.rows[0] == 4 and 1 in model.rows and model.rows.count(4) == 1
    for i in (0, 1, 3):
        kinds = Counter(e.kind for e in outcomes[i].events)
        assert kinds["batch_failed"] >= 1 and kinds["half_done"] == 0
        assert outcomes[i].answer == ended([job(i)])[0].answer


class Odd(Policy):
    """Does one odd thing for each question."""

    def turns(self, sample):
        kind = sample.question
        if kind == "key":
            raise KeyError("missing")
        if kind == "empty":
            raise AssertionError
        if kind == "half":
            raise ValueError(f"no {HALF} here")
        if kind == "thing":
            yield 7
        if kind == "image":
            yield Turn(("not an image",), kind)
        if kind == "budget":
            yield Turn(sample.images, kind, min_reply_tokens="many")
        if kind == "none":
            return None
        if kind == "early":
            return Reply("said without asking")
        reply = yield Turn(sample.images, kind)
        if kind == "late":
            yield Event("noted")
            raise ZeroDivisionError
        if kind == "stop":
            next(iter(()))
        return reply


ODD = {
    "key": "KeyError: 'missing' (test_odd.py, line",
    "empty": "AssertionError (test_odd.py, line",
    "half": "ValueError: no",
    "thing": "Odd yielded 7, which is neither a Turn nor an Event",
    "image": "AttributeError",
    "budget": "TypeError",
    "none": "Odd ended with None, which is not a Reply",
    "early": "returned a reply and asked nothing",
    "late": "ZeroDivisionError",
    "stop": "RuntimeError: generator raised StopIteration",
}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_whatever_a_policy_does_for_one_document_is_that_documents_failure(batch_size):
    kinds = [k for kind in ODD for k in (kind, "Which?")]
    outcomes = ended([job(i, kind) for i, kind in enumerate(kinds)], policy=Odd(), batch_size=batch_size)
    assert {kinds[i] for i in failures(outcomes)} == set(ODD)
    assert all(ODD[kinds[i]] in error for i, error in failures(outcomes).items()), failures(outcomes)


def test_a_policy_whose_look_is_no_generator_fails_its_documents():
    class Plain(Policy):
        def turns(self, sample):
            return {}["x"] if sample.question == "bad" else Full().turns(sample)

    assert list(failures(ended([job(0), job(1, "bad"), job(2)], policy=Plain()))) == [1]


def test_what_no_document_can_be_answered_after_ends_the_run(monkeypatch):
    vlm, asked = tiny_copy(), []

    def broken(*_):
        asked.append(1)
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(vlm, "_reply", broken)
    with pytest.raises(RuntimeError, match=r"the device failed \(CUDA error: device-side assert triggered\).*goes on where it"):
        ended([job(i) for i in range(4)], vlm)
    assert len(asked) == 1


def test_a_pruner_that_does_not_fit_the_model_is_refused_before_any_document():
    class Deep(Pruner):
        def cut_layers(self, layers):
            return {layers + 3: 0.5}

    with pytest.raises(ValueError, match="this model has 3 layers"):
        Engine(tiny_vlm(), Full(), 1, pruner=Deep())


# ------------------------------------------------------------------ questions


@pytest.mark.parametrize("mark", Qwen2_5_VL.image_marks)
def test_a_question_with_a_mark_of_a_picture_is_refused_in_a_sentence(mark):
    error = ended([job(0, f"What is {mark}?")])[0].error
    assert error == f"the question holds the text '{mark}', which stands for an image; remove it from the question"


@pytest.mark.parametrize("half", ["\ud800", "\udbff", "\udc00", "\udfff", "\udcff tail"])
def test_half_a_character_is_named(half):
    assert f"U+{ord(half[0]):04X}" in ended([job(0, f"Which {half}?")])[0].error


@pytest.mark.parametrize(
    "text", ["\ufdd0reply\ufdd0", "\ufdd0reply\ufdd0\ufdd0", "\uffff", "\U0001ffff", "\0", "<|im_end|>", "\u2028"]
)
def test_noncharacters_are_read_like_other_text(text):
    """The second turn holds nothing of the first, whatever the first one says."""
    vlm, session = tiny_vlm(), Session()
    vlm.reply([Request(session, Turn((), f"Which {text}?", is_final=False), 2)])
    second = chunk_ids(vlm, session, Turn((), f"And {text}?"))[len(session.unfed_tokens) :]
    plain = Session()
    vlm.reply([Request(plain, Turn((), "Which?", is_final=False), 2)])
    wanted = chunk_ids(vlm, plain, Turn((), "And ?"))[len(plain.unfed_tokens) :]
    more = len(vlm.tokenizer(f"And {text}?", add_special_tokens=False)["input_ids"])
    assert len(second) - more == len(wanted) - len(vlm.tokenizer("And ?", add_special_tokens=False)["input_ids"])
    assert not failures(ended([job(0, f"Which {text}?"), job(1)], policy=AwaRes()))


def test_an_empty_question_is_answered_and_said():
    outcomes = ended([job(0, ""), job(1, " \n")])
    assert not failures(outcomes) and all([e.kind for e in o.events] == ["no_question"] for o in outcomes.values())


def test_a_context_that_is_full_cuts_the_reply_and_says_so(monkeypatch):
    vlm = tiny_copy()
    vlm.host.stop = set()
    free = ended([job(0, tokens=9)], vlm, batch_size=1)[0]
    ids = vlm.prepare(Request(Session(), Turn(job(0).sample.images, "Which?"), 9)).ids
    grid = pixels(vlm, job(0).sample.images[0])[1]
    end = len(ids) - ids.count(vlm.host.image_token) + max(grid[1:]) // 2
    for room in (9, 3, 1):
        monkeypatch.setattr(vlm.host.decoder.config, "max_position_embeddings", end + room)
        cut = ended([job(0, tokens=9)], vlm, batch_size=1)[0]
        assert cut.replies[0].tokens == free.replies[0].tokens[:room]
        assert [e.kind for e in cut.events] == (["context_full"] if room < 9 else [])
    monkeypatch.setattr(vlm.host.decoder.config, "max_position_embeddings", end)
    assert (
        f"takes {end:,} positions, the checkpoint's context (max_position_embeddings) has {end:,}"
        in ended([job(0)], vlm)[0].error
    )


# ------------------------------------------------------------------ servers


@pytest.fixture
def picky(server):
    """A server that fails with ``status`` at every question that holds the word poison."""
    server.state["status"], post = 500, Server.do_POST

    class Picky(Server):
        def do_POST(self):
            body = self.rfile.peek()  # the body follows the headers
            if b"poison" in body:
                self.rfile.read(int(self.headers["Content-Length"]))
                data = json.dumps({"error": {"message": "CUDA kernel failed"}}).encode()
                self.send_response(server.state["status"])
                for name, value in (("Content-Type", "application/json"), ("Content-Length", len(data)), ("Retry-After", "0")):
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)
            else:
                post(self)

    server.RequestHandlerClass = Picky
    return server


def served(server, questions, **more):
    jobs = [Job(Sample((Image.new("RGB", (56, 56)),), q, str(i)), 8) for i, q in enumerate(questions)]
    return dict(Engine(endpoint(server, retries=1, **more), Full(), 4).run(jobs))


@pytest.mark.parametrize("status", [500, 502, 429, 408])
def test_a_document_that_a_healthy_server_always_fails_at_is_its_own_failure(picky, status):
    picky.state["status"] = status
    outcomes = served(picky, ["a", "poison", "b", "c", "poison", "d"])
    assert sorted(failures(outcomes)) == [1, 4]
    assert f"the server failed at this request 2 times ({status}: " in outcomes[1].error and "answers others" in outcomes[1].error


def test_a_server_that_fails_at_everything_still_ends_the_run(server):
    server.state["trouble"] = [500] * 100
    with pytest.raises(RunError, match=r"did not answer after 1 retries.*goes on where it stopped"):
        served(server, ["a", "b"])
    with pytest.raises(RuntimeError, match="did not answer"):
        gone = Endpoint("http://127.0.0.1:9/v1", "m", "nano", retries=0, wait_for_server=0)
        dict(Engine(gone, Full(), 1).run([job(0)]))


def test_a_served_question_is_checked_like_any_other(server):
    outcomes = served(server, ["a", f"b{HALF}", "<|vision_start|>", "\ufdd0reply\ufdd0"])
    assert sorted(failures(outcomes)) == [1, 2]


# ------------------------------------------------------------------ records


def test_a_record_with_half_a_character_is_written_and_read_back(tmp_path):
    run = RunFolder(tmp_path, {})
    run.add(Record("t", 0, "test", f"q{HALF}", None, error=f"no {HALF}"))
    run.add(Record("t", 1, "test", f"r{HALF}", "a\u2028\0"))
    run.add(Record("t", 2, "test", "grün", "ü"))
    run.close()
    found = list(read_records(tmp_path))
    assert [r.question for r in found] == [f"q{HALF}", f"r{HALF}", "grün"] and found[0].error == f"no {HALF}"
    assert "grün" in (tmp_path / "records.jsonl").read_text(encoding="utf-8")
    assert len(RunFolder(tmp_path, {}).done) == 2


# ------------------------------------------------------------------ lmms-eval


def run(place, weights, *more, model="awares", tasks="odd", include="task", ranks=0, **options):
    told = ",".join(f"{k}={v}" for k, v in ({"pretrained": weights, "output_dir": place / "run"} | options).items())
    arguments = ["--model", model, "--tasks", tasks, "--model_args", told, "--log_samples", "--output_path", place / "out"]
    arguments += ["--include_path", place / include] if include else []
    if ranks:
        return lmms_eval_process(place, *arguments, *more, env={"ACCELERATE_USE_CPU": "true"}, ranks=ranks)
    return lmms_eval(place, *arguments, *more)


def results(place):
    paths = sorted(place.rglob("*_results.json"))
    return json.loads(paths[-1].read_text()) if paths else None


def told(place):
    return json.loads((place / "run" / "run.json").read_text())


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, checkpoint):
    place = tmp_path_factory.mktemp("skip")
    (place / "task").mkdir()
    odd.write(place / "task")
    return place, run(place, checkpoint, "--batch_size", 4, on_error="skip")


def test_skip_scores_the_answered_documents_and_no_other(skipped):
    place, said = skipped
    answered = [i for i, kind in enumerate(odd.KINDS) if kind in odd.ANSWERED]
    rows = samples(place / "out")["odd"]
    assert [row["doc_id"] for row in rows] == answered, said[-3000:]
    assert results(place)["results"]["odd"]["here,none"] == sum(i % 2 for i in answered) / len(answered)
    lines = records(place / "run")
    assert {x["doc_id"] for x in lines if x["error"] is None} == set(answered) and len(lines) == len(odd.KINDS)
    for x in lines:
        if x["error"] is not None:
            assert odd.FAILED[odd.KINDS[x["doc_id"]]] in x["error"] and x["answer"] is None
    lost = [i for i in range(len(odd.KINDS)) if i not in answered]
    assert told(place)["status"] == "complete" and told(place)["left_out"] == {"odd": lost}
    assert f"{len(lost)} of {len(odd.KINDS)} documents of odd are left out of the scores (1, 3" in said
    assert "lmms-eval's numbers of odd are over the others" in said


@pytest.mark.slow
def test_a_skipped_run_tries_its_failures_again_and_heals(skipped, checkpoint):
    place, _ = skipped
    missing = odd.KINDS.index("missing")
    (place / "task" / f"{missing}.png.gone").write_bytes((place / "task" / f"{missing}.png").read_bytes())
    said = run(place, checkpoint, on_error="skip")
    assert f"{len(odd.ANSWERED)} of {len(odd.KINDS)} answers are taken from" in said
    again = {x["doc_id"] for x in records(place / "run")[len(odd.KINDS) :]}
    assert again == {i for i, kind in enumerate(odd.KINDS) if kind in odd.FAILED}
    assert missing not in told(place)["left_out"]["odd"]
    newest = max((place / "out").rglob("*_samples_odd.jsonl"))
    assert len(newest.read_text().splitlines()) == len(odd.ANSWERED) + 1
    from awares_bench.reports import report

    (run_found,), frame, notes = report.write([f"odd={place / 'out'}"], place / "foreign", metrics={"odd": "here"}, formats=())
    assert len(frame) == len(odd.ANSWERED) + 1 and run_found.name == "odd" and not any("left out" in n for n in notes)


@pytest.mark.slow
def test_stop_is_the_default_and_names_the_option(skipped, checkpoint, tmp_path):
    said = run(tmp_path, checkpoint, include=skipped[0] / "task")
    assert "documents could not be answered: odd document" in said and "or add on_error=skip" in said
    assert results(tmp_path) is None and told(tmp_path)["status"] == "partial"
    assert sum(x["error"] is None for x in records(tmp_path / "run")) >= len(odd.ANSWERED)


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_official_task_with_broken_pictures_can_be_completed(tmp_path, checkpoint, ranks):
    official.write(tmp_path, broken=True)
    said = run(tmp_path, checkpoint, model="awares_full", tasks="chartqa,pope", include=None, ranks=ranks, on_error="skip")
    found = samples(tmp_path / "out")
    assert {t: sorted(x["doc_id"] for x in rows) for t, rows in found.items()} == {"chartqa": [0, 3], "pope": [0, 3]}, said[
        -3000:
    ]
    assert told(tmp_path)["left_out"] == {"chartqa": [1, 2], "pope": [1, 2]}
    scored = results(tmp_path)["results"]["chartqa"]
    assert scored["relaxed_overall,none"] == sum(x["relaxed_overall"] for x in found["chartqa"]) / 2


@pytest.mark.slow
def test_a_task_of_which_nothing_is_left_is_not_scored(tmp_path, checkpoint):
    (tmp_path / "task").mkdir()
    odd.write(tmp_path / "task")
    rows = (tmp_path / "task" / "rows.jsonl").read_text().splitlines()
    (tmp_path / "task" / "rows.jsonl").write_text("\n".join(r for r in rows if '"mark"' in r or '"video"' in r))
    said = run(tmp_path, checkpoint, on_error="skip")
    assert "no document of odd could be answered, so on_error=skip leaves nothing to score; document 0: the question" in said
    assert results(tmp_path) is None and told(tmp_path)["status"] == "partial"


def model(tmp_path, checkpoint, **more):
    from awares_bench.evaluation import lmms_model

    return lmms_model.full(pretrained=str(checkpoint), output_dir=tmp_path / "run", **more)


def test_a_request_that_is_not_its_tasks_own_cannot_be_skipped(tmp_path, checkpoint):
    """A round of an agentic task would be scored whatever stands for its answer."""
    from lmms_eval.api.instance import Instance

    made = model(tmp_path, checkpoint, on_error="skip")
    made.task_dict = {"t": {"test": [{"q": "Which?"}, {"q": "<|image_pad|>"}]}}
    requests = [
        Instance(
            "generate_until",
            (
                "",
                lambda d: [{"role": "user", "content": [{"type": "text", "text": d["q"]}]}],
                {"max_new_tokens": 2},
                i,
                "t",
                "test",
            ),
            0,
            {"task": "t", "doc_id": i, "repeats": 1},
        )
        for i in range(2)
    ]
    with pytest.raises(RuntimeError, match=r"t document 1 .* cannot leave out"):
        made.generate_until(requests)
    assert requests[1].doc_id == 1


def test_on_error_has_two_values_and_needs_an_evaluator_that_passes_over_documents(tmp_path, checkpoint, monkeypatch):
    from awares_bench.evaluation import lmms_model

    with pytest.raises(ValueError, match="on_error is 'ignore'; allowed: stop, skip"):
        model(tmp_path, checkpoint, on_error="ignore")
    monkeypatch.setattr(lmms_model, "version", lambda name: "0.7.2")
    with pytest.raises(ValueError, match=r"needs lmms-eval 0\.7\.3 or later.*this is 0\.7\.2"):
        model(tmp_path, checkpoint, on_error="skip")
    model(tmp_path, checkpoint).run.close()


@pytest.mark.slow
def test_a_sweep_counts_what_was_scored_tries_again_and_is_done_when_healed(tmp_path, checkpoint):
    (tmp_path / "task").mkdir()
    odd.write(tmp_path / "task")
    text = f"{{tasks: odd, include_path: task, batch_size: 4, options: {{pretrained: {checkpoint}, on_error: skip}}, methods: [full]}}"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = sweep.read(tmp_path / "recipe.yaml")
    out = tmp_path / "out"
    assert [c["status"] for c in sweep.run(recipe, out)] == ["done"] and not sweep._is_done(out, recipe.cells[0])
    assert results(out / "lmms")["n-samples"]["odd"]["effective"] == len(odd.ANSWERED)
    ran = out / "runs" / "full"
    assert len(records(ran)) == len(odd.KINDS)
    sweep.run(recipe, out)
    assert len(records(ran)) == len(odd.KINDS) + len(odd.FAILED)
    from awares_bench.reports import report
    from awares_bench.reports.data import discover

    _, frame, notes = report.write([out], tmp_path / "report", metrics={"odd": "here"}, formats=(), compact=tmp_path / "compact")
    (note,) = [n for n in notes if "left out" in n]
    assert note.startswith("10 documents left out of full, which could not answer them: odd 1, 3, ") and "lone surrogate" in note
    assert len(frame) == len(odd.ANSWERED)
    for table in ("table", "cost"):
        assert "10 documents left out of full" in (tmp_path / "report" / f"{table}.md").read_text(encoding="utf-8")
    again = discover.one(tmp_path / "compact")
    assert set(again.about["left_out"]["odd"]) == {str(i) for i, k in enumerate(odd.KINDS) if k in odd.FAILED}
    assert comparability.notes([again])[0] == note
