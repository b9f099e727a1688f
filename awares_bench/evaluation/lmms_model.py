"""The lmms-eval adapter: turns its requests into samples, runs a method over them, returns answers with telemetry.

    lmms-eval --model awares --model_args pretrained=DIR,output_dir=runs/a --tasks chartqa,docvqa_val --batch_size 8
    lmms-eval --model visionzip --model_args pretrained=DIR,retention=0.5 --tasks chartqa
    lmms-eval --model awares_bench --model_args method=mine.py:Mine,pretrained=DIR --tasks chartqa

Every method is a model by its own name: the module makes the class when lmms-eval asks for it.

Telemetry goes to two places: ``token_counts`` of lmms-eval's samples file (``--log_samples``) and our ``records.jsonl``,
from which an interrupted run resumes.
"""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import reduce
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import get_datetime_str
from packaging.version import Version
from tqdm import tqdm

from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.generation import Settings, settings
from awares_bench.inference.image_features import FeatureStore
from awares_bench.inference.loading import auxiliary_checkpoints, load_vlm
from awares_bench.inference.loading import whole as _whole
from awares_bench.inference.local_model import MAX_PIXELS, MIN_PIXELS, VLM, check_text
from awares_bench.methods import registry
from awares_bench.methods.conversation import Failure, Sample
from awares_bench.methods.crop_grid import Box
from awares_bench.methods.images import whole_images
from awares_bench.methods.policy import Policy
from awares_bench.methods.pruner import Pruner
from awares_bench.models.packaged import NANO, resolve

from . import content, summary
from .lmms_manifest import COMPOSED
from .records import Record, RunFolder, fingerprint

if TYPE_CHECKING:
    from awares_bench.inference.openai_server import Endpoint

COMMON = {
    "pretrained": NANO,
    "dtype": "auto",
    "device": None,
    "attn_implementation": "sdpa",
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
    "constrained": True,
    "repetition_penalty": None,
    "batch_size": 1,
    "max_batch_tokens": None,
    "reuse_features": 0,
    "engine": "transformers",
    "base_url": None,
    "model": None,
    "output_dir": None,
    "label": None,
    "on_error": "stop",
    "seed": 0,
}
"""Options of every model beside its method's own, with their defaults."""

NOT_A_STOP = ("\n\n",)
"""lmms-eval stops every task that sets no stop string at a blank line, and its own Qwen2.5-VL leaves that out again (``models/simple/qwen2_5_vl.py``:
it cuts reasoning off). So do we."""


SKIPS = "0.7.3"
"""The first lmms-eval whose evaluator passes over a document that no request belongs to."""


@dataclass
class Telemetry(TokenCounts):
    """lmms-eval writes ``to_dict()`` of this into its samples file; the extra keys are ours (tests guard the contract)."""

    extra: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {**super().to_dict(), **self.extra}


