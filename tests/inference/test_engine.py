"""The driver: which turns are answered together, how far it looks ahead, what happens when memory runs out."""

import threading

import pytest
import torch

from awares_bench.awares import AwaRes
from awares_bench.baselines.full import Full
from awares_bench.evaluation.records import Record
from awares_bench.inference.batch import Batch
from awares_bench.inference.engine import LOOKAHEAD_BATCHES, Engine, Job, Scripted
from awares_bench.inference.memory import start_peak
from awares_bench.inference.scheduler import BatchLimits, next_batch
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Sample, Trajectory, Turn
from awares_bench.methods.crop_grid import PAPER_GRID

from ..helpers.tiny import picture, tiny_vlm
from .test_vlm import TOLERANCE, ours

SIZES = [(224, 224), (57, 400), (112, 300), (500, 90), (64, 64), (224, 112), (300, 300), (448, 448), (84, 84), (336, 112)]


def jobs(n, taken=None):
    for i in range(n):
        if taken is not None:
            taken.append(i)
        yield Job(Sample((picture(*SIZES[i % len(SIZES)], seed=i),), f"q{i % 3}", str(i)), 8)


class Recorder(Scripted):
    """Remembers the batches it is given, and has room for ``room`` tokens, padding counted."""

    def __init__(self, room=10**9):
        super().__init__({"q0": ["blue"], "q1": ["GET_CROPS: ['3']", "7"], "q2": ["GET_CROPS: ['all']", "9"]})
        self.batches, self.room, self.threads = [], room, set()

    def prepare(self, request):
        self.threads.add(threading.current_thread().name)
        return super().prepare(request)

    def reply(self, requests, pruner=None):
        costs = [sum(map(self.visual_tokens, r.turn.images)) for r in requests]
        if len(costs) * max(costs) > self.room:
            raise MemoryError("no room")
        self.batches.append([(len(r.session.turns), c) for r, c in zip(requests, costs, strict=True)])
        return super().reply(requests, pruner)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_every_job_ends_once_whatever_the_batch(batch_size):
    outcomes = list(Engine(Recorder(), AwaRes(), batch_size).run([*jobs(23), Failure("broken"), *jobs(4)]))
    assert sorted(i for i, _ in outcomes) == list(range(28))
    assert dict(outcomes)[23] == Failure("broken")
    assert [dict(outcomes)[i].answer for i in range(6)] == ["blue", "7", "9"] * 2


def test_a_batch_of_one_keeps_the_order_and_prepares_nothing_ahead():
    model, taken = Recorder(), []
    for n, (index, _) in enumerate(Engine(model, AwaRes(), 1).run(jobs(7, taken))):
        assert index == n and len(taken) == n + 1
    assert not model.threads and all(len(batch) == 1 for batch in model.batches)


def test_jobs_are_taken_no_further_ahead_than_said():
    taken, ended, most = [], 0, 0
    for _ in Engine(Recorder(), AwaRes(), 3, workers=2).run(jobs(100, taken)):
        ended += 1
        most = max(most, len(taken) - ended)
    assert ended == 100 and most <= (LOOKAHEAD_BATCHES + 2) * 3


def test_batches_are_prepared_in_worker_threads_and_hold_similar_lengths():
    model = Recorder()
    list(Engine(model, Full(), 5, workers=2).run(jobs(100)))
    assert model.threads and all(name.startswith("prepare") for name in model.threads)

    def waste(batches):
        return sum(len(b) * max(c for _, c in b) - sum(c for _, c in b) for b in batches)

    costs = [cost for batch in model.batches for _, cost in batch]
    in_order = [[(0, model.visual_tokens(j.sample.images[0])) for j in jobs(100)][n : n + 5] for n in range(0, 100, 5)]
    assert len(costs) == 100 and waste(model.batches) < waste(in_order) / 2


def test_second_turns_go_together_once_they_fill_a_batch():
    model = Recorder()
    list(Engine(model, AwaRes(), 4, workers=0).run(jobs(60)))
    assert all(len({turn for turn, _ in batch}) == 1 for batch in model.batches)
    second = [len(batch) for batch in model.batches if batch[0][0] == 1]
    assert sum(second) == 40 and second[: len(second) - 3] == [4] * (len(second) - 3)


