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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from packaging.version import Version

from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.generation import Settings, settings
from awares_bench.inference.image_features import FeatureStore
from awares_bench.inference.loading import auxiliary_checkpoints, load_vlm
from awares_bench.inference.local_model import LocalModel
from awares_bench.methods import registry
from awares_bench.methods.conversation import Failure, Sample
from awares_bench.methods.crop_grid import Box
from awares_bench.methods.images import whole_images
from awares_bench.methods.policy import Policy
from awares_bench.methods.pruner import Pruner
from awares_bench.models.base import check_text
from awares_bench.openmp import SLOW_BESIDE_OTHERS, set_short_spin

from . import content, run_options, summary
from .lmms_manifest import COMPOSED
from .progress import Progress
from .provenance import fingerprint
from .records import Record, RunFolder
from .run_options import RunOptions

if TYPE_CHECKING:
    from awares_bench.inference.external_model import ExternalModel

NOT_A_STOP = ("\n\n",)
"""lmms-eval stops every task that sets no stop string at a blank line, and its own Qwen2.5-VL leaves that out again (``models/simple/qwen2_5_vl.py``:
it cuts reasoning off). So do we."""

SKIPS = "0.7.3"
"""The first lmms-eval whose evaluator passes over a document that no request belongs to."""

Key = tuple[str, int, str]
"""(task, doc_id, prompt) of a request; requests of one key get one answer."""


class ChatArguments(NamedTuple):
    """``Instance.args`` of a chat request, in lmms-eval's order."""

    prompt: str
    to_messages: Callable
    """Document -> chat messages; a method of the task."""
    gen_kwargs: dict
    doc_id: int
    task: str
    split: str

    @property
    def key(self) -> Key:
        return self.task, self.doc_id, str(self.prompt)


@dataclass
class Telemetry(TokenCounts):
    """lmms-eval writes ``to_dict()`` of this into its samples file; the extra keys are ours (tests guard the contract)."""

    extra: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {**super().to_dict(), **self.extra}