class MethodModel(lmms):
    """A method as an lmms-eval chat model. A subclass names the method.

    vlms: models that are loaded already, by what they were loaded with; a sweep hands the same dictionary to each cell.
    """

    is_simple = False
    method: str

    def __init__(self, max_batch_size=None, vlms: dict | None = None, **given):
        super().__init__()
        given = {k: v for k, v in given.items() if v is not None}
        name = self.method
        if name == COMPOSED:  # the method itself is an option
            name = str(given.pop("method", None) or given.pop("policy", None) or given.pop("pruner", "full"))
        made = registry.build(name, {k: v for k, v in given.items() if k not in COMMON or k == "seed"}, tuple(COMMON))
        chosen = COMMON | {k: v for k, v in given.items() if k in COMMON}
        self.policy, self.pruner, self.label = made.policy, made.pruner, str(chosen["label"] or made.label)
        self.batch_size = _whole("batch_size", chosen["batch_size"])
        tokens = chosen["max_batch_tokens"]
        if chosen["on_error"] not in ("stop", "skip"):
            raise ValueError(f"on_error is {chosen['on_error']!r}; allowed: stop, skip")
        if chosen["on_error"] == "skip" and Version(version("lmms-eval")) < Version(SKIPS):
            raise ValueError(
                f"on_error=skip needs lmms-eval {SKIPS} or later, which passes over documents without requests; "
                f"this is {version('lmms-eval')}. Update it, or leave on_error out"
            )
        self.on_error = chosen["on_error"]
        self.left_out: dict[str, list[int]] = {}
        """Documents by task that on_error=skip left out of the scores."""
        self.max_batch_tokens = None if tokens is None else _whole("max_batch_tokens", tokens)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        seed = _whole("seed", chosen["seed"], least=0)
        random.seed(seed)
        torch.manual_seed(seed)
        auxiliary = auxiliary_checkpoints(self.policy)
        self._vlms = {} if vlms is None else vlms
        served = self._served(chosen)
        self._store = _whole("reuse_features", chosen["reuse_features"], least=0) * 2**30
        self.vlm, weights = served or self._load(chosen["pretrained"], chosen, chosen["repetition_penalty"])
        if self.vlm.repetition_penalty != self.vlm.own_penalty and not chosen["label"]:
            self.label += f" repetition_penalty={self.vlm.repetition_penalty:g}"
        loaded = {role: self._load(checkpoint, chosen) for role, checkpoint in auxiliary.items()}
        self.models = {role: vlm for role, (vlm, _) in loaded.items()}
        identity = {
            "method": name,
            "policy": made.parts[0],
            "pruner": made.parts[1],
            "fields": made.fields,
            "code": {name: _code(part) for name, part in zip(made.parts, (self.policy, self.pruner), strict=True) if part},
            "files": {k: content.file(v) for k, v in made.fields.items() if isinstance(v, str) and Path(v).is_file()},
            "pretrained": str(chosen["pretrained"]),
            "weights": weights,
            "auxiliary": {role: found for role, (_, found) in loaded.items()},
            "engine": chosen["engine"],
            "served": chosen["model"],
            "dtype": None if served else str(self.vlm.model.dtype).removeprefix("torch."),
            "attn_implementation": chosen["attn_implementation"],
            "min_pixels": self.vlm.limits["shortest_edge"],
            "max_pixels": self.vlm.limits["longest_edge"],
            "constrained": None if served else self.vlm.constrained,
            "repetition_penalty": self.vlm.repetition_penalty,
            "seed": seed,
        }
        out = chosen["output_dir"] or Path("awares-runs") / f"{Path(name).name.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        self.run = RunFolder(Path(str(out)), identity, self._rank, label=self.label)
        self._device = torch.device("cpu") if served else self.vlm.device

    def _served(self, chosen: dict) -> tuple[Endpoint, None] | None:
        """The endpoint that ``engine=openai`` asks for; its weights are the server's and have no fingerprint."""
        if chosen["engine"] not in ("transformers", "openai"):
            raise ValueError(f"engine is {chosen['engine']!r}; allowed: transformers, openai")
        given = [name for name in ("base_url", "model") if chosen[name]]
        if chosen["engine"] == "transformers":
            if given:
                raise ValueError(f"{given[0]} is an option of engine=openai; pass engine=openai, or leave it out")
            return None
        if len(given) < 2:
            raise ValueError(
                "engine=openai needs base_url and model, such as base_url=http://localhost:8000/v1,model=NAME, and pretrained "
                "for the processor that counts tokens"
            )
        if self.pruner is not None:
            raise ValueError(f"{type(self.pruner).__name__} cuts tokens inside the model; leave engine=openai out, or the pruner")
        from awares_bench.inference.openai_server import Endpoint

        limits = _whole("min_pixels", chosen["min_pixels"]), _whole("max_pixels", chosen["max_pixels"])
        served = (chosen["base_url"], str(chosen["model"]), str(chosen["pretrained"]), self.batch_size, *limits)
        return Endpoint(*served, repetition_penalty=chosen["repetition_penalty"]), None

    def _load(self, pretrained: object, chosen: dict, penalty: float | None = None) -> tuple[VLM, str | None]:
        """A checkpoint under the chosen limits, dtype and device -> the model, and a fingerprint of its folder.

        penalty: repetition penalty in place of the checkpoint's own.
        """
        device = str(chosen["device"] or "auto")
        if self._world_size > 1 and torch.cuda.is_available() and not device.startswith("cpu"):
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        vlm, folder = load_vlm(pretrained, chosen | {"device": device}, self._vlms, penalty)
        if self._store and vlm.features is None:
            vlm.features = FeatureStore(self._store)
        # a name of the hub: the commit that its files are of, where it is known
        return vlm, fingerprint(Path(folder)) if Path(folder).is_dir() else getattr(vlm.model.config, "_commit_hash", None)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def chat_template(self):
        raise ValueError(
            "--apply_chat_template renders text prompts; awares-bench models use their checkpoint's chat template anyway. Leave it out"
        )

    apply_chat_template = chat_template

    def loglikelihood(self, requests):
        raise NotImplementedError(
            "loglikelihood tasks need scores of given answers; awares-bench models generate. Use generate_until tasks"
        )

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("multi-round tasks are not supported; use generate_until tasks")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, those of earlier interrupted runs from the record.

        Raises RuntimeError at the end if any could not be answered, unless ``on_error=skip`` leaves it out of the scores.
        """
        self.left_out = {}
        everything, requests = requests, [r for r in requests if not _padding(r)]
        asked = self._asked(requests)
        keys = [(r.args[4], r.args[3], str(r.args[0])) for r in requests]  # (task, doc_id, prompt)
        unique = {key: r.args for key, r in zip(keys, requests, strict=True)}
        todo = {
            key: args
            for key, args in unique.items()
            if not self.run.holds(key, asked[key[0]].decisive, lambda args=args: self._content(args))
        }
        if self._rank == 0 and len(todo) < len(unique):
            print(
                f"{self.label}: {len(unique) - len(todo)} of {len(unique)} answers are taken from {self.run.folder}",
                file=sys.stderr,
            )
        other = sum(key in self.run.done for key in todo)
        if other:
            print(
                f"{self.label}: {other} answers in {self.run.folder} are to other pictures, texts or generation arguments, or were "
                "recorded without them by an earlier release; they are given again",
                file=sys.stderr,
            )
        order, failed = list(todo), {}
        more = {"pruner": self.pruner, "models": self.models, "max_batch_tokens": self.max_batch_tokens}
        engine = Engine(self.vlm, self.policy, self.batch_size, **more)
        local = [vlm for vlm in (self.vlm, *self.models.values()) if isinstance(vlm, VLM)]
        for vlm in local if todo else []:
            vlm.warm_up()
        with tqdm(total=len(order), desc=self.label, disable=self._rank != 0) as bar:
            for i, outcome in engine.run(self._job(todo[key]) for key in order):
                (task, doc_id, question), split = order[i], todo[order[i]][5]
                if isinstance(outcome, Failure):
                    failed[order[i]] = outcome.error
                    record = Record(task, doc_id, split, question, None, error=outcome.error, batch_size=self.batch_size)
                else:
                    record = Record.of(outcome, task, doc_id, split, question, self.batch_size)
                self.run.add(replace(record, content=self._content(todo[order[i]]), generation=asked[task].decisive))
                bar.update()
        counts = [len(failed)]
        if torch.distributed.is_initialized():  # the run is whole when every rank is done, and fails on all when one fails
            counts *= self._world_size
            torch.distributed.all_gather_object(counts, len(failed))
        if any(counts) and self.on_error == "skip":
            self._skip([(r, failed[key]) for key, r in zip(keys, requests, strict=True) if key in failed], requests)
            failed = {}
        elif any(counts) and not failed:
            raise RuntimeError(f"{sum(counts)} documents of other processes could not be answered; see their messages")
        if failed:
            some = "; ".join(f"{task} document {doc_id}: {error}" for (task, doc_id, _), error in list(failed.items())[:3])
            raise RuntimeError(
                f"{len(failed)} of {len(keys)} documents could not be answered: {some}. The other answers are kept in {self.run.folder}; "
                "repair or exclude these documents and run the same command with the same output_dir, or add on_error=skip to "
                "leave them out of the scores"
            )
        if self._rank == 0:
            mode = "latency" if self.batch_size == 1 else "throughput"  # what the seconds of the records are
            more = {"left_out": self.left_out} if self.left_out else {}
            self.run.finish(mode=mode, peak_memory_bytes=max((vlm.peak_memory() for vlm in local), default=None), **more)
            mine = None if self._world_size > 1 else set(keys)  # the documents of other processes are known by their records
            print(f"{self.label}:\n{summary.of_run(self.run.folder, asked, mine)}", file=sys.stderr)
        results = iter([_result(self.run.done[key]) if key in self.run.done else GenerationResult(text="") for key in keys])
        return [GenerationResult(text="") if _padding(r) else next(results) for r in everything]

    def _skip(self, failed: list[tuple[Instance, str]], requests: list[Instance]) -> None:
        """Take the failed requests of this process out of what lmms-eval scores, and say so.

        The evaluator groups its task's requests by ``doc_id`` and passes over documents that have none. A request that is
        none of its task's own (an agentic round) would be scored whatever is returned, so it raises RuntimeError; so does
        a task of which nothing is left.
        """
        told = {
            "lost": [(r.args[4], r.args[3], error) for r, error in failed],
            "held": [(r.args[4], r.args[3]) for r in requests],
            "foreign": [(r.args[4], r.args[3]) for r, _ in failed if not (r.metadata.get("__padding_only__") or _is_own(r))],
        }
        every = [told]
        if torch.distributed.is_initialized():
            every *= self._world_size
            torch.distributed.all_gather_object(every, told)
        lost = {(task, doc_id): error for one in every for task, doc_id, error in one["lost"]}
        left = {place for one in every for place in one["held"]} - set(lost)
        empty = sorted({task for task, _ in lost} - {task for task, _ in left})
        foreign = sorted(place for one in every for place in one["foreign"])
        kept = f"The other answers are kept in {self.run.folder}"
        if foreign:
            task, doc_id = foreign[0]
            raise RuntimeError(
                f"{task} document {doc_id} could not be answered and is a request that on_error=skip cannot leave out, such as one "
                f"round of several: {lost[foreign[0]]}. {kept}"
            )
        if empty:
            doc_id, error = min((doc_id, error) for (task, doc_id), error in lost.items() if task == empty[0])
            raise RuntimeError(
                f"no document of {empty[0]} could be answered, so on_error=skip leaves nothing to score; document {doc_id}: {error}. {kept}"
            )
        for request, _ in failed:
            request.doc_id = None
        for task, doc_id in sorted(lost):
            self.left_out.setdefault(task, []).append(doc_id)
        for task, documents in self.left_out.items() if self._rank == 0 else ():
            print(
                f"{self.label}: {len(documents)} of {len(documents) + sum(t == task for t, _ in left)} documents of {task} are left out of "
                f"the scores ({', '.join(map(str, documents[:10]))}{', …' if len(documents) > 10 else ''}; the first: "
                f"{lost[task, documents[0]]}). lmms-eval's numbers of {task} are over the others, whatever its n-samples says. "
                "The same command tries them again",
                file=sys.stderr,
            )

    def _asked(self, requests: list[Instance]) -> dict[str, Settings]:
        """Task -> what its generation arguments ask for; the run folder is told what each task is, the user what is not acted on.

        Raises ValueError with the task's name for an argument that cannot be acted on, or when the folder holds another task.
        """
        first = {r.args[4]: r for r in requests}
        asked, said = {}, []
        for task, request in first.items():
            prompt, to_messages, gen_kwargs, doc_id, _, _ = request.args
            try:
                asked[task] = settings(dict(gen_kwargs))
            except ValueError as error:
                raise ValueError(f"task {task}: {error}") from error
            said += [(task, sentence) for sentence in asked[task].said]
            lost = content.unshown(to_messages, str(prompt), doc_id)
            said += [(task, lost)] if lost else []
            if (request.repeats or 1) > 1:
                said.append((task, f"repeats={request.repeats}: decoding is greedy, so all of them get the same answer"))
        self.run.expect({task: content.task_facts(r.args[1], r.args[5]) for task, r in first.items()})
        for sentence in dict.fromkeys(s for _, s in said) if self._rank == 0 else ():
            tasks = sorted(task for task, s in said if s == sentence)
            print(f"{self.label}: {sentence} ({', '.join(tasks)})", file=sys.stderr)
        return asked

    def _content(self, args: tuple) -> str:
        """A chat request's arguments -> a digest of the document."""
        _, to_messages, _, doc_id, task, split = args
        return content.digest(self.task_dict[task][split], doc_id, to_messages)

    def _job(self, args: tuple) -> Job | Failure:
        """A chat request's arguments -> a job; a document that its own task cannot turn into messages is a failure."""
        _, to_messages, gen_kwargs, doc_id, task, split = args
        try:
            with whole_images():
                document = self.task_dict[task][split][doc_id]
                messages = to_messages(document)
            job = _job(messages, dict(gen_kwargs), f"{task}/{doc_id}")
            marked = {"evidence": _evidence(document.get("evidence")), "low_is_enough": document.get("low_is_enough")}
            return replace(job, sample=replace(job.sample, **marked))
        except Exception as error:  # foreign code and data: recorded here, raised again at the end of the run
            return Failure(f"{type(error).__name__}: {error}")


