"""Workers that share a sweep: one cell each, dead ones replaced, nothing lost; with processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from awares_bench import cli
from awares_bench.evaluation import sweep
from awares_bench.evaluation.claims import Claims, TakenOver
from awares_bench.evaluation.records import read_records

from ..helpers.lmms_runs import environment, records

RECIPE = """
tasks: [nano_doc]
limit: {limit}
batch_size: 2
options: {{pretrained: {checkpoint}}}
methods: [full, low, {{method: pooling, retention: 0.5}}]
"""


def recipe(folder: Path, checkpoint, limit) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.format(checkpoint=checkpoint, limit=limit))
    return folder / "recipe.yaml"


def worker(folder: Path, path: Path, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "awares_bench", "run", str(path), "--out", str(folder / "out"), "--worker", *more]
    log = (folder / f"worker-{time.time_ns()}.log").open("w")
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment(folder), stdout=log, stderr=subprocess.STDOUT)


def answers(out: Path) -> dict:
    kept = ("answer", "replies", "rtr", "full_tokens", "crops", "image_sizes", "events", "error")
    return {
        (run.name, r.task, r.doc_id): {k: getattr(r, k) for k in kept}
        for run in sorted(out.glob("runs/*"))
        for r in read_records(run)
    }


def test_a_claim_is_one_workers_until_it_is_untouched(tmp_path):
    first, second = Claims(tmp_path, stale=60), Claims(tmp_path, stale=60)
    path = first.take("a", None)
    assert path and path.name == "a.1" and second.take("a", None) is None
    claim = second.on("a")
    assert not second.may_take(claim) and not claim.is_dead(60)
    os.utime(path, (time.time() - 90, time.time() - 90))
    claim = second.on("a")
    assert second.may_take(claim) and second.take("a", claim).name == "a.2" and first.take("a", claim) is None
    assert second.on("a").number == 2
    # one of this machine whose process is gone is dead at once
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.with_name("b.1").write_text(json.dumps(second.on("a").owner | {"pid": gone.pid}))
    assert first.may_take(first.on("b"))
    # one that ended is tried again only by workers that begin after
    time.sleep(0.02)
    second.end(path.with_name("a.2"), "failed", 1.0, "no")
    assert not first.may_take(first.on("a"))
    time.sleep(0.02)
    assert Claims(tmp_path).may_take(first.on("a"))


def test_a_worker_whose_cell_was_taken_over_stops(tmp_path):
    claims = Claims(tmp_path, stale=0.4)
    path = claims.take("a", None)
    with pytest.raises(TakenOver, match="another worker has taken a over"), claims.held("a", path):
        (tmp_path / "a.2").write_text("{}")
        for _ in range(100):
            time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt), claims.held("a", tmp_path / "a.2"):
        raise KeyboardInterrupt


def test_a_worker_is_one_process_and_knows_what_is_dead(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text("{tasks: [nano_doc], methods: [full]}")
    assert cli.main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path), "--worker", "--stale-after", "0"]) == 1
    assert "--stale-after is 0" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path), "--worker"]) == 1
    assert "a worker is one process" in capsys.readouterr().err


def test_workers_run_each_cell_once_and_try_again_what_failed_before_they_began(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text("{tasks: [nano_doc], methods: [full, low, {method: pooling, retention: 0.5}]}")
    cells, ran, failing = sweep.read(tmp_path / "r.yaml"), [], ["low"]
    out = tmp_path / "out"

    def run_cell(cell, out, index, vlms):
        ran.append(cell.name)
        if cell.name in failing:
            raise OSError("no such data")
        for path, text in (("runs", '{"status": "complete"}'), ("lmms", json.dumps(cell.spec))):
            file = out / path / cell.name / ("run.json" if path == "runs" else "cell.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    monkeypatch.setattr(sweep, "_run_cell", run_cell)
    monkeypatch.setattr(sweep, "_index", lambda recipe: None)
    first = {c["cell"]: c["status"] for c in sweep.share(cells, out)}
    assert first == {"full": "done", "low": "failed", "pooling_retention=0.5": "done"} and len(ran) == 3
    failing.clear()
    time.sleep(0.02)
    second = sweep.share(cells, out)
    assert ran[3:] == ["low"] and {c["status"] for c in second} == {"done"}
    assert {c["cell"]: c["status"] for c in json.loads((out / "sweep.json").read_text())["cells"]} == dict.fromkeys(first, "done")
    # a cell of a worker that lives is left to it, once it has been seen alive
    claims = Claims(out / "claims")
    (out / "lmms" / "full" / "cell.json").unlink()
    path = claims.take("full", claims.on("full"))
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(path))
    third = {c["cell"]: c["status"] for c in sweep.share(cells, out)}
    assert third["full"] == "running" and len(ran) == 4


@pytest.mark.slow
def test_workers_that_are_killed_lose_nothing(tmp_path, checkpoint):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    for folder in (whole, shared):
        folder.mkdir()
    path = recipe(tmp_path, checkpoint, 60)
    first = worker(shared, path)
    deadline = time.time() + 240
    while len(cut := [r for run in (shared / "out" / "runs").glob("*") for r in records(run)]) < 5 and time.time() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 5 <= len(cut) < 180
    pair = [worker(shared, path) for _ in range(2)]
    assert [w.wait(400) for w in pair] == [0, 0], [p.read_text()[-2000:] for p in shared.glob("*.log")]
    assert cli.main(["run", str(path), "--out", str(whole / "out")]) == 0
    assert answers(shared / "out") == answers(whole / "out") and len(answers(whole / "out")) == 180
    every = [r for run in (shared / "out" / "runs").glob("*") for r in records(run)]
    assert len(every) == 180  # nothing was answered twice
    said = "".join(p.read_text() for p in shared.glob("*.log"))
    assert "taken over from a worker that is gone" in said
    assert all(c["status"] == "done" for c in json.loads((shared / "out" / "sweep.json").read_text())["cells"])
