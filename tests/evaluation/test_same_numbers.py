"""The same answers as lmms-eval's own Qwen2.5-VL on a checkpoint as released: the six official tasks, token for token.

Its model loads weights in bfloat16 whatever it is told; here they are then taken to float32, as ours are. Pictures have sides that are
multiples of 28, since ``qwen_vl_utils`` resizes others with Pillow and the processor with torchvision (``bench engine`` counts what that costs).
"""

import json

import pytest
from lmms_eval.evaluator import simple_evaluate

from awares_bench.evaluation.lmms_model import MethodModel
from awares_bench.evaluation.lmms_run import task_index

from ..helpers import official
from ..helpers.lmms_runs import records
from ..helpers.stock import stock, stock_qwen3
from ..inference.test_endpoint import free_port, serve

pytestmark = [
    pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels` to a processor:FutureWarning"),  # lmms-eval's
    pytest.mark.usefixtures("task_files_read_once"),
]


@pytest.fixture
def no_deprecated_name():
    """Not here: lmms-eval's own model calls transformers by old names."""


SIZES = ((224, 168), (56, 392), (196, 84), (448, 336), (28, 140), (308, 308), (252, 112), (140, 476))


class Full(MethodModel):
    method = "full"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    official.write(folder, sizes=SIZES)
    return folder


@pytest.fixture
def here(data, monkeypatch):
    """The official task names find their data from the working folder."""
    monkeypatch.chdir(data)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data / "cache"))


def theirs(folder, **limits):
    pytest.importorskip("qwen_vl_utils")
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

    model = Qwen2_5_VL(str(folder), batch_size=1, device="cpu", device_map="cpu", attn_implementation="sdpa", **limits)
    model._model = model._model.float()
    return model


def ours(folder, out, **more):
    return Full(pretrained=str(folder), output_dir=str(out), batch_size=1, device="cpu", **more)


def said(model, tasks, gen_kwargs=None):
    """-> {(task, document): answer}, {task: its scores}."""
    index = task_index()
    found = simple_evaluate(
        model=model, tasks=index.match_tasks(tasks.split(",")), task_manager=index, bootstrap_iters=0, gen_kwargs=gen_kwargs
    )
    answers = {(task, row["doc_id"]): row["resps"][0][0] for task, rows in found["samples"].items() for row in rows}
    scores = {t: {k: v for k, v in row.items() if isinstance(v, (int, float))} for t, row in found["results"].items()}
    return answers, scores


LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}


def test_every_answer_and_score_of_the_six_tasks_is_lmms_evals(here, tmp_path):
    folder = stock(tied=True, penalty=1.05)
    expected, their_scores = said(
        theirs(folder, **LIMITS), official.TASKS, "max_new_tokens=12"
    )  # 128 of them: the slow test below
    answers, scores = said(ours(folder, tmp_path / "run", **LIMITS), official.TASKS, "max_new_tokens=12")
    assert len(expected) == 6 * len(SIZES) and len(set(expected.values())) > len(expected) / 2
    assert answers == expected and scores == their_scores
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["identity"]["repetition_penalty"] == 1.05


QWEN3_SIZES = ((256, 256), (64, 448), (224, 96), (512, 384), (320, 320), (288, 128), (160, 544), (32, 160))
QWEN3_LIMITS = {"min_pixels": 4 * 32 * 32, "max_pixels": 16384 * 32 * 32}
SYSTEM = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("tasks", "tokens", "tied", "penalty"),
    [
        pytest.param("ocrbench", 12, True, 1.05, marks=pytest.mark.slow),
        *(pytest.param(official.TASKS, 128, t, p, marks=pytest.mark.slow) for t in (True, False) for p in (1.05, 1.0)),
    ],
)
def test_every_answer_of_qwen3_vl_is_that_of_lmms_evals_simple_model(tmp_path, monkeypatch, tasks, tokens, tied, penalty):
    """Its simple model: the chat one never applies pixel limits to pictures. Both say a system message, which the template does not have."""
    pytest.importorskip("qwen_vl_utils")
    pytest.importorskip("decord", reason="lmms-eval's qwen3_vl imports it, for videos")
    from lmms_eval.models.simple.qwen3_vl import Qwen3_VL

    official.write(tmp_path / "data", sizes=QWEN3_SIZES)
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, budget = stock_qwen3(tied, penalty), f"max_new_tokens={tokens}"
    model = Qwen3_VL(str(folder), batch_size=1, device="cpu", device_map="cpu", attn_implementation="sdpa", **QWEN3_LIMITS)
    model._model = model._model.float()
    expected, their_scores = said(model, tasks, budget)
    answers, scores = said(ours(folder, tmp_path / "run", system_prompt=SYSTEM, **QWEN3_LIMITS), tasks, budget)
    assert len(expected) == (tasks.count(",") + 1) * len(QWEN3_SIZES) and len(set(expected.values())) > len(expected) / 2
    assert answers == expected and scores == their_scores


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.05, 1.0])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_so_is_every_answer_of_128_tokens(here, tmp_path, tied, penalty):
    folder = stock(tied, penalty)
    expected, their_scores = said(theirs(folder, **LIMITS), official.TASKS, "max_new_tokens=128")
    answers, scores = said(ours(folder, tmp_path / "run", **LIMITS), official.TASKS, "max_new_tokens=128")
    assert answers == expected and scores == their_scores
    short = [a for a in expected.values() if len(a) < max(map(len, expected.values())) / 4]
    assert short and any("\n\n" in a.strip() for a in expected.values())  # some end by themselves, some have a blank line


@pytest.mark.slow
def test_limits_that_bite_give_the_same_answers(here, tmp_path):
    folder = stock()
    limits = {"min_pixels": 16 * 28 * 28, "max_pixels": 64 * 28 * 28}
    expected, _ = said(theirs(folder, **limits), "ocrbench", "max_new_tokens=8")
    answers, _ = said(ours(folder, tmp_path / "run", **limits), "ocrbench", "max_new_tokens=8")
    assert answers == expected


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.05, 1.0])
def test_so_is_every_answer_of_a_served_checkpoint(here, tmp_path, penalty):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install 'transformers[serving]'")
    folder, port = stock(penalty=penalty), free_port()
    expected, their_scores = said(theirs(folder, **LIMITS), official.TASKS, "max_new_tokens=48")
    address = {"engine": "openai", "base_url": f"http://127.0.0.1:{port}/v1", "model": str(folder)}
    server = serve(port, tmp_path, str(folder))
    try:
        answers, scores = said(ours(folder, tmp_path / "run", **address, **LIMITS), official.TASKS, "max_new_tokens=48")
    finally:
        server.kill()
        server.wait()
    assert len(expected) == 6 * len(SIZES) and len(set(expected.values())) > len(expected) / 2
    other = {key: (answers[key], text) for key, text in expected.items() if answers[key].strip() != text.strip()}
    assert not other and scores == their_scores  # this server strips answers
    events = [[e["kind"] for e in row["events"]] for row in records(tmp_path / "run")]
    assert events == [["repetition_penalty"] * (penalty != 1)] * len(expected)  # it takes none and applies the checkpoint's own