def __getattr__(name: str) -> type[MethodModel]:
    """The model of a method, made when it is asked for: lmms-eval imports ``awares_bench.evaluation.lmms_model.NAME``."""
    if name != COMPOSED and name not in registry.names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (MethodModel,), {"method": name, "__doc__": f"``--model {name}``", "__module__": __name__})


REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""What lmms-eval's command strips from answers before scoring, unless told otherwise."""


def task_index(include_path: str | None = None) -> TaskManager:
    """lmms-eval's tasks and this package's, and those of a folder, whose own win over others of the same name (lmms-eval takes the first).

    A task is loaded anew, its module's globals too, each time.
    """
    folders = [*([include_path] if include_path else []), str(files("awares_bench.tasks") / ".")]
    return TaskManager("WARNING", include_path=folders)


def evaluate(model: MethodModel, tasks: tuple[str, ...], limit: int | None, index: TaskManager, output: Path) -> None:
    """One model on tasks through lmms-eval's evaluator, with what its command does: results and samples files below ``output``.

    Raises ValueError for a task that ``index`` does not have.
    """
    unknown = [task for task in tasks if not index.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"unknown task {unknown[0]!r}; lmms-eval tasks list shows its own, awares-bench tasks the folder of ours"
        )
    output.mkdir(parents=True, exist_ok=True)
    told = f"pretrained={model.run.identity['pretrained']},label={model.label}"
    command = Namespace(
        output_path=str(output), process_with_media=False, reasoning_tags=REASONING_TAGS, log_samples=True, limit=limit
    )
    now = get_datetime_str()
    results = simple_evaluate(
        model=model,
        model_args=told,
        tasks=index.match_tasks(list(tasks)),
        limit=limit,
        batch_size=model.batch_size,
        log_samples=True,
        task_manager=index,
        bootstrap_iters=0,  # reports draw their own intervals
        cli_args=command,
        datetime_str=now,
        verbosity="WARNING",
    )
    if results is None:  # only the first process gets them
        return
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.log_experiment_args(model.method, told, None, None, False)
    for task, left_out in model.left_out.items():
        results["n-samples"][task]["effective"] -= len(left_out)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=now)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    if not list(output.rglob(f"{now}_results.json")):  # the tracker only logs when it cannot write
        raise OSError(f"lmms-eval could not save its results to {output}")


