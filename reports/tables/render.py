"""Tables as CSV, Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd

from .table import Table


def write(table: Table, folder: Path, notes: list[str]) -> None:
    """``folder/NAME.csv``, ``.md`` and ``.tex``; notes (caveats of the whole report) stand below the table's own."""
    csv(table.numbers, folder / f"{table.name}.csv")
    (folder / f"{table.name}.md").write_text(
        markdown(table.printed) + "\n" + "\n".join(f"{n}  " for n in [*table.notes, *notes]) + "\n", encoding="utf-8"
    )
    (folder / f"{table.name}.tex").write_text(
        latex(table.printed, table.title, table.name, [*table.notes, *notes]), encoding="utf-8"
    )


def csv(numbers: pd.DataFrame, path: Path) -> None:
    """Numbers to nine significant digits, so that the last bits of a sum do not change the file; unknown is empty."""
    numbers.to_csv(path, index=False, float_format="%.9g", lineterminator="\n")


def markdown(printed: pd.DataFrame) -> str:
    """A frame of strings as a Markdown table; the group stands before the column's name."""
    names = [" ".join(part for part in _levels(c) if part).replace("|", r"\|") for c in printed.columns]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(v).replace("|", r"\|") for v in row) + " |" for row in printed.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def latex(printed: pd.DataFrame, caption: str, label: str, notes: list[str]) -> str:
    """A frame of strings as a ``table`` environment for ``booktabs``, groups spanning their columns, notes below."""
    columns = [_levels(c) for c in printed.columns]
    groups = _groups([g for g, _ in columns])
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{label}}}",
    ]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule"]
    if any(g for g, _, _ in groups):
        lines.append(
            " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{escape(g)}}}" if g else " & ".join([""] * n) for g, _, n in groups) + r" \\"
        )
        lines.append(" ".join(rf"\cmidrule(lr){{{start + 1}-{start + n}}}" for g, start, n in groups if g))
    lines += [" & ".join(escape(c) for _, c in columns) + r" \\", r"\midrule"]
    lines += [" & ".join(escape(str(v)) for v in row) + r" \\" for row in printed.itertuples(index=False)]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\footnotesize {escape(note)}" for note in notes]
    return "\n".join([*lines, r"\end{table}", ""])


def to_html(printed: pd.DataFrame) -> str:
    """A frame of strings as an HTML table with its groups as a first header row."""
    columns = [_levels(c) for c in printed.columns]
    groups = _groups([g for g, _ in columns])
    head = "".join(f'<th colspan="{n}">{html.escape(g)}</th>' for g, _, n in groups) if any(g for g, _, _ in groups) else ""
    names = "".join(f"<th>{html.escape(c)}</th>" for _, c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in printed.itertuples(index=False)
    )
    return f"<table><thead>{f'<tr>{head}</tr>' if head else ''}<tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _levels(column) -> tuple[str, str]:
    return column if isinstance(column, tuple) else ("", str(column))


def _groups(words: list[str]) -> list[tuple[str, int, int]]:
    """Runs of equal words -> (word, first index, length)."""
    out: list[tuple[str, int, int]] = []
    for i, word in enumerate(words):
        if out and out[-1][0] == word:
            out[-1] = (word, out[-1][1], out[-1][2] + 1)
        else:
            out.append((word, i, 1))
    return out


ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: "\\" + c for c in "&%$#_{}"}
ESCAPES |= {"−": "$-$", "–": "--", "…": r"\ldots{}", "†": r"$\dagger$", "<": "$<$", ">": "$>$", "±": r"$\pm$", "×": r"$\times$"}


def escape(text: str) -> str:
    """Text for LaTeX."""
    return "".join(ESCAPES.get(c, c) for c in text)
