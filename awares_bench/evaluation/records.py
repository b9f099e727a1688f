"""A run is a folder: ``run.json`` says what was run, ``records.jsonl`` holds one line per document, written as it is answered.

A run that is cut goes on where it stopped: the same command on the same folder answers only what is missing. So does one whose
answers an earlier release gave, as far as the code of its method is the same: each record says its own version.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from awares_bench.methods.conversation import EventKind, Trajectory

from .provenance import provenance

VERSION = 2
"""Of the record's fields. Version 1, where boxes and malformed calls were events, is read too; others are refused."""


@dataclass(frozen=True)
class Record:
    """One document answered, or not. Missing is None, never 0.

    rtr: retained token ratio over all turns. usage: one entry per turn (see ``Usage``), and its peak memory where
    one conversation is answered at a time. crops: names of the regions that were shown after a smaller view, or beside one.
    boxes: those that were shown so by a method that has boxes, in pixels of the image: left, top, right, bottom.
    malformed_call: why the model's call could not be read; None when it made none, or one that could.
    answer_logprob: natural logarithm of the probability of the whole reply that holds the answer; None from servers and where not kept.
    models: who answered each turn, "" for the model under test; empty when no auxiliary model did.
    batch_size: conversations in flight; seconds of a batch above 1 are shares, not latencies.
    content: digest of what the document shows and asks. generation: the arguments that decided the answer. Both are None in
    records of releases that did not keep them. keep_masks: for each turn, which visual tokens a pruner let through, as dictionaries
    of ``KeptTokens`` with bit masks; None where the run was not asked to keep them. attempt: records of the same document before this one; the last is in force.
    """

    task: str
    doc_id: int
    split: str
    question: str
    answer: str | None
    replies: list[str] = field(default_factory=list)
    crops: list[str] = field(default_factory=list)
    rtr: float | None = None
    full_tokens: int | None = None
    usage: list[dict] = field(default_factory=list)
    image_sizes: list[list[list[int]]] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    error: str | None = None
    batch_size: int | None = None
    models: list[str] = field(default_factory=list)
    content: str | None = None
    generation: dict | None = None
    attempt: int = 0
    boxes: list[list[int]] = field(default_factory=list)
    malformed_call: str | None = None
    answer_logprob: float | None = None
    version: int = VERSION
    keep_masks: list[list[dict]] | None = None

    @classmethod
    def of(
        cls, trajectory: Trajectory, task: str, doc_id: int, split: str, question: str, batch_size: int, keep_masks: bool = False
    ) -> Record:
        return cls(
            task=task,
            doc_id=doc_id,
            split=split,
            question=question,
            answer=trajectory.answer,
            replies=[r.text for r in trajectory.replies],
            crops=list(trajectory.crops),
            rtr=trajectory.rtr,
            full_tokens=trajectory.full_tokens,
            usage=[
                r.usage.as_dict() | {"peak_memory_bytes": r.peak_memory_bytes if batch_size == 1 else None}
                for r in trajectory.replies
            ],
            image_sizes=[[list(image.size) for image in turn.images] for turn in trajectory.turns],
            events=[asdict(e) for e in trajectory.events],
            batch_size=batch_size,
            models=[turn.model for turn in trajectory.turns] if any(turn.model for turn in trajectory.turns) else [],
            boxes=[list(box) for box in trajectory.boxes],
            malformed_call=trajectory.malformed_call,
            answer_logprob=trajectory.answer_logprob,
            keep_masks=[[kept.as_dict() for kept in r.kept] for r in trajectory.replies] if keep_masks else None,
        )


