"""Name -> method class: a file of ``baselines/`` by its name, ``awares``, or the entry-point group ``awares_bench.methods``."""

from __future__ import annotations

import ast
import difflib
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files

from .method import Policy

GROUP = "awares_bench.methods"


def names() -> list[str]:
    """Every known method, without importing any."""
    rooms = files("awares_bench.baselines").iterdir()
    found = {p.name.removesuffix(".py") for p in rooms if p.name.endswith(".py") and not p.name.startswith("_")}
    return sorted(found | {"awares"} | {e.name for e in entry_points(group=GROUP)})


def method_class(name: str) -> type[Policy]:
    """The class behind a name. Raises ValueError with the nearest known name."""
    if name == "awares":
        module = import_module("awares_bench.awares")
    elif name in names():
        external = [e for e in entry_points(group=GROUP) if e.name == name]
        if external:
            return external[0].load()
        module = import_module(f"awares_bench.baselines.{name}")
    else:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown method {name!r}.{hint} Known: {', '.join(names())}")
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Policy) and c.__module__ == module.__name__]
    if len(own) != 1:
        raise ValueError(f"{module.__name__} must define one method class; it defines {[c.__name__ for c in own]}")
    return own[0]


def describe(name: str) -> dict[str, str]:
    """The block ``Paper / Code / Needs / Cost / Differs`` of a method's module docstring, and its first line as ``Title``."""
    place = ("awares_bench", "awares.py") if name == "awares" else ("awares_bench.baselines", f"{name}.py")
    doc = ast.get_docstring(ast.parse((files(place[0]) / place[1]).read_text())) or ""
    block = {"Title": doc.splitlines()[0] if doc else ""}
    for line in doc.splitlines()[1:]:
        word, _, rest = line.partition("  ")
        if word in ("Paper", "Code", "Needs", "Cost", "Differs"):
            block[word] = rest.strip()
    return block


def table() -> str:
    """The known methods as the Markdown table of the README."""
    rows = ["| method | what it is | needs | cost | differs from its source |", "|---|---|---|---|---|"]
    for name in names():
        b = describe(name)
        rows.append(
            f"| [`{name}`]({'awares_bench' if name == 'awares' else 'baselines'}/{name}.py) | {b['Title']} | {b['Needs']} | {b['Cost']} | {b['Differs']} |"
        )
    return "\n".join(rows)
