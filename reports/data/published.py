"""The published cells (``paper_numbers.csv``) and how runs of the same setting compare with them."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

from .load import ReportError, Run

COMPARED = ("accuracy", "rtr", "seconds", "kept")

PAPER = "awares"
"""Whose cells stand beside ours where nothing else is asked for."""


def papers() -> list[str]:
    """The tables that can be set beside ours."""
    return list(dict.fromkeys(_all()["paper"]))


def _all() -> pd.DataFrame:
    text = files("awares_bench.reports") / "paper_numbers.csv"
    return pd.read_csv(str(text), keep_default_na=False, na_values={"retention": [""]}, dtype={"variant": str})


def numbers(paper: str = PAPER) -> pd.DataFrame:
    """Columns: paper, source (table or figure), method (family), retention, variant (of an ablation), task or "mean", quantity, value,
    host (the model that all rows of a source are measured on; empty where the source does not say), limits (the preset of processor
    limits it was measured under, see ``docs/reports.md``; empty where nobody says), doubt (why the cell should not be a target; empty
    where nothing speaks against it). Accuracies and shares are percents; ``kept`` is the mean over tasks of
    the score's share of full resolution's; ``points`` is a score of another scale. Raises ReportError for an unknown paper.
    """
    published = _all()
    if paper not in set(published["paper"]):
        raise ReportError(f"no published table {paper!r}; known: {', '.join(papers())}")
    return published[published["paper"] == paper].reset_index(drop=True)


def retention(about: dict) -> float | None:
    """The share of tokens that a run's method was told to keep."""
    value = ((about.get("identity") or {}).get("fields") or {}).get("retention")
    return None if value is None else float(value)


def cells(runs: list[Run], frame: pd.DataFrame, paper: str = PAPER) -> pd.DataFrame:
    """The published cells of the runs' methods on the frame's tasks: ``numbers`` with the run's name as ``run``.

    The mean is given where all of the paper's tasks are there, and no others. Empty on nano: nothing was published for it.
    """
    published, tasks = numbers(paper), set(frame["task"].unique())
    every = set(published["task"]) - {"mean"}
    published = published[published["quantity"].isin(COMPARED)]
    wanted = tasks & every | ({"mean"} if tasks == every else set())
    families = frame.drop_duplicates("method").set_index("method")["family"]
    parts = []
    for run in runs:
        keep, variant = retention(run.about), variant_of(run.name, families[run.name], run.about, paper)
        same = published[(published["method"] == families[run.name]) & (published["variant"] == variant)]
        same = same[same["retention"].isna()] if keep is None else same[same["retention"] == keep]
        parts.append(same[same["task"].isin(wanted)].assign(run=run.name))
    return pd.concat(parts, ignore_index=True) if parts else published.head(0).assign(run=[])


def variant_of(run: str, family: str, about: dict | None = None, paper: str = PAPER) -> str:
    """The variant of a method that a run is: one that its name ends in (``awares-sft`` -> ``sft``), or an option (``cap=640``); "" for the
    method itself."""
    own = numbers(paper)
    variants = sorted(set(own.loc[own["method"] == family, "variant"]) - {""}, key=len, reverse=True)
    fields = ((about or {}).get("identity") or {}).get("fields") or {}
    options = {f"{name}={value}" for name, value in fields.items()}
    return next((v for v in variants if run.replace("-", "_").endswith(f"_{v}") or run == v or v in options), "")
