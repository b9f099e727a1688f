"""What a task's generation arguments mean here: greedy decoding, the length of an answer, where it stops. None is ignored in silence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_NEW_TOKENS = 128
"""Of an answer where the task does not say, as lmms-eval's own Qwen2.5-VL."""

ACCEPTED = ("repetition_penalty",)
"""Arguments that the engine acts on beside ``max_new_tokens`` and ``until``."""

NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "diversity_penalty": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "skip_special_tokens": True,
    "visual_cot": False,
} | dict.fromkeys(
    (
        *("max_gen_toks", "max_tokens", "max_completion_tokens", "max_length", "max_time"),
        *("stop", "stop_strings", "stop_sequences", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("bad_words_ids", "force_words_ids", "constraints", "sequence_bias", "logit_bias", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty", "dola_layers", "watermarking_config"),
    )
)
"""Arguments that change a greedy answer -> the value that changes nothing; any other is refused. None: only left out."""

SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "seed")
"""Arguments that only sampling reads."""

HARMLESS = ("use_cache", "length_penalty", "early_stopping", "renormalize_logits", "pad_token_id", "max_agentic_steps")
"""Arguments that change no greedy answer of one beam, or that lmms-eval itself acts on."""

INSTEAD = dict.fromkeys(("max_gen_toks", "max_tokens", "max_completion_tokens", "max_length"), "max_new_tokens") | dict.fromkeys(
    ("stop", "stop_strings", "stop_sequences"), "until"
)


@dataclass(frozen=True)
class Settings:
    """What decides an answer, and what does not.

    max_new_tokens: the most tokens of an answer. repetition_penalty: None for the model's own. decisive: every argument that is acted on, as records keep it; arguments that
    mean the same give the same. said: a sentence for each argument that is not acted on and that a user may expect to be.
    """

    max_new_tokens: int
    repetition_penalty: float | None = None
    decisive: dict = field(default_factory=dict)
    said: tuple[str, ...] = ()


def settings(gen_kwargs: dict) -> Settings:
    """A task's generation arguments, ``--gen_kwargs`` among them -> what they ask for. None and "none" mean: not given.

    Values that mean greedy decoding of one beam pass. Raises ValueError for a value that would change the answer and is not
    acted on, and for one that cannot be read: what was given, what is allowed, what to pass.
    """
    given = {k: v for k, v in gen_kwargs.items() if v is not None and not (isinstance(v, str) and v.lower() in ("none", "null"))}
    said = _sampling(given)
    for name, value in given.items():
        if not neutral(name, value):
            raise ValueError(_refusal(name, value))
    known = {"max_new_tokens", "until", "do_sample", "temperature", *ACCEPTED, *NEUTRAL, *SAMPLING, *HARMLESS}
    said += [f"{name}={given[name]!r} is not acted on" for name in given if name not in known]
    length = _length(given.get("max_new_tokens", MAX_NEW_TOKENS))
    until = given.get("until") or []
    decisive = {"max_new_tokens": length, "until": [until] if isinstance(until, str) else [str(s) for s in until]}
    decisive |= {k: given[k] for k in ACCEPTED if k in given}
    penalty = penalty_of(given["repetition_penalty"]) if "repetition_penalty" in given else None
    return Settings(length, penalty, decisive, tuple(said))


def neutral(name: str, value: object) -> bool:
    """Whether a generation argument leaves a greedy answer as it is."""
    return name not in NEUTRAL or value is None or value in ([], ()) or _same(value, NEUTRAL[name])


def penalty_of(value: object) -> float:
    """A repetition penalty as an option or a task gives it. Raises ValueError when it is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"repetition_penalty is {value!r}; it must be a number above 0, 1 for none")
    return float(value)


def _sampling(given: dict) -> list[str]:
    """Refuse what samples; say when ``do_sample=false`` overrules a temperature, which lmms-eval's own models do not let it do."""
    sample, heat = given.get("do_sample"), given.get("temperature")
    if sample is not None and sample not in (True, False):
        raise ValueError(
            f"do_sample is {sample!r}; allowed: false, for awares-bench decodes greedily. Pass --gen_kwargs do_sample=false"
        )
    try:
        heat = None if heat is None else float(heat)
    except (TypeError, ValueError):
        raise ValueError(
            f"temperature is {heat!r}; allowed: 0, for awares-bench decodes greedily. Pass --gen_kwargs temperature=0"
        ) from None
    if sample is not None and not sample:
        return [f"temperature={heat:g} is not acted on: do_sample=false means greedy decoding"] if heat else []
    one = _same(given.get("top_k"), 1) or _same(given.get("top_p"), 0)  # the most probable token alone is left
    if one or heat == 0 or (heat is None and not sample):
        return []
    asked = ", ".join(f"{k}={str(v).lower()}" for k, v in (("do_sample", sample), ("temperature", heat)) if v is not None)
    raise ValueError(f"sampling is asked for ({asked}); awares-bench decodes greedily. Pass --gen_kwargs do_sample=false")


def _refusal(name: str, value: object) -> str:
    if name in INSTEAD:
        return f"{name}={value!r} is not read; write it as {INSTEAD[name]}, and pass --gen_kwargs {name}=none"
    neutral = str(NEUTRAL[name]).lower()
    return (
        f"{name}={value!r} would change the answers and is not supported; allowed: {neutral}. Pass --gen_kwargs {name}={neutral}"
    )


def _length(value: Any) -> int:
    try:
        if isinstance(value, bool) or float(value) != int(value) or int(value) < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"max_new_tokens is {value!r}; it must be a whole number, at least 1. Pass --gen_kwargs max_new_tokens=N"
        ) from None
    return int(value)


def _same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal, numbers in words too."""
    try:
        return value is not None and other is not None and float(value) == float(other)
    except (TypeError, ValueError):
        return value == other
