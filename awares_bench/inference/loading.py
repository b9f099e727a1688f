"""A checkpoint under the options that every way of asking shares: the lmms-eval adapter and the Python API load through here."""

from __future__ import annotations

import os
import sys
from typing import Any

from awares_bench.methods.options import parse_bool, parse_int
from awares_bench.methods.policy import UNDER_TEST, Policy
from awares_bench.models.checkpoint import is_generic
from awares_bench.models.packaged import resolve

from .generic_model import GenericModel
from .local_model import LocalModel


def load_vlm(
    pretrained: object, options: dict, loaded: dict[tuple, LocalModel], penalty: float | None = None
) -> tuple[LocalModel, str]:
    """A checkpoint -> (the model, its folder or hub name). One that ``loaded`` holds under the same options is not loaded again.

    options: dtype, device, attn_implementation, min_pixels, max_pixels, limits, constrained, and engine, by which ``generic`` answers
    any checkpoint; one of a family that is not known here it answers in any case, which is said. penalty: repetition penalty in place
    of the checkpoint's own. Raises ValueError for an option that cannot be read, CheckpointError for the checkpoint.
    """
    folder, engine = resolve(str(pretrained)), options.get("engine")
    pixels = [None if options.get(k) is None else parse_int(k, options[k]) for k in ("min_pixels", "max_pixels")]
    device, constrained = str(options["device"] or "auto"), parse_bool("constrained", options["constrained"])
    limits = options.get("limits")
    settings = (folder, str(options["dtype"]), device, options["attn_implementation"], *pixels, constrained, penalty, limits)
    key = (*settings, engine == "generic")
    if key not in loaded:
        automatic = engine != "generic" and is_generic(folder)
        vlm: Any = (GenericModel if automatic or engine == "generic" else LocalModel).load(*settings)
        loaded[key] = vlm
        if automatic:
            _say(
                f"{pretrained} is a {vlm.host.model_type}, a family without a host of its own here: engine=generic answers, by model.generate, "
                "without pruners and with earlier turns computed again"
            )
        used = vlm.host.limits_name
        if limits and used != limits:
            _say(f"limits={limits} is overruled by {used.removeprefix(limits).strip().replace(' ', ' and ')}, which was given")
    return loaded[key], folder


def _say(sentence: str) -> None:
    """To the user, once for all processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(sentence, file=sys.stderr)


def auxiliary_checkpoints(policy: Policy) -> dict[str, str]:
    """Role -> checkpoint of the models that a policy needs beside the one under test."""
    return {role: checkpoint for role, checkpoint in policy.models.items() if checkpoint != UNDER_TEST}
