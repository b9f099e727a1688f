"""For the reference: the fields that a docstring lists as ``name:  text`` lines become a Markdown list."""

from __future__ import annotations

import re

from griffe import Extension, Object


class Fields(Extension):
    """Rewrites the docstring of every object before it is rendered."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value, set(obj.members))


def listed(text: str, names: set[str]) -> str:
    """The text with its lines ``name:  text``, for these names, and the lines that they go on in, as list items."""
    lines, inside = [], False
    for line in text.splitlines():
        if (entry := re.match(r"(\w+): +(.*)", line)) and entry[1] in names:
            lines += [] if inside else [""]
            lines.append(f"- `{entry[1]}`: {entry[2]}")
            inside = True
        else:
            inside = inside and bool(line.strip())
            lines.append(f"  {line.strip()}" if inside else line)
    return "\n".join(lines)
