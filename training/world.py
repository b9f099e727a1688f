"""The picture generator that nano is trained on, found by name so that no room imports another by statement."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def world(name: str = "awares_bench.tasks.nano_world") -> ModuleType:
    return import_module(name)
