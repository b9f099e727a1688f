"""Fixtures that more than one file of tests uses. They import what they need: the process that spreads the tests needs none of it."""

import gc
import logging

import pytest


def pytest_collection_finish(session):
    """What the imports made stays: ``gc.collect()``, which lmms-eval calls for every model, then looks at a test's own objects only."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["line", "rectangle", "varlen"])
def layout(request, monkeypatch):
    """All ways to lay out a batch: the one for CPUs, the one for other attentions, and the one for GPUs, with the reference of its kernel."""
    from awares_bench.inference.local_model import LocalModel
    from awares_bench.inference.padded_batch import PaddedBatch
    from awares_bench.inference.ragged_batch import RaggedBatch
    from awares_bench.inference.varlen_batch import VarlenBatch

    kind = {"line": RaggedBatch, "rectangle": PaddedBatch, "varlen": VarlenBatch}[request.param]
    monkeypatch.setattr(LocalModel, "_batch", lambda vlm, sessions, chunks: kind(vlm.host, sessions, chunks))


class _Deprecations(logging.Handler):
    """Keeps what a library's logger says of names that it will drop; ``warnings`` never hears of these."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecated_name():
    """A test fails when a library tells, in its log, that a call of ours uses a name that it will drop."""
    handler = _Deprecations()
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate", "peft", "datasets")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.said
    for logger in loggers:
        logger.removeHandler(handler)
    assert not handler.said, f"a library deprecates what we call: {handler.said}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Random weights in a checkpoint folder: for what is about plumbing, not skill."""
    from awares_bench.training.nano import model as nano

    from .helpers.tiny import tiny_vlm

    folder = tmp_path_factory.mktemp("weights") / "tiny"
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder)
    return folder


@pytest.fixture(scope="module")
def task_files_read_once():
    """For files of tests that make lmms-eval's index of tasks over and over."""
    from .helpers.lmms_runs import tasks_read_once

    with tasks_read_once():
        yield


@pytest.fixture
def server():
    """A fake OpenAI-compatible server, of which ``server.state`` says what it does (see ``openai_fake``)."""
    from .helpers.openai_fake import start

    server = start()
    yield server
    server.shutdown()
    server.server_close()
