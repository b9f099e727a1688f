"""What each method scores and costs, by task and on average, and which runs others are compared with."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .once import once


@once("method", "task", "score", "rtr", "called", "malformed")
def summary(frame: pd.DataFrame) -> dict:
    """Documents -> {method: {task or "mean": {accuracy, rtr, documents, call_rate, malformed_rate}}}, fractions from 0 to 1.

    ``rtr`` is the mean of the per-document ratios (paper Eq. 9); "mean" is the mean over tasks, as in the paper's averages, and
    null for a method that lacks a task. malformed_rate is the share of the calls.
    """
    tasks = [str(t) for t in frame["task"].unique()]
    out: dict = {}
    for method, rows in frame.groupby("method", sort=False, observed=True):
        cells = {}
        for task, documents in rows.groupby("task", sort=False, observed=True):
            calls = int(documents["called"].sum())
            cells[str(task)] = {
                "accuracy": float(documents["score"].mean()),
                "rtr": None if documents["rtr"].isna().any() else float(documents["rtr"].mean()),
                "documents": len(documents),
                "call_rate": float(documents["called"].mean()),
                "malformed_rate": float(documents["malformed"].sum() / calls) if calls else None,
            }
        calls = int(rows["called"].sum())
        means = {k: _mean([cells.get(t, {}).get(k) for t in tasks]) for k in ("accuracy", "rtr", "call_rate")}
        means |= {"documents": len(rows), "malformed_rate": float(rows["malformed"].sum() / calls) if calls else None}
        cells["mean"] = means
        out[str(method)] = cells
    return out


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def labels(frame: pd.DataFrame) -> dict[str, str]:
    """Method -> its name in print."""
    return {str(m): str(n) for m, n in frame.drop_duplicates("method")[["method", "label"]].to_numpy()}


def reference(frame: pd.DataFrame, family: str) -> str | None:
    """The run that stands for a family in comparisons: the one named like it, else the first; None without one."""
    own = [str(m) for m in frame.loc[frame["family"] == family, "method"].unique()]
    return next((m for m in own if m in (family, f"awares_{family}")), own[0] if own else None)
