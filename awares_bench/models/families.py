"""Which host runs which ``config.model_type``: the families of this package, and those that other packages register.

A family is a file beside this one, or a class that a package names in the entry-point group ``awares_bench.models``.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import HostModel

GROUP = "awares_bench.models"


@cache
def families() -> dict[str, type[HostModel]]:
    """``config.model_type`` -> the family that runs it. Those of this package win."""
    from .glm4v import Glm4v, Glm46V
    from .internvl import InternVL
    from .qwen2_5_vl import Qwen2_5_VL
    from .qwen2_vl import Qwen2VL
    from .qwen3_vl import Qwen3VL, Qwen3VLMoe
    from .smolvlm import Idefics3, SmolVLM

    own = [Qwen2_5_VL, Qwen2VL, Qwen3VL, Qwen3VLMoe, Glm4v, Glm46V, InternVL, Idefics3, SmolVLM]
    hosts = [*(entry.load() for entry in entry_points(group=GROUP)), *own]
    return {model_type: host for host in hosts for model_type in host.model_types}


def host_of(model, processor, *limits) -> HostModel:
    """A model and its processor as the host of its family. limits: of a picture, as ``HostModel`` takes them."""
    return families()[model.config.model_type](model, processor, *limits)
