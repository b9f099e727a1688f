"""A checkpoint under the options that every way of asking shares: the lmms-eval adapter and the Python API load through here."""

from __future__ import annotations

from awares_bench.methods.options import parse_bool, parse_int
from awares_bench.methods.policy import UNDER_TEST, Policy
from awares_bench.models.packaged import resolve

from .local_model import LocalModel


def load_vlm(
    pretrained: object, options: dict, loaded: dict[tuple, LocalModel], penalty: float | None = None
) -> tuple[LocalModel, str]:
    """A checkpoint -> (the model, its folder or hub name). One that ``loaded`` holds under the same options is not loaded again.

    options: dtype, device, attn_implementation, min_pixels, max_pixels, constrained. penalty: repetition penalty in place of
    the checkpoint's own. Raises ValueError for an option that cannot be read, CheckpointError for the checkpoint.
    """
    folder = resolve(str(pretrained))
    limits = parse_int("min_pixels", options["min_pixels"]), parse_int("max_pixels", options["max_pixels"])
    device, constrained = str(options["device"] or "auto"), parse_bool("constrained", options["constrained"])
    key = (folder, str(options["dtype"]), device, options["attn_implementation"], *limits, constrained, penalty)
    if key not in loaded:
        loaded[key] = LocalModel.load(*key)
    return loaded[key], folder


def auxiliary_checkpoints(policy: Policy) -> dict[str, str]:
    """Role -> checkpoint of the models that a policy needs beside the one under test."""
    return {role: checkpoint for role, checkpoint in policy.models.items() if checkpoint != UNDER_TEST}
