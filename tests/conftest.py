"""Fixtures that more than one file of tests uses."""

import pytest

from awares_bench.batch import Batch
from awares_bench.ragged import RaggedBatch
from awares_bench.vlm import VLM


@pytest.fixture(params=["line", "rectangle"])
def layout(request, monkeypatch):
    """Both ways to lay out a batch: the one for CPUs, and the one for GPUs and other attentions."""
    kind = {"line": RaggedBatch, "rectangle": Batch}[request.param]
    monkeypatch.setattr(VLM, "_batch", lambda vlm, sessions, chunks: kind(vlm, sessions, chunks))
