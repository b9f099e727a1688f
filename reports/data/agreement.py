"""How far a method's answers agree with full resolution's, document by document, and whether its certainty means anything."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .summary import reference

RIGHT = 0.5
"""A document is right from this score on."""

BINS = 10
"""Of equal width, of the calibration error (Guo et al. 2017, arXiv 1706.04599)."""


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float | None:
    """Expected calibration error: the mean over documents of |share right - mean probability| of their bin; None where one is unknown.

    probability: of each answer (N,); right: 0 or 1 (N,).
    """
    if not len(probability) or np.isnan(probability).any():
        return None
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = [abs(right[place == b].sum() - probability[place == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(probability))


def agreement(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> a row per method: documents, same, lost, gained, probability, ece (fractions; null where unknown).

    Over the documents that full resolution answered too, all tasks together: same: both right or both wrong; lost: right at full
    resolution and wrong here; gained: the other way round. probability: mean probability of the reply that holds the answer; ece: see
    ``calibration_error``. Without a full-resolution run, same, lost and gained are null.
    """
    full = reference(frame, "full")
    known = frame.astype({"task": str, "method": str})
    base = known[known["method"] == full].set_index(["task", "doc_id"])["score"] if full else None
    rows = []
    for method, own in known.groupby("method", sort=False):
        right = own["score"].to_numpy(float) >= RIGHT
        logprob = pd.to_numeric(own["answer_logprob"]) if "answer_logprob" in own else pd.Series(np.nan, own.index)
        probability = np.exp(logprob.to_numpy(float))
        row: dict = {"method": method, "documents": len(own), "same": None, "lost": None, "gained": None}
        if base is not None and method != full:
            there = pd.MultiIndex.from_frame(own[["task", "doc_id"]])
            before = base.reindex(there).to_numpy(float)
            both = ~np.isnan(before)
            was, now = before[both] >= RIGHT, right[both]
            if both.any():
                row |= {"documents": int(both.sum()), "same": float((was == now).mean())}
                row |= {"lost": float((was & ~now).mean()), "gained": float((~was & now).mean())}
        unknown = np.isnan(probability).any()
        row |= {"probability": None if unknown else float(probability.mean()), "ece": calibration_error(probability, right)}
        rows.append(row)
    return pd.DataFrame(rows)