class MethodModel(lmms):
    """A method as an lmms-eval chat model. A subclass names the method.

    vlms: models that are loaded already, by what they were loaded with; a sweep hands the same dictionary to each cell.
    arguments: options of the run (``RunOptions``) and of the method. Raises ValueError for one that cannot be.
    """

    is_simple = False
    method: str

    def __init__(self, max_batch_size=None, vlms: dict | None = None, **arguments):
        super().__init__()
        # 1) the options, all of them checked before anything is loaded
        arguments = {k: v for k, v in arguments.items() if v is not None}
        name = self.method
        if name == COMPOSED:  # the method itself is an option
            name = str(arguments.pop("method", None) or arguments.pop("policy", None) or arguments.pop("pruner", "full"))
        of_method = {k: v for k, v in arguments.items() if k not in run_options.NAMES or k == "seed"}
        method = registry.build(name, of_method, run_options.NAMES)
        options = RunOptions.parse(arguments)
        if options.on_error == "skip" and Version(version("lmms-eval")) < Version(SKIPS):
            raise ValueError(
                f"on_error=skip needs lmms-eval {SKIPS} or later, which passes over documents without requests; "
                f"this is {version('lmms-eval')}. Update it, or leave on_error out"
            )
        self.options, self.policy, self.pruner = options, method.policy, method.pruner
        self.batch_size = options.batch_size  # lmms-eval reads it
        self.label = options.label or method.label
        self.left_out: dict[str, list[int]] = {}
        """Documents by task that on_error=skip left out of the scores."""
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        random.seed(options.seed)
        torch.manual_seed(options.seed)

        # 2) the model under test, or the server that stands for it, and the method's own models
        self._vlms = {} if vlms is None else vlms
        auxiliary = auxiliary_checkpoints(self.policy)
        if not auxiliary and (names := run_options.unread(options, arguments)):
            raise ValueError(
                f"engine={options.engine} does not read {names[0]}, because the model is not loaded by awares-bench; leave it out, or set "
                "it where the model is loaded"
            )
        served = self._served()
        self.vlm: Any  # a LocalModel, or an ExternalModel
        self.vlm, weights = (served, None) if served else self._load(options.pretrained, options.repetition_penalty)
        if served and options.engine == "vllm" and Path(served.folder).is_dir():  # those of a server are not here
            weights = fingerprint(Path(served.folder))
        if self.vlm.engine == "generic" and (options.engine != "generic" or not options.label):
            self.label += " engine=generic"  # where nobody asked for it, in the user's own label too
        if self.vlm.repetition_penalty != self.vlm.own_penalty and not options.label:
            self.label += f" repetition_penalty={self.vlm.repetition_penalty:g}"
        loaded = {role: self._load(checkpoint) for role, checkpoint in auxiliary.items()}
        self.models = {role: vlm for role, (vlm, _) in loaded.items()}
        self._device = torch.device("cpu") if served else self.vlm.device
        if not set_short_spin() and any(vlm.device.type == "cpu" for vlm in self._local_models()) and os.getloadavg()[0] >= 1:
            print(f"{self.label}: {SLOW_BESIDE_OTHERS}", file=sys.stderr)

        # 3) the run folder, which refuses answers of another run
        limited = served or self.vlm.host
        identity = {
            "method": name,
            "policy": method.parts[0],
            "pruner": method.parts[1],
            "fields": method.fields,
            "code": {name: _code(part) for name, part in method.members.items()},
            "files": {k: content.file(v) for k, v in method.fields.items() if isinstance(v, str) and Path(v).is_file()}
            | (self.pruner.fingerprints if self.pruner else {}),
            "pretrained": options.pretrained,
            "weights": weights,
            "auxiliary": {role: digest for role, (_, digest) in loaded.items()},
            "engine": self.vlm.engine,
            "served": options.model,
            "dtype": served.dtype if served else str(self.vlm.host.model.dtype).removeprefix("torch."),
            "attn_implementation": None if served else options.attn_implementation,
            "limits": limited.limits_name,
            "min_pixels": limited.limits["shortest_edge"],
            "max_pixels": limited.limits["longest_edge"],
            "constrained": None if served else self.vlm.constrained,
            "repetition_penalty": self.vlm.repetition_penalty,
            "seed": options.seed,
        }
        if options.engine == "vllm":
            identity["vllm_options"] = options.vllm_options  # a quantised model answers otherwise
        new = Path("awares-runs") / f"{Path(name).name.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        self.run = RunFolder(Path(options.output_dir or new), identity, self._rank, label=self.label)

    def _served(self) -> ExternalModel | None:
        """What ``engine=openai`` or ``engine=vllm`` asks for; None where the model is to be loaded here."""
        options = self.options
        for engine in run_options.ENGINES:
            names = [name for name in run_options.only_for(engine) if getattr(options, name) is not None]
            if names and options.engine != engine:
                raise ValueError(f"{names[0]} is an option of engine={engine}; pass engine={engine}, or leave it out")
        if options.engine not in ("openai", "vllm"):
            return None
        if self.pruner is not None:
            raise ValueError(
                f"{type(self.pruner).__name__} cuts tokens inside the model; leave engine={options.engine} out, or the pruner"
            )
        given = {name: value for name in run_options.only_for(options.engine) if (value := getattr(options, name)) is not None}
        shared: dict[str, Any] = {
            "min_pixels": options.min_pixels,
            "max_pixels": options.max_pixels,
            "repetition_penalty": options.repetition_penalty,
            "limits": options.limits,
        }
        if options.engine == "openai":
            if not (options.base_url and options.model):
                raise ValueError(
                    "engine=openai needs base_url and model, such as base_url=http://localhost:8000/v1,model=NAME, and pretrained "
                    "for the processor that counts tokens"
                )
            from awares_bench.inference.openai_server import Endpoint

            return Endpoint(pretrained=options.pretrained, concurrency=options.batch_size, **shared, **given)
        if self._world_size > 1:
            raise ValueError(
                "engine=vllm runs in one process; for more GPUs pass tensor_parallel_size=N, or serve with --data-parallel-size N "
                "and pass engine=openai,replicas=N"
            )
        from awares_bench.inference.vllm_model import VllmModel

        more = given.pop("vllm_options", {}) | given
        key = ("vllm", options.pretrained, options.batch_size, options.dtype, str(sorted(more.items())), *shared.values())
        if key not in self._vlms:  # a sweep loads it once
            vllm = VllmModel(options.pretrained, options.batch_size, dtype=options.dtype, options=more, **shared)
            self._vlms[key] = vllm
        return self._vlms[key]

    def _load(self, pretrained: str, penalty: float | None = None) -> tuple[LocalModel, str | None]:
        """A checkpoint under the options of the run -> the model, and a fingerprint of its folder.

        penalty: repetition penalty in place of the checkpoint's own.
        """
        device = self.options.device or "auto"
        if self._world_size > 1 and torch.cuda.is_available() and not device.startswith("cpu"):
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        vlm, folder = load_vlm(pretrained, asdict(replace(self.options, device=device)), self._vlms, penalty)
        if self.options.reuse_features and vlm.engine == "generic":
            raise ValueError(
                "reuse_features keeps features outside of the model, which engine=generic does not see; leave it out"
            )
        if self.options.reuse_features and vlm.features is None:
            vlm.features = FeatureStore(self.options.reuse_features * 2**30)
        # a name of the hub: the commit that its files are of, where it is known
        return vlm, fingerprint(Path(folder)) if Path(folder).is_dir() else getattr(vlm.host.model.config, "_commit_hash", None)

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
        own = [r for r in requests if not _is_padding(r)]
        generation = self._settings(own)
        # several requests for one document (repeats, doubles) get one answer
        keys = [ChatArguments(*r.args).key for r in own]
        documents = {arguments.key: arguments for arguments in (ChatArguments(*r.args) for r in own)}
        todo = self._unanswered(documents, generation)
        failed = self._answer(todo, generation)

        # the run is whole when every process is done, and fails on all when one fails
        counts = self._gathered(len(failed))
        if any(counts) and self.options.on_error == "skip":
            self._skip([(r, failed[key]) for key, r in zip(keys, own, strict=True) if key in failed], own)
        elif failed:
            examples = "; ".join(f"{task} document {doc_id}: {error}" for (task, doc_id, _), error in list(failed.items())[:3])
            raise RuntimeError(
                f"{len(failed)} of {len(keys)} documents could not be answered: {examples}. The other answers are kept in {self.run.folder}; "
                "repair or exclude these documents and run the same command with the same output_dir, or add on_error=skip to "
                "leave them out of the scores"
            )
        elif any(counts):
            raise RuntimeError(f"{sum(counts)} documents of other processes could not be answered; see their messages")
        if self._rank == 0:
            self._finish(generation, set(keys))
        results = iter([_result(self.run.done[key]) if key in self.run.done else GenerationResult(text="") for key in keys])
        return [GenerationResult(text="") if _is_padding(r) else next(results) for r in requests]

    def _unanswered(self, documents: dict[Key, ChatArguments], generation: dict[str, Settings]) -> dict[Key, ChatArguments]:
        """Those whose answer the run folder does not hold; the user is told how many it holds, and which of them do not fit."""
        todo = {
            key: arguments
            for key, arguments in documents.items()
            if not self.run.holds(key, generation[arguments.task].decisive, partial(self._content, arguments))
            or (self.options.keep_masks and self.run.done[key].keep_masks is None)
        }
        if self._rank == 0 and len(todo) < len(documents):
            print(
                f"{self.label}: {len(documents) - len(todo)} of {len(documents)} answers are taken from {self.run.folder}",
                file=sys.stderr,
            )
        if other := sum(key in self.run.done for key in todo):
            print(
                f"{self.label}: {other} answers in {self.run.folder} are to other pictures, texts or generation arguments, or were "
                "recorded without them by an earlier release, or without the masks that keep_masks asks for; they are given again",
                file=sys.stderr,
            )
        return todo

    def _answer(self, todo: dict[Key, ChatArguments], generation: dict[str, Settings]) -> dict[Key, str]:
        """Run the method over the documents and record each outcome as it comes -> the errors of those that have no answer."""
        failed: dict[Key, str] = {}
        engine = Engine(
            self.vlm,
            self.policy,
            self.batch_size,
            pruner=self.pruner,
            models=self.models,
            max_batch_tokens=self.options.max_batch_tokens,
            keep_masks=self.options.keep_masks,
        )
        for vlm in (self.vlm, *self.models.values()) if todo else ():
            vlm.warm_up()
        order = list(todo.values())
        with Progress(len(order), self.label, shown=self._rank == 0) as bar:
            for i, outcome in engine.run(self._job(arguments) for arguments in order):
                arguments = order[i]
                place = arguments.task, arguments.doc_id, arguments.split, str(arguments.prompt)
                if isinstance(outcome, Failure):
                    failed[arguments.key] = outcome.error
                    record = Record(*place, None, error=outcome.error, batch_size=self.batch_size)
                else:
                    record = Record.of(outcome, *place, self.batch_size, self.options.keep_masks)
                decisive = generation[arguments.task].decisive
                self.run.add(replace(record, content=self._content(arguments), generation=decisive))
                bar.answered(outcome)
        return failed

    def _finish(self, generation: dict[str, Settings], keys: set[Key]) -> None:
        """Mark the run whole and print its table."""
        mode = "latency" if self.batch_size == 1 else "throughput"  # what the seconds of the records are
        left_out = {"left_out": self.left_out} if self.left_out else {}
        peak = max((vlm.peak_memory() for vlm in self._local_models()), default=None)
        self.run.finish(mode=mode, peak_memory_bytes=peak, **left_out)
        # the documents of other processes are known by their records
        table = summary.of_run(self.run.folder, generation, None if self._world_size > 1 else keys)
        print(f"{self.label}:\n{table}", file=sys.stderr)

    def _local_models(self) -> list[LocalModel]:
        return [vlm for vlm in (self.vlm, *self.models.values()) if isinstance(vlm, LocalModel)]

    def _gathered(self, value: object) -> list:
        """A value of every process."""
        values = [value]
        if torch.distributed.is_initialized():
            values *= self._world_size
            torch.distributed.all_gather_object(values, value)
        return values

    def _skip(self, failed: list[tuple[Instance, str]], requests: list[Instance]) -> None:
        """Take the failed requests of this process out of what lmms-eval scores, and say so.

        The evaluator groups its task's requests by ``doc_id`` and passes over documents that have none. A request that is
        none of its task's own (an agentic round) would be scored whatever is returned, so it raises RuntimeError; so does
        a task of which nothing is left.
        """
        # 1) what all processes asked, lost, and cannot leave out
        foreign = [r for r, _ in failed if not (r.metadata.get("__padding_only__") or _is_own(r))]
        reports = self._gathered(
            {
                "asked": [_place(r) for r in requests],
                "lost": [(*_place(r), error) for r, error in failed],
                "foreign": [_place(r) for r in foreign],
            }
        )
        lost = {(task, doc_id): error for report in reports for task, doc_id, error in report["lost"]}
        left = {place for report in reports for place in report["asked"]} - set(lost)
        empty = sorted({task for task, _ in lost} - {task for task, _ in left})
        foreign = sorted(place for report in reports for place in report["foreign"])

        # 2) refuse what would be scored all the same
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

        # 3) leave the others out
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

    def _settings(self, requests: list[Instance]) -> dict[str, Settings]:
        """Task -> what its generation arguments ask for; the run folder is told what each task is, the user what is not acted on.

        Raises ValueError with the task's name for an argument that cannot be acted on, or when the folder holds another task.
        """
        first = {arguments.task: (r, arguments) for r in requests for arguments in [ChatArguments(*r.args)]}
        generation: dict[str, Settings] = {}
        notes: list[tuple[str, str]] = []
        for task, (request, arguments) in first.items():
            try:
                generation[task] = settings(dict(arguments.gen_kwargs))
            except ValueError as error:
                raise ValueError(f"task {task}: {error}") from error
            notes += [(task, sentence) for sentence in generation[task].said]
            lost = content.unshown(arguments.to_messages, str(arguments.prompt), arguments.doc_id)
            notes += [(task, lost)] if lost else []
            if (request.repeats or 1) > 1:
                notes.append((task, f"repeats={request.repeats}: decoding is greedy, so all of them get the same answer"))
        self.run.expect(
            {task: content.task_facts(arguments.to_messages, arguments.split) for task, (_, arguments) in first.items()}
        )
        for sentence in dict.fromkeys(s for _, s in notes) if self._rank == 0 else ():
            tasks = sorted(task for task, s in notes if s == sentence)
            print(f"{self.label}: {sentence} ({', '.join(tasks)})", file=sys.stderr)
        return generation

    def _content(self, arguments: ChatArguments) -> str:
        """A digest of a request's document."""
        return content.digest(self.task_dict[arguments.task][arguments.split], arguments.doc_id, arguments.to_messages)

    def _job(self, arguments: ChatArguments) -> Job | Failure:
        """A request -> a job; a document that its own task cannot turn into messages is a failure."""
        try:
            with whole_images():
                document = self.task_dict[arguments.task][arguments.split][arguments.doc_id]
                messages = arguments.to_messages(document)
            job = job_of(messages, dict(arguments.gen_kwargs), f"{arguments.task}/{arguments.doc_id}")
            marks = {
                "evidence": _evidence(document.get("evidence")),
                "low_is_enough": document.get("low_is_enough"),
                "other_pictures": partial(self._other_pictures, arguments),
            }
            return replace(job, sample=replace(job.sample, **marks))
        except Exception as error:  # foreign code and data: recorded here, raised again at the end of the run
            return Failure(f"{type(error).__name__}: {error}")

    def _other_pictures(self, arguments: ChatArguments) -> Iterator[tuple]:
        """The images of the task's other documents, from the one half the split away: neighbours often share a picture."""
        documents = self.task_dict[arguments.task][arguments.split]
        for step in range(len(documents)):
            index = (arguments.doc_id + max(1, len(documents) // 2) + step) % len(documents)
            if index != arguments.doc_id:
                with whole_images():
                    messages = arguments.to_messages(documents[index])
                yield job_of(messages, dict(arguments.gen_kwargs), f"{arguments.task}/{index}").sample.images


def __getattr__(name: str) -> type[MethodModel]:
    """The model of a method, made when it is asked for: lmms-eval imports ``awares_bench.evaluation.lmms_model.NAME``."""
    if name != COMPOSED and name not in registry.names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (MethodModel,), {"method": name, "__doc__": f"``--model {name}``", "__module__": __name__})


def job_of(messages: list[dict], gen_kwargs: dict, key: str) -> Job:
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
    limits = settings(gen_kwargs)
    until = gen_kwargs.get("until") or ()
    until = tuple(s for s in ((until,) if isinstance(until, str) else until) if s and s not in NOT_A_STOP)
    sample = Sample(tuple(images), text, key, parts=tuple(parts) if any(parts[:-1]) else ())
    return Job(sample, limits.max_new_tokens, until, limits.repetition_penalty)


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


def _place(request: Instance) -> tuple[str, int]:
    """(task, doc_id) of a request."""
    arguments = ChatArguments(*request.args)
    return arguments.task, arguments.doc_id


def _is_padding(request: Instance) -> bool:
    """Whether lmms-eval added the request only so that all processes have the same number; its answer is thrown away."""
    return bool((request.metadata or {}).get("__padding_only__"))


def _code(part: Policy | Pruner) -> str:
    """A digest of the files that a method is written in, those it derives from and what it shares with others too."""
    own: list[Any] = [cls for cls in type(part).__mro__ if issubclass(cls, (Policy, Pruner)) and cls not in (Policy, Pruner)]
    shared = {
        f.__module__: f
        for cls in own
        for f in vars(sys.modules[cls.__module__]).values()
        if ".baselines._" in (getattr(f, "__module__", "") or "")
    }
    return "+".join(filter(None, map(content.source, [*own, *shared.values()])))


def _evidence(column: object) -> tuple[Box, ...] | None:
    """A document's ``evidence`` column -> boxes; None when it is missing or is not a list of four numbers each."""
    if not isinstance(column, (list, tuple)) or not all(isinstance(box, (list, tuple)) and len(box) == 4 for box in column):
        return None
    return tuple((int(left), int(top), int(right), int(bottom)) for left, top, right, bottom in column)


def _result(record: Record) -> GenerationResult:
    """What lmms-eval gets for a record: the answer, and what it cost."""
    spent = record.usage
    extra = {
        "rtr": record.rtr,
        "full_tokens": record.full_tokens,
        "visual_tokens": sum(u["prefill"] for u in spent),
        "encoded_tokens": sum(u["encoded"] for u in spent),
        "aux_encoded_tokens": sum(u.get("aux_encoded", 0) for u in spent),
        "aux_decoder_tokens": sum(u.get("aux_decoder", 0) for u in spent),
        "crops": record.crops,
        "boxes": record.boxes,
        "malformed_call": record.malformed_call,
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