class RunFolder:
    """Writes a run; resumes it when the folder already holds the same one.

    A folder holds one answer to a document: what it shows (``content``) and the generation arguments are checked one by one, and
    an answer to others is given again. What is equal for all documents of a task is checked at its first one (``expect``).

    label: how tables and figures name the run.
    identity: what must be equal for all records (method, its fields and code, weights, limits, dtype, seed).
    done: (task, doc_id, question) -> the answer in force.
    Raises ValueError when the folder holds another run, OSError with the folder's name when it cannot be written.
    """

    def __init__(self, folder: Path, identity: dict, rank: int = 0, label: str | None = None):
        self.folder, self.identity, self.label = Path(folder), identity, label
        self.path = self.folder / ("records.jsonl" if rank == 0 else f"records-{rank}.jsonl")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._latest = {(r.task, r.doc_id): r for r in read_records(self.folder, repair=self.path)}
            self.done = {(r.task, r.doc_id, r.question): r for r in self._latest.values() if r.error is None}
            if rank == 0:
                self._write_provenance()
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write the run to {self.folder}: {error.strerror or error}; pass output_dir=FOLDER") from error

    def _write_provenance(self) -> None:
        path = self.folder / "run.json"
        now = {"version": VERSION, "status": "partial", "label": self.label, "identity": self.identity, **provenance()}
        if path.exists():
            before = json.loads(path.read_text())
            both = [k for k in self.identity if k in before["identity"]]  # an earlier release did not know the others
            said = _differences({k: before["identity"][k] for k in both}, {k: self.identity[k] for k in both})
            if said:
                raise ValueError(f"{self.folder} holds another run ({said}). Pass another output_dir, or delete the folder")
            now |= {k: before[k] for k in ("tasks", "earlier") if k in before}
            versions = _differences(before.get("versions") or {}, now["versions"])
            if versions and self.done:
                kept = {k: before.get(k) for k in ("started", "versions", "python", "commit", "machine")}
                now["earlier"] = [*now.get("earlier", []), kept]
                print(f"{self.folder}: earlier answers were given with other packages ({versions}) and are kept", file=sys.stderr)
        self._replace(path, now)

    def expect(self, tasks: dict[str, dict]) -> None:
        """Say what the tasks about to be answered are; their facts are kept in ``run.json``, beside those of earlier calls.

        tasks: name -> facts (version, data, split, ...). Raises ValueError when the folder holds answers to a task of that name
        with other facts.
        """
        path = self.folder / "run.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        for task, facts in tasks.items():
            said = _differences(told.get("tasks", {}).get(task, facts), facts)
            if said:
                raise ValueError(
                    f"{self.folder} holds answers to another {task} ({said}). Pass another output_dir, or delete the folder; if the "
                    f"same data only moved, delete {task} under tasks in run.json: answers are matched to documents by content"
                )
        if self.path.name == "records.jsonl":  # the first process writes
            self._replace(path, told | {"tasks": told.get("tasks", {}) | tasks})

    def holds(self, key: tuple[str, int, str], generation: dict, content: Callable[[], str]) -> bool:
        """Whether the answer in force to (task, doc_id, question) is one to this content under these arguments.

        content: gives the document's digest; called only when all else is equal.
        """
        record = self.done.get(key)
        return record is not None and record.generation == generation and record.content == content()

    def _replace(self, path: Path, data: dict) -> None:
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(data, indent=1))
        os.replace(draft, path)

    def add(self, record: Record) -> None:
        """Append one line and flush it, so that a cut run loses nothing that was answered. Its ``attempt`` is set here."""
        before = self._latest.get((record.task, record.doc_id))
        if before is not None:
            record = replace(record, attempt=before.attempt + 1)
        try:
            self._file.write(_line(record) + "\n")
            self._file.flush()
        except OSError as error:
            kept = len(self.done)
            raise OSError(
                f"cannot write {self.path}: {error.strerror}. {kept} answers are kept there; free space and rerun"
            ) from error
        self._latest[record.task, record.doc_id] = record
        key = record.task, record.doc_id, record.question
        if record.error is None:
            self.done[key] = record
        else:
            self.done.pop(key, None)

    def finish(self, **more) -> None:
        """Mark the run whole. more: what is known only at the end, such as the number of documents."""
        path = self.folder / "run.json"
        self._replace(path, json.loads(path.read_text()) | {"status": "complete"} | more)

    def close(self) -> None:
        self._file.close()


def _line(record: Record) -> str:
    """A record as JSON, readable; escaped where a text holds half a character (a lone surrogate), which UTF-8 cannot write."""
    fields = asdict(record)
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(fields)
    return line


def read_records(folder: Path, repair: Path | None = None) -> Iterator[Record]:
    """The records of a run, the one in force of each document (its last attempt); an unfinished last line is left out.

    repair: file whose unfinished last line is also cut off, because it is about to be appended to.
    """
    found: dict[tuple, Record] = {}
    for path in sorted(Path(folder).glob("records*.jsonl")):
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if repair == path and len(whole) < len(data):
            with path.open("r+b") as f:
                f.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}); delete that line to go on without its document"
                ) from error
            if fields.get("version") == 1:
                fields = _from_version_1(fields)
            if fields.get("version") != VERSION:
                raise ValueError(
                    f"{path}, line {number} is a record of version {fields.get('version')}; this release reads versions 1 and {VERSION}"
                )
            record = Record(**fields)
            before = found.get((record.task, record.doc_id))
            if before is None or record.attempt >= before.attempt:
                found[record.task, record.doc_id] = record
    yield from found.values()


def _from_version_1(fields: dict) -> dict:
    """The fields of a record of version 1 -> those of version 2. An event ``box`` becomes ``boxes``."""
    events = fields.get("events", [])
    boxes = [[int(side) for side in e["detail"].split(",")] for e in events if e["kind"] == "box"]
    malformed = next((e["detail"] for e in events if e["kind"] == EventKind.MALFORMED_CALL), None)
    kept = [e for e in events if e["kind"] != "box"]
    return fields | {"events": kept, "boxes": boxes, "malformed_call": malformed, "version": VERSION}


def _differences(before: dict, now: dict) -> str:
    """What two dictionaries do not share, in words; empty when they are equal."""
    return "; ".join(
        f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in sorted({*before, *now}) if before.get(k) != now.get(k)
    )
