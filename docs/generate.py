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
from awares_bench.models.families import families
from awares_bench.models.limits import NAMED, QWEN3

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


def families_table() -> str:
    """The model families of this package and what pruners and trainers may have of each, as a Markdown table."""
    head = [
        "family",
        "`model_type`",
        "a picture costs",
        "limits",
        "positions",
        "pruners by",
        "second turn",
        "training",
    ]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    hosts = [host for host in dict.fromkeys(families().values()) if host.__module__.startswith("awares_bench.")]
    for host in hosts:
        file = f"{host.__module__.rpartition('.')[2]}.py"
        by = {
            "features": True,
            "vision attention": "attention" in host.provides,
            "decoder attention": "decoder_attention" in host.provides,
        }
        cells = [
            f"[`{file}`](../awares_bench/models/{file})",
            ", ".join(f"`{kind}`" for kind in host.model_types),
            "tiles, by its share" if host.tiles else "tokens, by its pixels",
            "the checkpoint's" if host.tiles else f"{host.default_limits[0]:,} to {host.default_limits[1]:,} pixels",
            f"M-RoPE, {host.position_axes} axes" if host.position_axes > 1 else "RoPE",
            ", ".join(name for name, has in by.items() if has),
            "kept cache",
            "adapters, FSDP" if hasattr(host, "lora_targets") and hasattr(host, "decoder_layer") else "no",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    cells = [
        "[`generic.py`](../awares_bench/models/generic.py)",
        "any other",
        "what its processor says",
        "the checkpoint's",
        "any",
        "none",
    ]
    return "\n".join([*rows, "| " + " | ".join([*cells, "computed again", "no"]) + " |"])


def limits_table() -> str:
    """Sets of limits by name, as a Markdown table."""
    rows = ["| `limits` | checkpoints | fewest pixels | most pixels | in tokens | source |", "|---|---|---|---|---|---|"]
    for row in NAMED:
        kinds = ", ".join(f"`{kind}`" for kind in row.families) or "any"
        side = 32 if row.families == QWEN3 else 28
        numbers = [f"{n:,}" for n in row.pixels] if row.pixels else ["the family's"] * 2
        tokens = (
            "{:g} to {:g} of {side} x {side}".format(*(n // side**2 for n in row.pixels), side=side)
            if row.pixels
            else "the family's"
        )
        rows.append(f"| `{row.name}` | {kinds} | {numbers[0]} | {numbers[1]} | {tokens} | {row.source} |")
    return "\n".join(rows)


def _nano_rows() -> list[dict[str, str]]:
    """The main table of nano's committed figures, as it is printed: method, acc, RTR, interval, hard."""
    lines = (DOCS.parent / "reports" / "published" / "nano" / "figures" / "table.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    at = {name: table[0].index(column) for name, column in (("acc", "mean acc"), ("hard", "where half size is wrong acc"))}
    at |= {"method": 0, "rtr": at["acc"] + 1, "interval": at["acc"] + 2}
    return [{name: row[i] for name, i in at.items()} for row in table[2:]]


def nano_pruners() -> str:
    """Pruners on nano: accuracy at the tokens that they were told to keep, with the RTR that came of it."""
    kept = ("25", "50", "70")
    cells: dict[str, dict[str, str]] = {}
    for row in _nano_rows():
        if (told := re.fullmatch(r"(.*) (\d+) %", row["method"])) and not told[1].startswith("AwaRes"):
            cells.setdefault(told[1], {})[told[2]] = f"{row['acc']} ({row['rtr']})"
    rows = ["| pruner | " + " | ".join(f"keeps {k} %" for k in kept) + " |", "|---|" + "---|" * len(kept)]
    return "\n".join(rows + [f"| {name} | " + " | ".join(by[k] for k in kept) + " |" for name, by in cells.items()])


def nano_others() -> str:
    """Everything else on nano: policies, compositions and controls."""
    rows = ["| method | accuracy | interval | where half size is wrong | RTR |", "|---|---|---|---|---|"]
    for row in _nano_rows():
        if row["method"].startswith("AwaRes") or not re.fullmatch(r".* \d+ %", row["method"]):
            rows.append(f"| {row['method']} | {row['acc']} | {row['interval']} | {row['hard']} | {row['rtr']} |")
    return "\n".join(rows)


PARTS = {
    ("results_nano.md", "nano pruners"): nano_pruners,
    ("results_nano.md", "nano others"): nano_others,
    ("models.md", "families"): families_table,
    ("options.md", "limits"): limits_table,
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
