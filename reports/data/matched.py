"""Accuracy at equal cost: a method that decides for each document beside methods with one setting for all, at the same mean cost.

A method with a setting is a curve through its runs, full resolution at its end. Between two neighbouring runs the curve is a line, and that
is no assumption: answering a random share of the documents with one run and the rest with the other costs and scores exactly so.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from . import stats
from .summary import reference, summary

COLUMNS = ("method", "cost", "at", "curve", "between", "ours", "fixed", "difference", "low", "high")


def matched(frame: pd.DataFrame, times: bool = True, level: float = stats.LEVEL) -> pd.DataFrame:
    """Documents -> rows ``COLUMNS``: each run that decides beside every curve of runs that do not.

    A run decides that calls, or that takes more than one turn on some document, as where an auxiliary model chooses what is shown. cost: ``RTR`` or ``seconds``, means over tasks of the means over documents; at: the run's own. ours, fixed: accuracies (fractions), means over
    tasks; difference with a paired bootstrap interval over documents. Where no two runs of a curve lie around the cost, there is no row.
    """
    summaries, full = summary(frame), reference(frame, "full")
    decides = frame["called"] | (frame["turns"].fillna(1) > 1)
    calls = decides.groupby(frame["method"], observed=True, sort=False).any()
    families = frame.drop_duplicates("method").set_index("method")["family"].astype(str)
    fixed = [str(m) for m in calls.index if not calls[m]]
    curves: dict[str, list[str]] = {}
    for method in fixed:
        if method != full:
            curves.setdefault(families[method], []).append(method)
    rows = []
    scores = stats.matrices(frame)
    for cost in ("RTR", "seconds") if times else ("RTR",):
        costs = _costs(frame, summaries, cost)
        for method in (str(m) for m in calls.index if calls[m]):
            at, ours = costs.get(method), summaries[method]["mean"]["accuracy"]
            if at is None or ours is None:
                continue
            for family, own in curves.items():
                known = {m: c for m in [*own, *([full] if full else [])] if (c := costs.get(m)) is not None}
                runs = sorted(known, key=lambda m: known[m])
                around = next(((a, b) for a, b in pairwise(runs) if known[a] <= at <= known[b]), None)
                if around is None:
                    continue
                cheap, dear = around
                wide = known[dear] - known[cheap]
                share = (at - known[cheap]) / wide if wide else 0.0  # of documents that go to the dearer run
                differences = {
                    task: (m[method] - (1 - share) * m[cheap] - share * m[dear]).to_numpy(float)[:, None]
                    for task, m in scores.items()
                }
                if any(np.isnan(d).all() for d in differences.values()):
                    continue
                drawn = np.mean([stats.bootstrap(d, task)[:, 0] for task, d in differences.items()], axis=0)
                low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
                difference = float(np.mean([np.nanmean(d) for d in differences.values()]))
                row = {"method": method, "cost": cost, "at": at, "curve": family, "between": f"{cheap}, {dear}", "ours": ours}
                rows.append(row | {"fixed": ours - difference, "difference": difference, "low": low, "high": high})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _costs(frame: pd.DataFrame, summaries: dict, cost: str) -> dict[str, float | None]:
    """Method -> its mean cost over tasks; None where a document's is unknown or a task is missing."""
    if cost == "RTR":
        return {m: cells["mean"]["rtr"] for m, cells in summaries.items()}
    out: dict[str, float | None] = {}
    for method, own in frame.groupby("method", observed=True, sort=False):
        means = own.groupby("task", observed=True)["seconds"].mean()
        whole = own["seconds"].notna().all() and len(means) == frame["task"].nunique()
        out[str(method)] = float(means.mean()) if whole else None
    return out
