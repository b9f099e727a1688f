"""vLLM in this process: against a stand-in that answers with transformers' ``generate``; and, slow, against vLLM itself, in process and served.

The slow tests need vLLM: in this environment, or in that of the interpreter which AWARES_BENCH_VLLM names, where this package is installed too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from awares_bench.awares import AwaRes
from awares_bench.baselines.all_crops import AllCrops
from awares_bench.baselines.full import Full
from awares_bench.errors import RunError
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.vllm_model import VllmModel
from awares_bench.methods.conversation import Failure, Sample, Turn, chat_messages
from awares_bench.methods.policy import Policy
from awares_bench.models.packaged import resolve

from ..helpers.lmms_runs import FOLDER, lmms_eval_process, records
from ..helpers.openai_fake import processor
from ..helpers.stock import stock
from ..helpers.tiny import picture
from .test_endpoint import free_port


class StandIn:
    """vLLM's ``LLM`` as far as it is used, answering with transformers' ``generate``."""

    def __init__(self, model: str, **arguments):
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        self.arguments, self.prompts, self.parameters = arguments, [], []
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
        self.change = lambda output: output

    def generate(self, prompts, parameters, use_tqdm=True):
        assert len(prompts) == len(parameters) and not use_tqdm
        if any("poison" in processor().tokenizer.decode(p["prompt_token_ids"]) for p in prompts):
            raise ValueError("The decoder prompt is too long")
        self.prompts += prompts
        self.parameters += parameters
        return [self._one(p, asked) for p, asked in zip(prompts, parameters, strict=True)]

    def _one(self, prompt, asked):
        pictures = prompt.get("multi_modal_data", {}).get("image", [])
        made = [processor().image_processor(images=[p], size=self.arguments["mm_processor_kwargs"]["size"]) for p in pictures]
        grids, ids = [m["image_grid_thw"] for m in made], []
        counts = iter([int(g[0].prod()) // 4 for g in map(torch.as_tensor, grids)])
        for token in prompt["prompt_token_ids"]:
            ids += [token] * next(counts) if token == processor().image_token_id else [token]
        shown = {}
        if pictures:
            shown["pixel_values"] = torch.cat([torch.as_tensor(m["pixel_values"]) for m in made])
            shown["image_grid_thw"] = torch.cat([torch.as_tensor(g) for g in grids])
            shown["mm_token_type_ids"] = torch.tensor([[int(t == processor().image_token_id) for t in ids]])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **shown, do_sample=False,
                max_new_tokens=asked.max_tokens, repetition_penalty=asked.repetition_penalty,
            )[0, len(ids) :].tolist()  # fmt: skip
        ended = out[-1] in (processor().tokenizer.eos_token_id, processor().tokenizer.pad_token_id)
        text = processor().tokenizer.decode(out, skip_special_tokens=True)
        output = SimpleNamespace(text=text, token_ids=out, finish_reason="stop" if ended else "length", stop_reason=None)
        return self.change(SimpleNamespace(outputs=[output], prompt_token_ids=ids, num_cached_tokens=len(ids) - 9))


@pytest.fixture
def vllm(monkeypatch):
    stand_in = SimpleNamespace(LLM=StandIn, SamplingParams=lambda **asked: SimpleNamespace(**asked))
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return stand_in


def jobs(n, tokens=8, until=()):
    sizes = ((224, 224), (196, 84), (112, 280), (308, 252))
    return [Job(Sample((picture(*sizes[i % 4], i),), f"What is value {i}?", str(i)), tokens, until) for i in range(n)]


def shape(outcome):
    """All that must be equal between engines."""
    assert not isinstance(outcome, Failure), outcome
    turns = [
        (r.text, r.tokens, r.complete, r.usage.text, r.usage.output, r.usage.encoded, r.usage.prefill) for r in outcome.replies
    ]
    return outcome.answer, outcome.rtr, outcome.crops, turns, [str(e.kind) for e in outcome.events]


class Twice(Policy):
    def turns(self, sample):
        yield Turn(sample.images, "Describe.", is_final=False, until=())
        return (yield Turn((), sample.question, until=()))


@pytest.mark.parametrize("policy", [Full(), AwaRes(), AllCrops(), Twice()], ids=["full", "awares", "all_crops", "twice"])
def test_answers_and_every_count_are_those_of_our_own_loop(vllm, policy):
    model, own = VllmModel("nano", 4, dtype="float32"), LocalModel.load(resolve("nano"), constrained=False)
    for tokens in (3, 12):
        theirs, ours = (dict(Engine(m, policy, 4).run(jobs(4, tokens))) for m in (model, own))
        assert {i: shape(o) for i, o in theirs.items()} == {i: shape(o) for i, o in ours.items()}


def test_what_is_asked_of_vllm(vllm):
    model = VllmModel(
        "nano", 5, max_pixels=200_704, dtype="float32", repetition_penalty=1.1, options={"max_model_len": 900, "seed": 7}
    )
    asked = model.llm.arguments
    assert asked["mm_processor_kwargs"] == {"size": {"shortest_edge": 3136, "longest_edge": 200_704}}
    assert (
        asked["limit_mm_per_prompt"] == {"image": 8, "video": 0} and asked["enable_prefix_caching"] and asked["max_num_seqs"] == 5
    )
    assert (asked["dtype"], asked["max_model_len"], asked["seed"], model.dtype) == ("float32", 900, 7, "float32")
    dict(Engine(model, Full(), 5).run(jobs(1, until=("\n",))))
    (parameters,) = model.llm.parameters
    assert (parameters.temperature, parameters.max_tokens, parameters.stop, parameters.repetition_penalty) == (
        0.0,
        8,
        ["\n"],
        1.1,
    )


def test_auto_is_the_dtype_of_the_local_engine_and_of_a_quantised_checkpoint_vllms(vllm, tmp_path, monkeypatch):
    """vLLM's own auto would run nano in bfloat16 on a CPU."""
    assert VllmModel("nano").llm.arguments["dtype"] == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert VllmModel("nano").llm.arguments["dtype"] == "bfloat16"
    copy = tmp_path / "quantised"
    shutil.copytree(resolve("nano"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: torch.nn.Identity())
    assert VllmModel(str(copy)).llm.arguments["dtype"] == "auto"
    with pytest.raises(ValueError, match="dtype is 'half'; allowed: auto, "):
        VllmModel("nano", dtype="half")


def test_the_second_turn_goes_on_with_the_tokens_of_the_first(vllm):
    model = VllmModel("nano", 1)
    (outcome,) = dict(Engine(model, Twice(), 1).run(jobs(1))).values()
    first, second = (p["prompt_token_ids"] for p in model.llm.prompts)
    assert second[: len(first) + len(outcome.replies[0].tokens)] == [*first, *outcome.replies[0].tokens]
    assert len(model.llm.prompts[1]["multi_modal_data"]["image"]) == 1


def test_bytes_that_are_no_whole_character_are_read_as_our_own_loop_reads_them(vllm):
    """vLLM's text leaves them out until the character is whole, and a cut reply ends before."""
    model = VllmModel("nano", 1)
    ids = processor().tokenizer("é")["input_ids"][:1] if len(processor().tokenizer("é")["input_ids"]) > 1 else []
    ids = ids or processor().tokenizer("\U0001f600")["input_ids"][:1]
    assert "\ufffd" in processor().tokenizer.decode(ids)

    def change(made):
        vars(made.outputs[0]).update(text="", token_ids=ids * 8, finish_reason="length")
        return made

    model.llm.change = change
    (outcome,) = dict(Engine(model, Full(), 1).run(jobs(1))).values()
    assert outcome.answer == processor().tokenizer.decode(ids * 8) and outcome.usage.output == 8


def test_what_vllm_did_not_finish_is_a_failure(vllm):
    model = VllmModel("nano", 1)

    def outcome(**changes):
        def change(made):
            vars(made.outputs[0]).update(changes)
            return made

        model.llm.change = change
        return dict(Engine(model, Full(), 1).run(jobs(1, 64)))[0]

    assert "max_model_len" in outcome(finish_reason="length", token_ids=[5, 6]).error
    assert "'abort'" in outcome(finish_reason="abort").error
    stopped = outcome(stop_reason="x", finish_reason="stop", token_ids=[5, 6], text="a")
    assert stopped.usage.output == 2 and stopped.replies[0].complete
    model.llm.change = lambda made: SimpleNamespace(**vars(made) | {"num_cached_tokens": 0})
    (two,) = dict(Engine(model, Twice(), 1).run(jobs(1))).values()
    assert [str(e.kind) for e in two.events] == ["prefix_cache"]
    model.llm.change = lambda made: SimpleNamespace(**vars(made) | {"prompt_token_ids": made.prompt_token_ids[:-3]})
    with pytest.raises(RunError, match="its limits of pictures are others"):
        dict(Engine(model, Full(), 1).run(jobs(1)))


def test_a_prompt_that_vllm_refuses_is_its_documents_failure(vllm):
    model, asked = VllmModel("nano", 4), jobs(4)
    asked[2] = Job(Sample(asked[2].sample.images, "poison", "2"), 8)
    outcomes = dict(Engine(model, Full(), 4).run(asked))
    assert [i for i, o in sorted(outcomes.items()) if isinstance(o, Failure)] == [2]
    assert outcomes[2].error == "vLLM refused the request: The decoder prompt is too long"
    assert not outcomes[0].events


def test_what_engine_vllm_cannot_do_is_said(vllm, monkeypatch, tmp_path):
    from awares_bench.evaluation import lmms_model

    model, pruned = (getattr(lmms_model, name) for name in ("awares", "visionzip"))
    with pytest.raises(ValueError, match="leave engine=vllm out, or the pruner"):
        pruned(engine="vllm")
    with pytest.raises(ValueError, match="tensor_parallel_size is an option of engine=vllm"):
        model(tensor_parallel_size=2)
    with pytest.raises(ValueError, match="base_url is an option of engine=openai"):
        model(engine="vllm", base_url="http://localhost:8000/v1")
    with pytest.raises(ValueError, match="engine=vllm does not read attn_implementation"):
        model(engine="vllm", attn_implementation="eager")
    with pytest.raises(ValueError, match="vllm_options is 'x'; it must be a mapping"):
        model(engine="vllm", vllm_options="x")
    (tmp_path / "vllm.yaml").write_text("{max_model_len: 900}")
    made = model(
        engine="vllm",
        constrained=False,
        dtype="float32",
        max_batch_tokens=9000,
        vllm_options=str(tmp_path / "vllm.yaml"),
        tensor_parallel_size=2,
        output_dir=str(tmp_path / "run"),
    )
    assert made.vlm.llm.arguments["max_model_len"] == 900 and made.vlm.llm.arguments["tensor_parallel_size"] == 2
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert (identity["engine"], identity["dtype"], identity["vllm_options"]) == ("vllm", "float32", {"max_model_len": 900})
    assert identity["weights"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="engine=vllm runs in one process"):
        model(engine="vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RunError, match=r"pip install 'awares-bench\[vllm\]'"):
        VllmModel("nano")
    with pytest.raises(RunError, match=r"reads the inside of a model.*engine=vllm"):
        VllmModel.hidden_states(SimpleNamespace(engine="vllm"), [])


# ---------------------------------------------------------------------- vLLM itself

PYTHON = os.environ.get("AWARES_BENCH_VLLM") or sys.executable
CPU = {"enforce_eager": True, "skip_mm_profiling": True, "block_size": 32}
"""Starts sooner, and shares prompts as short as nano's."""
LONG = 96
"""Tokens of an answer that is compared with a stock checkpoint's."""

CALL = """
import json, sys
from tests.inference import test_vllm
if __name__ == "__main__":
    print("RESULT" + json.dumps(getattr(test_vllm, sys.argv[1])(sys.argv[2])))
"""


def compared(folder: str) -> dict:
    """Run where vLLM is: policy -> documents, and those whose outcome differs from our own loop's."""
    from awares_bench.baselines.random_crop import RandomCrop

    theirs, ours = (
        VllmModel(folder, 8, dtype="float32", options=CPU),
        LocalModel.load(resolve(folder), "float32", "cpu", constrained=False),
    )
    found = {}
    for policy in (Full(), AwaRes(), AllCrops(), RandomCrop(), Twice()):
        outcomes = [{i: shape(o) for i, o in Engine(m, policy, 8).run(jobs(24, 16))} for m in (theirs, ours)]
        found[type(policy).__name__] = [len(outcomes[0]), [i for i in outcomes[0] if outcomes[0][i] != outcomes[1][i]]]
    return found


def written_in_process(folder: str) -> list[list[int]]:
    """Run where vLLM is: the tokens of its answers to ``long_jobs``."""
    model = VllmModel(folder, 8, dtype="float32", options=CPU)
    return tokens_of(dict(Engine(model, Full(), 8).run(long_jobs())))


def long_jobs() -> list[Job]:
    return jobs(24, LONG)


def tokens_of(outcomes: dict) -> list[list[int]]:
    for outcome in outcomes.values():
        assert not isinstance(outcome, Failure), outcome
    return [list(outcomes[i].replies[0].tokens) for i in range(len(outcomes))]


def where_vllm_is(function: str, folder: str, environment: dict, tmp_path):
    """What a function of this module returns there."""
    script = tmp_path / "call.py"
    script.write_text(CALL)
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command, variables = [PYTHON, str(script), function, folder], environment | {"PYTHONPATH": root}
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[-1].splitlines()[0])  # vLLM says more after it


@pytest.fixture(scope="module")
def real_vllm():
    done = subprocess.run([PYTHON, "-c", "import vllm, awares_bench"], capture_output=True)
    if done.returncode:
        pytest.skip("no vLLM here; AWARES_BENCH_VLLM may name an interpreter that has it")


@pytest.fixture
def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [None, 1.05])
def test_vllm_in_process_says_and_counts_what_our_own_loop_does(real_vllm, environment, tmp_path, penalty):
    folder = "nano" if penalty is None else str(stock(penalty=penalty))
    found = where_vllm_is("compared", folder, environment, tmp_path)
    assert len(found) == 5 and all(n == 24 and not different for n, different in found.values()), found