def test_a_batch_holds_no_more_tokens_than_allowed():
    model = Recorder()
    list(Engine(model, Full(), 8, max_batch_tokens=300).run(jobs(50)))
    assert sum(map(len, model.batches)) == 50
    assert all(len(b) == 1 or len(b) * max(c for _, c in b) <= 300 for b in model.batches)
    with pytest.raises(ValueError, match="at least 1"):
        Engine(model, Full(), 8, max_batch_tokens=0)


def test_out_of_memory_halves_the_batch_and_says_so():
    model = Recorder(room=200)
    outcomes = dict(Engine(model, AwaRes(), 8).run(jobs(30)))
    whole = dict(Engine(Recorder(), AwaRes(), 8).run(jobs(30)))
    failed = {i for i, o in outcomes.items() if isinstance(o, Failure)}
    assert failed and all("lower max_pixels" in outcomes[i].error for i in failed)
    assert failed == {i for i, o in whole.items() if any(r.usage.encoded > 200 for r in o.replies)}
    assert all(outcomes[i].answer == whole[i].answer for i in outcomes if i not in failed)
    assert any(e.kind == "out_of_memory" for i in outcomes if i not in failed for e in outcomes[i].events)


def test_choosing_never_passes_the_oldest_by():
    budget = BatchLimits(2)
    assert next_batch([], [], [], budget) == []
    assert next_batch([("", False)] * 4, [9, 50, 10, 51], [False] * 4, budget) == [2, 0]
    assert next_batch([("a", False), ("", False), ("a", False)], [9, 9, 9], [False] * 3, budget) == [0, 2]
    assert next_batch([("", False)] * 3, [9, 9, 9], [False, True, False], budget) == [0, 2]  # one cache waits for another
    assert next_batch([("", False)] * 3, [9, 9, 9], [False, True, True], budget) == [1, 2]


def test_a_session_is_as_it_was_when_memory_ran_out_in_the_middle_of_keeping(monkeypatch):
    vlm, first = tiny_vlm(), Turn((picture(84, 84),), "Which?", system=PAPER_GRID.prompt, is_final=False)
    second = Turn((picture(56, 84),), is_final=False)

    def started():
        sessions = [Session(), Session()]
        vlm.reply([Request(s, first, 3) for s in sessions])
        return [Request(s, second, 3) for s in sessions]

    requests, calls, keep = started(), [], Batch.save_session

    def short(self, b, session, written):
        keep(self, b, session, written)
        calls.append(b)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "save_session", short)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        with pytest.raises(MemoryError, match="Tried to allocate"):
            vlm.reply(requests)
    assert len(calls) == 2 and all(len(r.session.turns) == len(r.session.replies) == 1 for r in requests)
    _, again = ours(vlm, requests)
    _, fresh = ours(vlm, started())
    assert (again - fresh).abs().max() < TOLERANCE


def test_peak_memory_is_each_document_s_own_where_one_is_answered_at_a_time():
    if not start_peak(torch.device("cpu")):
        pytest.skip("this system does not count a process's memory anew")
    vlm, spike = tiny_vlm(), 600 * 2**20
    (before,) = (o for _, o in Engine(vlm, Full(), 1).run(jobs(1)))
    torch.ones(spike // 4)  # given back at once, and no document's
    (after,) = (o for _, o in Engine(vlm, Full(), 1).run(jobs(1)))
    assert 0 < after.replies[0].peak_memory_bytes < before.replies[0].peak_memory_bytes + spike / 2
    vlm.reply([Request(Session(), Turn((picture(56, 56),), "?"), 2)])
    assert vlm.peak_memory() > after.replies[0].peak_memory_bytes + spike / 2  # of the run, all of it
    for batch_size, known in ((1, True), (2, False)):
        (usage,) = Record.of(after, "t", 0, "test", "q", batch_size).usage
        assert (usage["peak_memory_bytes"] is not None) is known


def test_workers_change_no_token():
    vlm, outcomes = tiny_vlm(), []
    for workers, batch_size in ((0, 1), (2, 4)):
        outcomes.append(dict(Engine(vlm, AwaRes(), batch_size, workers=workers).run(jobs(6))))
    assert all(isinstance(o, Trajectory) for o in outcomes[0].values())
    for i, one in outcomes[0].items():
        assert [r.tokens for r in one.replies] == [r.tokens for r in outcomes[1][i].replies]
