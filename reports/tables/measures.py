"""Measures beside accuracy: agreement with full resolution, calibration, and accuracy at equal cost."""

from __future__ import annotations

import pandas as pd

from ..data import names
from ..data.agreement import BINS, agreement
from ..data.matched import matched
from ..data.summary import labels
from .table import DASH, Table, number, percent, printed, span


def agreement_table(frame: pd.DataFrame) -> Table | None:
    """``agreement`` in percent; None where there is neither a full-resolution run beside another nor a probability."""
    rows = agreement(frame)
    if rows["same"].isna().all() and rows["ece"].isna().all():
        return None
    name = labels(frame)
    share = ("same", "lost", "gained", "probability", "ece")
    numbers = rows.assign(**{c: [percent(None if pd.isna(v) else v) for v in rows[c]] for c in share})
    printed_rows = [
        {("", "method"): name[str(r.method)], ("", "documents"): f"{r.documents:,}"}
        | {("against full resolution", k): number(getattr(r, c), 1) for k, c in AGAINST.items()}
        | {("the answer's probability", k): number(getattr(r, c), 1) for k, c in CERTAINTY.items()}
        for r in numbers.itertuples()
    ]
    notes = [
        "Percent of documents, all tasks together; right is a score of at least 0.5. A method may score as full resolution does and still "
        "change many answers.",
        f"Calibration error: mean gap between probability and share right in {BINS} bins. The probability is of the whole reply that holds "
        "the answer, reasoning included; records of servers and of earlier releases do not have it.",
    ]
    return Table("agreement", f"Agreement with full resolution: {names.suite(frame)}", numbers, printed(printed_rows), notes)


AGAINST = {"same": "same", "right to wrong": "lost", "wrong to right": "gained"}
CERTAINTY = {"mean": "probability", "calibration error": "ece"}


def matched_table(frame: pd.DataFrame, times: bool = True) -> Table | None:
    """``matched`` in percent; None where no run that calls lies on a curve."""
    rows = matched(frame, times)
    if rows.empty:
        return None
    name = labels(frame)
    points = ("ours", "fixed", "difference", "low", "high")
    numbers = rows.assign(**{c: [percent(v) for v in rows[c]] for c in points})
    printed_rows = []
    for r in numbers.itertuples():
        text = {("", "decides per document"): name[str(r.method)], ("", "at equal"): r.cost, ("", "mean"): number(r.at, 2)}
        text |= {
            ("", "one setting for all"): names.METHODS.get(r.curve, (r.curve,))[0],
            ("accuracy", "decides"): number(r.ours, 1),
        }
        text |= {("accuracy", "one setting"): number(r.fixed, 1), ("", "points"): number(r.difference, 1, sign=True)}
        printed_rows.append(text | {("", "95 %"): span(r.low, r.high) or DASH})
    notes = [
        "The setting's accuracy is read between its two runs around that cost (in the CSV), full resolution being its end: what a random mixture "
        "of both would cost and score. A bootstrap interval of the paired difference."
    ]
    title = f"Accuracy at equal cost: {names.suite(frame)}"
    return Table("matched", title, numbers, printed(printed_rows), notes)
