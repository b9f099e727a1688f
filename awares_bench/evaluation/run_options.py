"""The options of every model beside its method's own, said once: for lmms-eval, recipes, the Python API and the documentation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from awares_bench.methods.options import parse_bool, parse_int
from awares_bench.models.limits import NAMES as LIMITS
from awares_bench.models.packaged import NANO


def _text(name: str, value: object) -> str:
    return str(value)


def _count(least: int) -> Callable[[str, object], int]:
    return lambda name, value: parse_int(name, value, least)


def _number(above: float, zero: bool = False) -> Callable[[str, object], float | None]:
    """above: what the number must be larger than; zero: whether 0 will do too."""

    def parse(name: str, value: object) -> float | None:
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (above < value < float("inf") or (zero and value == 0))
        ):
            raise ValueError(f"{name} is {value!r}; it must be a number above {above:g}{', or 0' if zero else ''}")
        return float(value)

    return parse


def _optional(parse: Callable) -> Callable[[str, object], object]:
    """None is left as it is."""
    return lambda name, value: None if value is None else parse(name, value)


def mapping(name: str, value: object) -> dict | None:
    """A mapping, its text as JSON or YAML, or the name of a file that holds it."""
    given = value
    if isinstance(value, str):
        try:
            value = yaml.safe_load(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name} is {given!r}, which is not YAML: {' '.join(str(error).split())}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f'{name} is {given!r}; it must be a mapping such as {{"max_model_len": 8192}}, or a YAML file that holds one'
        )
    return value


def _choice(*allowed: str) -> Callable[[str, object], str]:
    def parse(name: str, value: object) -> str:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        return str(value)

    return parse


def _option(default: object, parse: Callable = _text, *, decides_weights=False, of_checkpoint=False, for_engine=None, unread=()):
    """A field of ``RunOptions``.

    parse: (name, value as given) -> value; raises ValueError. decides_weights: whether it decides what is in memory, or which
    server answers. of_checkpoint: whether ``awares_bench.load`` has it too. for_engine: the engine that alone reads it. unread:
    engines that do not read it.
    """
    metadata = {"parse": parse, "decides_weights": decides_weights, "of_checkpoint": of_checkpoint, "for_engine": for_engine}
    return field(default=default, metadata=metadata | {"unread": unread})


ENGINES = ("transformers", "generic", "openai", "vllm")
"""What may answer: the model in this process by our own loop or by its ``generate``, a server, vLLM in this process."""

ELSEWHERE = ("openai", "vllm")
"""Engines whose model is not loaded by this package, so that options of loading are not read."""


@dataclass(frozen=True)
class RunOptions:
    """How a checkpoint is loaded, how documents are batched and where their records go; ``parse`` makes it of what was given."""

    pretrained: str = _option(NANO, decides_weights=True)
    """the checkpoint: a folder, a folder of LoRA adapters, a hub name, or `nano`, `nano-sft`, `nano-base` of this package
    ([what is accepted and refused](checkpoints.md))"""

    dtype: str = _option("auto", decides_weights=True, of_checkpoint=True, unread=("openai",))
    """`auto`: bfloat16 on a GPU, float32 on a CPU; with `engine=vllm` a quantised checkpoint takes vLLM's"""

    device: str | None = _option(None, decides_weights=True, of_checkpoint=True, unread=ELSEWHERE)
    """none: a GPU where there is one, else the CPU"""

    attn_implementation: str = _option("sdpa", decides_weights=True, of_checkpoint=True, unread=ELSEWHERE)
    """transformers' attention kernel"""

    limits: str | None = _option(None, _choice(*LIMITS), decides_weights=True, of_checkpoint=True)
    """a set of the processor's limits per image by name ([limits by name](#limits-by-name)), the same for every method and for
    the denominator of RTR. None: `hf`, those of the family's released checkpoints"""

    min_pixels: int | None = _option(None, _count(1), decides_weights=True, of_checkpoint=True)
    """the processor's lower limit per image, in place of that of `limits`"""

    max_pixels: int | None = _option(None, _count(1), decides_weights=True, of_checkpoint=True)
    """the processor's upper limit per image, likewise"""

    constrained: bool = _option(True, parse_bool, decides_weights=True, of_checkpoint=True, unread=ELSEWHERE)
    """once a reply has begun as a call, only tokens that continue a call that can be parsed are allowed, in any spelling;
    tokens with no alternative are fed in one forward pass. A choice that is overruled is an event. `false`: plain greedy
    decoding"""

    repetition_penalty: float | None = _option(None, lambda name, value: value, decides_weights=True, of_checkpoint=True)
    """none: the checkpoint's own, of its `generation_config.json` (1.05 in Qwen's releases), as transformers' `generate`
    applies it. `1` switches it off ([the same numbers as lmms-eval](same_numbers.md))"""

    reuse_features: int = _option(0, _count(0), decides_weights=True, unread=ELSEWHERE)
    """GiB of vision features that are kept for pictures which another method of the same process sees again"""

    engine: str = _option("transformers", _choice(*ENGINES), decides_weights=True, of_checkpoint=True)
    """`generic`: answer by `model.generate`, for any image-text checkpoint, without pruners; what a checkpoint whose family is
    not known here gets anyway ([model families](models.md)). `openai`: ask a server instead of loading the model; `vllm`: vLLM in
    this process ([servers](servers.md))"""

    base_url: str | None = _option(None, decides_weights=True, for_engine="openai")
    """the server's address, for `engine=openai`"""

    model: str | None = _option(None, decides_weights=True, for_engine="openai")
    """the model's name on the server, for `engine=openai`"""

    timeout: float | None = _option(None, _number(0), for_engine="openai")
    """seconds that the server has for one try of one request. None: 600"""

    retries: int | None = _option(None, _optional(_count(0)), for_engine="openai")
    """tries of a request after the first, where the connection breaks or the server fails. None: 12, about a minute"""

    wait_for_server: float | None = _option(None, _number(0, zero=True), for_engine="openai")
    """minutes that a server which cannot be reached has to start, or to come back. None: 10"""

    replicas: int | None = _option(None, _optional(_count(1)), for_engine="openai")
    """engines behind the address (`--data-parallel-size` of vLLM): each conversation is sent to one of them, whose cache holds its
    first turn. None: 1 ([servers](servers.md#more-than-one-replica))"""

    tensor_parallel_size: int | None = _option(None, _optional(_count(1)), decides_weights=True, for_engine="vllm")
    """GPUs that vLLM splits the model over. None: 1"""

    vllm_options: Mapping | None = _option(None, mapping, decides_weights=True, for_engine="vllm")
    """further arguments of vLLM's `LLM`, such as `{"max_model_len": 8192}`, or a YAML file of them"""

    batch_size: int = _option(1, _count(1))
    """rows of a batch; predictions do not depend on it. Use 1 to measure latencies: nothing overlaps and nothing is reordered"""

    max_batch_tokens: int | None = _option(None, _count(1), unread=("openai",))
    """a second limit of a batch: rows times the longest row, padding counted. Without it too, a batch that runs out of memory
    is continued in halves"""

    seed: int = _option(0, _count(0))
    """seeds Python's and PyTorch's random generators; recorded with the run"""

    keep_masks: bool = _option(False, parse_bool)
    """keep in the record which visual tokens a pruner let through, as a bit mask for each picture and cut; `awares-bench show`
    draws them. Answers that were recorded without them are given again"""

    on_error: str = _option("stop", _choice("stop", "skip"))
    """what happens to documents that cannot be answered, once all others are: `stop` ends the run, `skip` leaves them out of
    the scores ([odd documents](odd_documents.md))"""

    output_dir: str | None = _option(None)
    """the run folder, with `run.json` and `records.jsonl`. None: a new folder `awares-runs/…`. The same command on the same
    folder resumes ([what is reused and what is answered again](run_folders.md))"""

    label: str | None = _option(None)
    """how tables and figures name the run. None: the method and its options"""

    @classmethod
    def parse(cls, arguments: dict[str, object]) -> RunOptions:
        """Options as given, those that are not of a run left out -> checked values. Raises ValueError that names the option."""
        parsers = {f.name: f.metadata["parse"] for f in fields(cls)}
        return cls(**{name: parsers[name](name, value) for name, value in arguments.items() if name in parsers})


NAMES = tuple(f.name for f in fields(RunOptions))
"""Of all options."""

WEIGHTS = tuple(f.name for f in fields(RunOptions) if f.metadata["decides_weights"])
"""Options that decide what is in memory, or which server answers."""

OF_CHECKPOINT = tuple(f.name for f in fields(RunOptions) if f.metadata["of_checkpoint"])
"""Options of ``awares_bench.load`` beside the checkpoint."""


def only_for(engine: str) -> tuple[str, ...]:
    """Options that one engine alone reads."""
    return tuple(f.name for f in fields(RunOptions) if f.metadata["for_engine"] == engine)


def unread(options: RunOptions, given: Collection[str]) -> list[str]:
    """Names of options that were given and that the engine, which answers otherwise, would not read; ``constrained=false`` it fulfils."""
    names = [f.name for f in fields(options) if options.engine in f.metadata["unread"] and f.name in given]
    defaults = {f.name: f.default for f in fields(options)} | {"constrained": False}
    return [name for name in names if getattr(options, name) != defaults[name]]
