"""Accuracy on the documents that the half-size view gets wrong, where looking closer can help at all."""

from __future__ import annotations

import pandas as pd

from . import stats
from .summary import reference, summary


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> method, label, family, accuracy, low, high (fractions), documents: over those that half size scores below 0.5 on.

    The mean is over tasks. Empty without a half-size run, or where it is never wrong; half size itself is left out.
    """
    low = reference(frame, "low")
    wrong = frame[(frame["method"] == low) & (frame["score"] < 0.5)][["task", "doc_id"]]
    keys = pd.MultiIndex.from_frame(wrong.astype({"task": str}))
    hard = frame[pd.MultiIndex.from_frame(frame[["task", "doc_id"]].astype({"task": str})).isin(keys)] if low else frame.head(0)
    if hard.empty or hard["method"].nunique() < 2:
        return pd.DataFrame(columns=["method", "label", "family", "accuracy", "low", "high", "documents"])
    summaries = summary(hard)
    means = stats.intervals(hard).query("task == 'mean'").set_index("method")
    rows = []
    for m in hard.drop_duplicates("method").itertuples():
        cell = summaries[m.method]["mean"]
        if m.method != low and cell["accuracy"] is not None:
            same = {"method": m.method, "label": m.label, "family": m.family, "accuracy": cell["accuracy"]}
            rows.append(same | dict(means.loc[m.method, ["low", "high"]]) | {"documents": cell["documents"]})
    return pd.DataFrame(rows, columns=["method", "label", "family", "accuracy", "low", "high", "documents"])
