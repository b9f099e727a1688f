"""What several tables need is computed once, and again when the documents change."""

import numpy as np
import pandas as pd

from awares_bench.reports.data import stats
from awares_bench.reports.data.once import once


def documents(scores) -> pd.DataFrame:
    rows = [
        {"method": m, "task": t, "doc_id": i, "score": s} for m in ("a", "b") for t in ("x", "y") for i, s in enumerate(scores)
    ]
    return pd.DataFrame(rows).astype({"method": "category", "task": "category"})


def test_the_same_documents_are_computed_once_and_changed_ones_again():
    calls = []

    @once("method", "task", "score")
    def total(frame, plus=0):
        calls.append(plus)
        return {"sum": frame["score"].sum() + plus}

    frame = documents([0.0, 1.0, 1.0])
    first = total(frame)
    first["sum"] = None  # a copy: what the caller does with it stays with the caller
    assert total(frame.copy()) == {"sum": 8.0} and calls == [0]
    assert total(frame, plus=1) == {"sum": 9.0} and calls == [0, 1]
    frame.loc[0, "score"] = 1.0
    assert total(frame) == {"sum": 9.0} and len(calls) == 3
    turned = frame.assign(method=frame["method"].cat.reorder_categories(["b", "a"]))
    total(turned)
    total(frame.iloc[::-1])
    assert len(calls) == 5


def test_draws_that_are_remembered_are_those_that_are_not(monkeypatch):
    values = np.random.default_rng(0).random((50, 3))
    remembered = stats.bootstrap(values, "x", 300)
    monkeypatch.setattr(stats, "REMEMBERED", 0)
    assert np.array_equal(remembered, stats.bootstrap(values, "x", 300))
