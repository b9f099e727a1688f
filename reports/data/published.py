"""The published cells (``paper_numbers.csv``) and how runs of the same setting compare with them."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

from .load import Run

COLUMNS = {"retention": float, "value": float}
COMPARED = ("accuracy", "rtr", "seconds")


def numbers() -> pd.DataFrame:
    """Columns: source (table or figure), method (family), retention, variant (of an ablation), task or "mean", quantity, value,
    doubt (why the cell should not be a target; empty where nothing speaks against it). Accuracies and shares are percents.
    """
    text = files("awares_bench.reports") / "paper_numbers.csv"
    return pd.read_csv(str(text), keep_default_na=False, na_values={"retention": [""]}, dtype={"variant": str})


def retention(about: dict) -> float | None:
    """The share of tokens that a run's method was told to keep."""
    value = ((about.get("identity") or {}).get("fields") or {}).get("retention")
    return None if value is None else float(value)


def cells(runs: list[Run], frame: pd.DataFrame) -> pd.DataFrame:
    """The published cells of the runs' methods on the frame's tasks: ``numbers`` with the run's name as ``run``.

    The mean is given where all six tasks are there. Empty on nano: nothing was published for it.
    """
    published, tasks = numbers(), set(frame["task"].unique())
    published = published[published["quantity"].isin(COMPARED)]
    six = set(published["task"]) - {"mean"}
    wanted = tasks & six | ({"mean"} if tasks == six else set())
    families = frame.drop_duplicates("method").set_index("method")["family"]
    parts = []
    for run in runs:
        keep, variant = retention(run.about), variant_of(run.name, families[run.name])
        same = published[(published["method"] == families[run.name]) & (published["variant"] == variant)]
        same = same[same["retention"].isna()] if keep is None else same[same["retention"] == keep]
        parts.append(same[same["task"].isin(wanted)].assign(run=run.name))
    return pd.concat(parts, ignore_index=True) if parts else published.head(0).assign(run=[])


def variant_of(run: str, family: str) -> str:
    """The ablation that a run's name ends in (``awares-sft`` -> ``sft``), "" for the method itself."""
    variants = sorted(set(numbers()["variant"]) - {""}, key=len, reverse=True)
    return next((v for v in variants if run.replace("-", "_").endswith(f"_{v}") or run == v), "") if family == "awares" else ""
