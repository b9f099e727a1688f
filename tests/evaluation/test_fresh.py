"""What a later release of a library breaks: its deprecations are seen, the bounds hold, and the tested set serves every Python."""

import logging
import re
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLTextModel

from awares_bench.inference.padded_batch import CACHE

from ..helpers.tiny import tiny_vlm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS = [Requirement(r) for r in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
FOLLOWS_BOUNDS = {"torch", "torchvision"}


def test_the_cache_has_the_name_that_the_decoder_and_its_layers_give_it():
    for kind in (Qwen2_5_VLTextModel, Qwen2_5_VLDecoderLayer):
        assert CACHE in signature(kind.forward).parameters


@pytest.mark.skipif(CACHE == "past_key_values", reason="this transformers knows the old name only")
def test_a_deprecated_name_fails_the_test_that_uses_it():
    decoder = tiny_vlm().host.decoder
    embeds = torch.zeros(1, 2, decoder.config.hidden_size)
    with pytest.raises(FutureWarning, match="past_key_values"), torch.no_grad():
        decoder(inputs_embeds=embeds, past_key_values=DynamicCache(config=decoder.config), use_cache=True)


def test_a_deprecation_in_a_library_s_log_is_seen(no_deprecated_name):
    logging.getLogger("transformers.modeling_utils").warning("`torch_dtype` is deprecated! Use `dtype` instead!")
    logging.getLogger("transformers.modeling_utils").warning("something else")
    assert no_deprecated_name == ["`torch_dtype` is deprecated! Use `dtype` instead!"]
    no_deprecated_name.clear()


def pinned(python: str, machine: str = "x86_64", system: str = "linux") -> dict[str, str]:
    """The tested set on one Python: package -> version."""
    name = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system]
    told = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "platform_machine": machine,
        "sys_platform": system,
        "platform_system": name,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(told):
            assert wanted.name not in found, f"{wanted.name} twice on Python {python}"
            (exact,) = wanted.specifier
            assert exact.operator == "=="
            found[canonicalize_name(wanted.name)] = exact.version
    return found


@pytest.mark.parametrize("system", [("x86_64", "linux"), ("aarch64", "linux"), ("arm64", "darwin")], ids="-".join)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_tested_set_keeps_every_bound_on_every_python(python, system):
    tested = pinned(python, *system)
    for need in NEEDS:
        if need.name in FOLLOWS_BOUNDS or (need.marker and system != ("x86_64", "linux")):
            continue
        assert need.specifier.contains(tested[canonicalize_name(need.name)], prereleases=True), need


def test_the_tested_set_leaves_pytorch_to_the_bounds_and_names_no_host_or_path():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^(torch|torchvision|triton|nvidia-|cuda-)", text, re.M)
    assert "/" not in text


def test_what_a_later_release_breaks_has_an_upper_bound():
    bounds = {n.name: n.specifier for n in NEEDS}
    for name, broken in (("filelock", "4.0"), ("transformers", "5.40"), ("datasets", "6"), ("lmms-eval", "0.8")):
        assert not bounds[name].contains(broken), name


def test_what_lmms_eval_patches_is_there():
    from lmms_eval.evaluator import _enable_reentrant_filelocks

    _enable_reentrant_filelocks()
