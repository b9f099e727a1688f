"""The lmms-eval adapter: turns its requests into samples, runs a policy over them, returns answers with telemetry.

    lmms-eval --model awares --model_args pretrained=DIR,output_dir=runs/a --tasks chartqa,docvqa_val --batch_size 8

Telemetry goes to two places: ``token_counts`` of lmms-eval's samples file (``--log_samples``) and our ``records.jsonl``,
from which an interrupted run resumes.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from . import registry
from .engine import Engine, Failure, Job
from .images import whole_images
from .method import options, unknown_option
from .record import Record, RunFolder, fingerprint
from .trajectory import Sample
from .vlm import MAX_PIXELS, MIN_PIXELS, VLM
from .weights import NANO, resolve

COMMON = {
    "pretrained": NANO,
    "dtype": "auto",
    "device": None,
    "attn_implementation": "sdpa",
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
    "constrained": True,
    "batch_size": 1,
    "output_dir": None,
    "seed": 0,
}
"""Options of every model beside its method's fields, with their defaults."""


@dataclass
class Telemetry(TokenCounts):
    """lmms-eval writes ``to_dict()`` of this into its samples file; the extra keys are ours (tests guard the contract)."""

    extra: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {**super().to_dict(), **self.extra}


class MethodModel(lmms):
    """A method as an lmms-eval chat model. A subclass names the method."""

    is_simple = False
    method: str

    def __init__(self, max_batch_size=None, **given):
        super().__init__()
        cls = registry.method_class(self.method)
        known = COMMON | options(cls)
        for name in given:
            if name not in known:
                raise ValueError(f"--model {self.method}: {unknown_option(name, list(known))}")
        chosen = known | {k: v for k, v in given.items() if v is not None}
        self.policy = cls(**{k: chosen[k] for k in options(cls)})
        self.batch_size = _whole("batch_size", chosen["batch_size"])
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = chosen["device"] or "auto"
        if self._world_size > 1 and torch.cuda.is_available() and not str(device).startswith("cpu"):
            device = f"cuda:{local}"
        seed = _whole("seed", chosen["seed"], least=0)
        random.seed(seed)
        torch.manual_seed(seed)
        folder = resolve(str(chosen["pretrained"]))
        self.vlm = VLM.load(
            folder,
            str(chosen["dtype"]),
            str(device),
            chosen["attn_implementation"],
            _whole("min_pixels", chosen["min_pixels"]),
            _whole("max_pixels", chosen["max_pixels"]),
            _flag("constrained", chosen["constrained"]),
        )
        identity = {
            "method": self.method,
            "fields": {k: chosen[k] for k in options(cls)},
            "pretrained": str(chosen["pretrained"]),
            "weights": fingerprint(Path(folder)) if Path(folder).is_dir() else None,
            "dtype": str(self.vlm.model.dtype).removeprefix("torch."),
            "attn_implementation": chosen["attn_implementation"],
            "min_pixels": self.vlm.limits["shortest_edge"],
            "max_pixels": self.vlm.limits["longest_edge"],
            "constrained": self.vlm.constrained,
            "seed": seed,
        }
        out = chosen["output_dir"] or Path("awares-runs") / f"{self.method}-{datetime.now():%Y%m%d-%H%M%S}"
        self.run = RunFolder(Path(str(out)), identity, self._rank)
        self._device = self.vlm.device

    @property
    def device(self) -> torch.device:
        return self._device

    def loglikelihood(self, requests):
        raise NotImplementedError(
            "loglikelihood tasks need scores of given answers; awares-bench models generate. Use generate_until tasks"
        )

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("multi-round tasks are not supported; use generate_until tasks")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, those of earlier interrupted runs from the record; raise at the end if any could not be."""
        keys = [(r.args[4], r.args[3], str(r.args[0])) for r in requests]  # (task, doc_id, prompt)
        todo = {key: r.args for key, r in zip(keys, requests, strict=True) if key not in self.run.done}
        if self._rank == 0 and len(todo) < len(set(keys)):
            print(
                f"{self.method}: {len(set(keys)) - len(todo)} of {len(set(keys))} answers are taken from {self.run.folder}",
                file=sys.stderr,
            )
        order, failed = list(todo), {}
        engine = Engine(self.vlm, self.policy, self.batch_size)
        with tqdm(total=len(order), desc=self.method, disable=self._rank != 0) as bar:
            for i, outcome in engine.run(self._job(todo[key]) for key in order):
                (task, doc_id, question), split = order[i], todo[order[i]][5]
                if isinstance(outcome, Failure):
                    failed[order[i]] = outcome.error
                    record = Record(task, doc_id, split, question, None, error=outcome.error, batch_size=self.batch_size)
                else:
                    record = Record.of(outcome, task, doc_id, split, question, self.batch_size)
                self.run.add(record)
                bar.update()
        if failed:
            some = "; ".join(f"{task} document {doc_id}: {error}" for (task, doc_id, _), error in list(failed.items())[:3])
            raise RuntimeError(
                f"{len(failed)} of {len(keys)} documents could not be answered: {some}. The other answers are kept in {self.run.folder}; "
                "repair or exclude these documents and run the same command with the same output_dir"
            )
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the run is whole when every rank is done
        if self._rank == 0:
            self.run.finish()
            print(f"{self.method}: records are in {self.run.folder}", file=sys.stderr)
        return [_result(self.run.done[key]) for key in keys]

    def _job(self, args: tuple) -> Job | Failure:
        """A chat request's arguments -> a job; a document that its own task cannot turn into messages is a failure."""
        _, to_messages, gen_kwargs, doc_id, task, split = args
        try:
            with whole_images():
                messages = to_messages(self.task_dict[task][split][doc_id])
            return _job(messages, dict(gen_kwargs), f"{task}/{doc_id}")
        except Exception as error:  # foreign code and data: recorded here, raised again at the end of the run
            return Failure(f"{type(error).__name__}: {error}")


class AwaResModel(MethodModel):
    """``--model awares``"""

    method = "awares"


class FullModel(MethodModel):
    """``--model awares_full``: the same weights, the whole image."""

    method = "full"


class LowModel(MethodModel):
    """``--model awares_low``: the same weights, the half-size view."""

    method = "low"


def _whole(name: str, value, least: int = 1) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
    if number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    return number


def _flag(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; allowed: true, false")
    return value


def _job(messages: list[dict], gen_kwargs: dict, key: str) -> Job:
    """A task's chat messages and generation arguments -> what the engine runs."""
    chat = ChatMessages(messages=messages)
    images, videos, audios = chat.extract_media()
    if videos or audios:
        raise ValueError("the document holds video or audio; awares-bench methods read images and text")
    if [m.role for m in chat.messages] != ["user"]:
        raise ValueError(
            f"the document is a conversation of {[m.role for m in chat.messages]}; one user message is supported (no few-shot)"
        )
    text = "".join(c.text for c in chat.messages[0].content if c.type == "text")
    if gen_kwargs.get("do_sample") and gen_kwargs.get("temperature", 1.0):
        raise ValueError(
            "the task asks for sampling (do_sample=true); awares-bench decodes greedily. Pass --gen_kwargs do_sample=false"
        )
    until = gen_kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    return Job(Sample(tuple(images), text, key), int(gen_kwargs.get("max_new_tokens", 128)), tuple(s for s in until if s))


def _result(record: Record) -> GenerationResult:
    spent = record.usage
    extra = {
        "rtr": record.rtr,
        "full_tokens": record.full_tokens,
        "visual_tokens": sum(u["prefill"] for u in spent),
        "encoded_tokens": sum(u["encoded"] for u in spent),
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