def _job(messages: list[dict], gen_kwargs: dict, key: str) -> Job:
    """A task's chat messages and generation arguments -> what the engine runs."""
    chat = ChatMessages(messages=[_readable(m) for m in messages])
    images, videos, audios = chat.extract_media()
    if videos or audios:
        raise ValueError("the document holds video or audio; awares-bench methods read images and text")
    if [m.role for m in chat.messages] != ["user"]:
        raise ValueError(
            f"the document is a conversation of {[m.role for m in chat.messages]}; one user message is supported (no few-shot)"
        )
    parts = [""]
    for piece in chat.messages[0].content:  # in the order the task gives: an image may stand between words
        if piece.type == "image":
            parts.append("")
        else:
            parts[-1] += piece.text
    text = reduce(_joined, parts)
    asked = settings(gen_kwargs)
    until = gen_kwargs.get("until") or ()
    until = tuple(s for s in ((until,) if isinstance(until, str) else until) if s and s not in NOT_A_STOP)
    sample = Sample(tuple(images), text, key, parts=tuple(parts) if any(parts[:-1]) else ())
    return Job(sample, asked.max_new_tokens, until, asked.repetition_penalty)


def _joined(before: str, after: str) -> str:
    """Texts on both sides of an image as one, at least a space between words."""
    return f"{before}{' ' if before[-1:].strip() and after[:1].strip() else ''}{after}"


