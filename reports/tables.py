"""The main table: accuracy and retained token ratio per task and on average, in the shape of the paper's Table 1."""

from __future__ import annotations

import numpy as np
import pandas as pd


def summary(frame: pd.DataFrame) -> dict:
    """Documents -> {method: {task or "mean": {accuracy, rtr, documents, call_rate, malformed_rate}}}, fractions from 0 to 1.

    ``rtr`` is the mean of the per-document ratios (paper Eq. 9); "mean" is the mean over tasks, as in the paper's averages.
    """
    out: dict = {}
    for method, rows in frame.groupby("method", sort=False):
        cells = {}
        for task, some in rows.groupby("task", sort=False):
            cells[task] = {
                "accuracy": float(some["score"].mean()),
                "rtr": None if some["rtr"].isna().any() else float(some["rtr"].mean()),
                "documents": len(some),
                "call_rate": float(some["called"].mean()),
                "malformed_rate": float(some["malformed"].sum() / some["called"].sum()) if some["called"].any() else None,
            }
        ratios = [c["rtr"] for c in cells.values()]
        calls = rows["called"].sum()
        out[method] = cells | {
            "mean": {
                "accuracy": float(np.mean([c["accuracy"] for c in cells.values()])),
                "rtr": None if None in ratios else float(np.mean(ratios)),
                "documents": len(rows),
                "call_rate": float(np.mean([c["call_rate"] for c in cells.values()])),
                "malformed_rate": float(rows["malformed"].sum() / calls) if calls else None,
            }
        }
    return out


def main_table(summaries: dict) -> pd.DataFrame:
    """Summaries -> a table with a row per method and two columns per task: accuracy in percent and RTR."""
    rows = []
    for method, cells in summaries.items():
        row: dict = {"method": method}
        for task, cell in cells.items():
            row[f"{task} acc"] = round(100 * cell["accuracy"], 1)
            row[f"{task} RTR"] = None if cell["rtr"] is None else round(cell["rtr"], 2)
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table; a missing value is a dash."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join("–" if v is None or v != v else str(v) for v in row) + " |")
    return "\n".join(lines) + "\n"


def interval(scores: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of a mean over documents: (low, high)."""
    rng = np.random.default_rng(seed)
    means = scores[rng.integers(0, len(scores), (draws, len(scores)))].mean(1)
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist())


def mean_interval(frame: pd.DataFrame, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean over tasks, documents drawn within each task: (low, high)."""
    rng = np.random.default_rng(seed)
    means = []
    for _, some in frame.groupby("task"):
        s = some["score"].to_numpy()
        means.append(s[rng.integers(0, len(s), (draws, len(s)))].mean(1))
    mean = np.mean(means, 0)
    return tuple(np.quantile(mean, [(1 - level) / 2, (1 + level) / 2]).tolist())
