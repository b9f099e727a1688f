"""Options: the fields of a method's dataclass, checked, and named when they are misspelt; values of a command line, read."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(method: Any) -> None:
    hints = get_type_hints(type(method))
    for f in fields(method):
        hint, value = hints[f.name], getattr(method, f.name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{f.name} is {value!r}; allowed: {', '.join(map(repr, get_args(hint)))}")


def options(cls: type) -> dict[str, object]:
    """Field name -> default of a method class."""
    return {f.name: f.default for f in fields(cls)}


def unknown_option(name: str, known: list[str]) -> str:
    """The sentence for an option nobody knows: what was given, the nearest known one, all known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown option {name!r}.{hint} Known: {', '.join(sorted(known))}"


def parse_int(name: str, value: Any, least: int = 1) -> int:
    """An option that is a whole number, or a text of one. Raises ValueError that says which."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
    if isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    return number


def parse_bool(name: str, value: object) -> bool:
    """An option that is true or false. Raises ValueError that says which."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; allowed: true, false")
    return value
