"""A checkpoint under the options that every way of asking shares: the lmms-eval adapter and the Python API load through here."""

from __future__ import annotations

from awares_bench.methods.policy import UNDER_TEST, Policy
from awares_bench.models.packaged import resolve

from .local_model import VLM


def load_vlm(pretrained: object, options: dict, loaded: dict[tuple, VLM], penalty: float | None = None) -> tuple[VLM, str]:
    """A checkpoint -> (the model, its folder or hub name). One that ``loaded`` holds under the same options is not loaded again.

    options: dtype, device, attn_implementation, min_pixels, max_pixels, constrained. penalty: repetition penalty in place of
    the checkpoint's own. Raises ValueError for an option that cannot be read, CheckpointError for the checkpoint.
    """
    folder = resolve(str(pretrained))
    limits = whole("min_pixels", options["min_pixels"]), whole("max_pixels", options["max_pixels"])
    device, constrained = str(options["device"] or "auto"), flag("constrained", options["constrained"])
    key = (folder, str(options["dtype"]), device, options["attn_implementation"], *limits, constrained, penalty)
    if key not in loaded:
        loaded[key] = VLM.load(*key)
    return loaded[key], folder


def auxiliary_checkpoints(policy: Policy) -> dict[str, str]:
    """Role -> checkpoint of the models that a policy needs beside the one under test."""
    return {role: checkpoint for role, checkpoint in policy.models.items() if checkpoint != UNDER_TEST}


def whole(name: str, value: object, least: int = 1) -> int:
    """An option that is a whole number. Raises ValueError that says which."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
    if number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    return number


def flag(name: str, value: object) -> bool:
    """An option that is true or false. Raises ValueError that says which."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; allowed: true, false")
    return value