def serve(port, folder, log, environment):
    command = [PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", resolve(folder), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--skip-mm-profiling", "--block-size", "32"]
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--limit-mm-per-prompt", '{"image": 8, "video": 0}']
    command += ["--mm-processor-kwargs", '{"size": {"shortest_edge": 3136, "longest_edge": 12845056}}']
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def kill(server):
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def engine_of(server) -> int:
    """The number of the process that a server runs its engine in."""
    listed = subprocess.run(["ps", "-s", str(server.pid), "-o", "pid=,args="], capture_output=True, text=True, check=True)
    return int(next(line.split()[0] for line in listed.stdout.splitlines() if "EngineCore" in line))


@contextmanager
def served(folder, environment, tmp_path, port=None):
    """A vLLM server of its own, killed afterwards -> its address and its process."""
    port = port or free_port()
    server = serve(port, folder, (tmp_path / "server.log").open("a"), environment)
    try:
        yield f"http://127.0.0.1:{port}/v1", server
    finally:
        kill(server)


def lead(folder: str, job: Job, tokens: list[int]) -> float | None:
    """How far, by transformers in float64, the score of the token that it writes is above that of the token of ``tokens`` where the two first
    differ; None where they do not."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    talk = chat_messages([Turn(job.sample.images, job.sample.question)], [])
    text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    shown = processor(text=[text], images=list(job.sample.images), return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": LONG, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(**shown, **settings)
    said = out.sequences[0, shown["input_ids"].shape[1] :].tolist()
    for scores, right, token in zip(out.scores, said, tokens, strict=False):  # of transformers, penalised
        if right != token:
            return float(scores[0, right] - scores[0, token])
    return None


@pytest.mark.slow
def test_a_stock_checkpoint_says_the_same_here_in_lmms_eval_and_in_vllm_served_or_not(real_vllm, environment, tmp_path):
    """An answer may differ only where transformers in float64 finds two tokens as good as equal."""
    from awares_bench.evaluation.lmms_run import stock_answers
    from awares_bench.inference.openai_server import Endpoint

    folder, asked = str(stock(penalty=1.05)), long_jobs()
    own = LocalModel.load(folder, "float32", "cpu")
    written = {"here": tokens_of(dict(Engine(own, Full(), 8).run(asked)))}
    own.repetition_penalty = 1.0
    without = tokens_of(dict(Engine(own, Full(), 8).run(asked)))
    assert sum(a != b for a, b in zip(without, written["here"], strict=True)) > 12  # the penalty matters
    assert len(set(map(tuple, written["here"]))) > 12
    theirs = stock_answers(folder, own, 1)([(j.sample.images[0], j.sample.question) for j in asked], LONG)
    assert [t.strip() for t in theirs] == [own.text(tokens).strip() for tokens in written["here"]]
    with served(folder, environment, tmp_path) as (address, _):
        model = Endpoint(address, "m", folder, 8)
        model.warm_up()
        written["served"] = tokens_of(dict(Engine(model, Full(), 8).run(asked)))
    written["in process"] = where_vllm_is("written_in_process", folder, environment, tmp_path)
    different = {
        (name, i): lead(folder, asked[i], tokens)
        for name in ("served", "in process")
        for i, tokens in enumerate(written[name])
        if tokens != written["here"][i]
    }
    print(f"{len(asked)} answers of up to {LONG} tokens; those that differ, by transformers' lead: {different}")
    assert all(abs(margin or 0) < 1e-3 for margin in different.values()), different


@pytest.mark.slow
def test_a_served_model_says_and_counts_what_our_own_loop_does_and_outlives_a_kill(real_vllm, environment, tmp_path):
    from awares_bench.inference.openai_server import Endpoint

    port, log = free_port(), (tmp_path / "server.log").open("w")
    server = serve(port, "nano", log, environment)
    try:
        model = Endpoint(f"http://127.0.0.1:{port}/v1", "m", "nano", 8, retries=1)
        model.warm_up()  # waits for it
        own = LocalModel.load(resolve("nano"), "float32", "cpu", constrained=False)
        for policy in (Full(), AwaRes(), AllCrops(), Twice()):
            theirs, ours = (dict(Engine(m, policy, 8).run(jobs(24, 16))) for m in (model, own))
            assert {i: shape(o) for i, o in theirs.items()} == {i: shape(o) for i, o in ours.items()}
        # killed with requests in flight, started again: the same outcomes in the same run
        theirs = {}
        for i, outcome in Engine(model, AwaRes(), 8).run(jobs(40, 16)):
            theirs[i] = outcome
            if len(theirs) == 8:
                kill(server)
                server = serve(port, "nano", log, environment)
        ours = dict(Engine(own, AwaRes(), 8).run(jobs(40, 16)))
        assert {i: shape(o)[:4] for i, o in theirs.items()} == {i: shape(o)[:4] for i, o in ours.items()}
    finally:
        kill(server)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["server", "engine"])
def test_a_run_whose_server_is_killed_resumes_to_the_records_of_an_uncut_run(real_vllm, environment, tmp_path, killed):
    """The whole server, or only the process of its engine, which the rest outlives for a moment."""
    from awares_bench.inference.openai_server import Endpoint

    def run(folder) -> str:
        tasks = ["--tasks", "nano_doc,nano_chart", "--include_path", FOLDER, "--limit", 60, "--batch_size", 4]
        options = f"engine=openai,base_url={address},model=m,wait_for_server=0,retries=1,output_dir={folder}"
        return lmms_eval_process(tmp_path, "--model", "awares", *tasks, "--model_args", options)

    def kept(folder) -> dict:
        """What is recorded of each document, without what its turns took."""
        lines = records(folder)
        assert len(lines) == len({(x["task"], x["doc_id"]) for x in lines}) and not any(x["error"] for x in lines)
        for line in lines:
            line["usage"] = [{k: v for k, v in turn.items() if not k.endswith("_seconds")} for turn in line["usage"]]
        return {(x["task"], x["doc_id"]): x for x in lines}

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    port = free_port()
    with served("nano", environment, tmp_path, port) as (address, server), ThreadPoolExecutor(1) as threads:
        Endpoint(address, "m", "nano").warm_up()  # waits for it
        said = threads.submit(run, cut)
        while len(records(cut)) < 12 and not said.done():
            time.sleep(0.02)
        at = len(records(cut))
        kill(server) if killed == "server" else os.kill(engine_of(server), signal.SIGKILL)
        assert "start it again and run the same command with the same output_dir" in said.result(), said.result()[-3000:]
    before = records(cut)
    assert 12 <= at <= len(before) < 120 and not any(x["error"] for x in before)
    with served("nano", environment, tmp_path, port):
        Endpoint(address, "m", "nano").warm_up()
        assert f"{len(before)} of 120 answers are taken from" in run(cut)
        run(whole)
    assert len(kept(whole)) == 120 and kept(cut) == kept(whole)
    assert records(cut)[: len(before)] == before
