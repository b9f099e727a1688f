"""Aggregation for the nano tasks. Scores of single documents come from the official tasks' own functions."""

from __future__ import annotations


def mean_score(results: list[dict]) -> float:
    """Mean of per-document scores of any number of documents (OCRBench's own aggregation always divides by 1,000)."""
    return sum(r["score"] for r in results) / len(results)
