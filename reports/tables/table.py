"""A table and how numbers stand in print: a dash where nothing is known, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

DASH = "–"


@dataclass(frozen=True)
class Table:
    """Numbers at full precision for CSV, and the same rows in words for Markdown, LaTeX and HTML."""

    name: str
    """Of its files, without the ending."""
    title: str
    numbers: pd.DataFrame
    """Unknown is NaN or None."""
    printed: pd.DataFrame
    """Strings, a dash for the unknown; a column's name is (group, column), the group possibly empty."""
    notes: list[str] = field(default_factory=list)
    """Sentences below the table."""


def printed(rows: list[dict]) -> pd.DataFrame:
    """Rows {(group, column): words} -> ``Table.printed``."""
    table = pd.DataFrame(rows).fillna(DASH)
    table.columns = pd.MultiIndex.from_tuples(list(table.columns))
    return table


def percent(fraction: float | None) -> float | None:
    return None if fraction is None or fraction != fraction else 100 * float(fraction)


def thousand(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def subtract(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or a != a or b != b else a - b


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """A number in print; an unknown one is a dash, never 0."""
    if value is None or value != value:
        return DASH
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def span(low: float | None, high: float | None) -> str:
    return DASH if low is None or low != low else f"{number(low, 1)} to {number(high, 1)}"


def chance(p: float) -> str:
    return DASH if p != p else ("<0.001" if p < 0.001 else f"{p:.3f}")