def _readable(message: dict) -> dict:
    """A message as it is, but a stored picture that lmms-eval takes for a video, as it does any dictionary, is a picture.

    Raises ValueError for a text that no tokenizer reads.
    """
    if not (isinstance(message, dict) and isinstance(message.get("content"), list)):
        return message  # lmms-eval says what is wrong with it
    parts = []
    for part in message["content"]:
        kind, stored = (part.get("type"), part.get("url")) if isinstance(part, dict) else (None, None)
        if kind == "text" and isinstance(part.get("text"), str):
            check_text(part["text"], ())
        if kind == "video" and isinstance(stored, dict) and set(stored) <= {"bytes", "path"}:
            part = part | {"type": "image"}
        parts.append(part)
    return message | {"content": parts}


def _is_own(request: Instance) -> bool:
    """Whether the request is one of those that its task's scores are made of."""
    task = getattr(request.args[1], "__self__", None)
    return any(own is request for own in getattr(task, "instances", None) or ())


def _padding(request: Instance) -> bool:
    """Whether lmms-eval added the request only so that all processes have the same number; its answer is thrown away."""
    return bool((request.metadata or {}).get("__padding_only__"))


def _code(part: Policy | Pruner) -> str:
    """A digest of the files that a method is written in, those it derives from too."""
    own = [cls for cls in type(part).__mro__ if issubclass(cls, (Policy, Pruner)) and cls not in (Policy, Pruner)]
    return "+".join(filter(None, map(content.source, own)))


