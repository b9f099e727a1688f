"""Writes the parts of the documentation that the code decides: ``python docs/generate.py`` (``make docs`` does).

Each part stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in its page; ``tests/test_docs.py`` compares them with the code.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from awares_bench.evaluation.run_options import RunOptions
from awares_bench.methods import registry

DOCS = Path(__file__).parent


def field_strings(cls: type) -> dict[str, str]:
    """Field -> the string that stands under it in the source of the class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def described(cls: type) -> dict[str, str]:
    """Option -> its description: under it or in the docstring, of the class or of the one that it is inherited from."""
    found: dict[str, str] = {}
    names = "|".join(field.name for field in fields(cls))
    for parent in reversed(cls.__mro__):
        name = ""
        for line in map(str.strip, (vars(parent).get("__doc__") or "").splitlines()):
            if names and (entry := re.fullmatch(rf"({names}): +(.*)", line)):
                name, found[entry[1]] = entry[1], entry[2]
            elif name and line:  # a description goes on until a blank line
                found[name] += f" {line}"
            else:
                name = ""
        if parent is not object and is_dataclass(parent):
            found |= field_strings(parent)
    return found


def value(default: object) -> str:
    """A default as it is written on the command line."""
    if default is None or default == "":
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def run_options() -> str:
    """The options of every model as a Markdown table."""
    texts = described(RunOptions)
    rows = [f"| `{f.name}` | {value(f.default)} | {texts[f.name]} |" for f in fields(RunOptions)]
    return "\n".join(["| option | default | what it is |", "|---|---|---|", *rows])


def method_options() -> str:
    """The options of every method of this package as a Markdown table."""
    rows = ["| method | option | default | allowed | what it is |", "|---|---|---|---|---|"]
    for name in registry.own_names():
        cls = registry.method_class(name)
        hints, texts = get_type_hints(cls), described(cls)
        for field in fields(cls):
            allowed = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
            choices = ", ".join(f"`{choice}`" for choice in allowed) or getattr(hints[field.name], "__name__", "")
            rows.append(f"| `{name}` | `{field.name}` | {value(field.default)} | {choices} | {texts[field.name].rstrip('.')} |")
    return "\n".join(rows)


PARTS = {
    ("methods.md", "methods"): registry.table,
    ("options.md", "run options"): run_options,
    ("options.md", "method options"): method_options,
}
"""(page, part) -> what writes it."""


def filled(page: str, text: str) -> str:
    """The page's text with its generated parts as the code has them. Raises ValueError where a part's marks are missing."""
    for (where, part), write in PARTS.items():
        if where == page:
            before, begin, rest = text.partition(f"<!-- begin {part} -->\n")
            _, end, after = rest.partition(f"\n<!-- end {part} -->")
            if not begin or not end:
                raise ValueError(
                    f"docs/{page} has no marks '<!-- begin {part} -->' and '<!-- end {part} -->' for what the code writes"
                )
            text = before + begin + write() + end + after
    return text


def main() -> None:
    for page in sorted({page for page, _ in PARTS}):
        path = DOCS / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