def _evidence(column: object) -> tuple[Box, ...] | None:
    """A document's ``evidence`` column -> boxes; None when it is missing or is not a list of four numbers each."""
    if not isinstance(column, (list, tuple)) or not all(isinstance(box, (list, tuple)) and len(box) == 4 for box in column):
        return None
    return tuple(tuple(int(v) for v in box) for box in column)


def _result(record: Record) -> GenerationResult:
    spent = record.usage
    extra = {
        "rtr": record.rtr,
        "full_tokens": record.full_tokens,
        "visual_tokens": sum(u["prefill"] for u in spent),
        "encoded_tokens": sum(u["encoded"] for u in spent),
        "aux_encoded_tokens": sum(u.get("aux_encoded", 0) for u in spent),
        "aux_decoder_tokens": sum(u.get("aux_decoder", 0) for u in spent),
        "crops": record.crops,
        "turns": len(spent),
        "replies": record.replies,
        "usage": spent,
        "events": record.events,
    }
    counts = Telemetry(
        input_tokens=int(sum(u["text"] + u["prefill"] for u in spent)),
        output_tokens=sum(u["output"] for u in spent),
        reasoning_tokens=None,
        extra=extra,
    )
    return GenerationResult(text=record.answer, token_counts=counts)


def stock_answers(pretrained: str, vlm: VLM, batch_size: int):
    """lmms-eval's own ``qwen2_5_vl`` on the same weights, limits and dtype -> (pictures and questions, tokens) -> answers.

    For comparison (``awares-bench bench engine``). Raises ImportError when a package it needs is not installed.
    """
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL, _has_qwen_vl

    if not _has_qwen_vl:
        raise ImportError("No module named 'qwen_vl_utils'")
    limits = {"min_pixels": vlm.limits["shortest_edge"], "max_pixels": vlm.limits["longest_edge"]}
    device = {"device": str(vlm.device), "device_map": str(vlm.device)}
    model = Qwen2_5_VL(resolve(pretrained), batch_size=batch_size, attn_implementation="sdpa", **device, **limits)
    model._model = model._model.to(vlm.model.dtype)

    def answers(documents: list[tuple], max_new_tokens: int) -> list[str]:
        model.task_dict = {"bench": {"test": documents}}
        requests = []
        for i in range(len(documents)):
            arguments = ("", _as_messages, {"max_new_tokens": max_new_tokens}, i, "bench", "test")
            requests.append(Instance("generate_until", arguments, 0, {"task": "bench", "doc_id": i, "repeats": 1}))
        return [r.text for r in model.generate_until(requests)]

    return answers


def _as_messages(document: tuple) -> list[dict]:
    image, question = document
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]}]
