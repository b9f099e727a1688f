"""Who works on which cell of a sweep that several workers share, on one machine or on many: files in a folder that all of them see.

A claim is a file ``CELL.N``, made so that only one worker can make it (``O_EXCL``, atomic on NFS too). Its owner touches it all the time; one
that has not been touched for a while belongs to a worker that is dead, and whoever makes ``CELL.N+1`` takes the cell over. The highest number
is in force, so nothing is ever renamed or removed, and of two workers that see a dead one a single one wins.
"""

from __future__ import annotations

import _thread
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STALE_SECONDS = 120.0
"""After so long without a touch a claim is of a dead worker. File systems that many machines share show a touch up to a minute late."""


class TakenOver(RuntimeError):
    """Another worker has taken the cell: this one did not touch its claim for too long."""


@dataclass(frozen=True)
class Claim:
    """The claim in force on a cell."""

    path: Path
    number: int
    owner: dict
    """host, pid, since; and status and seconds once it has ended. Empty while it is being written."""
    touched: float
    """When its worker last said that it lives, by the clock of the file system."""
    now: float
    """The time by the same clock."""

    @property
    def ended(self) -> bool:
        return "status" in self.owner

    def is_dead(self, stale: float) -> bool:
        """Whether its worker is gone: it stopped touching the claim, or was of this machine and is no process any more."""
        if self.ended:
            return False
        return self.now - self.touched > stale or (self.owner.get("host") == _host() and not _alive(self.owner.get("pid", 0)))


class Claims:
    """The claims on the cells of a sweep, as one worker sees them.

    folder: shared by all workers. stale: seconds after which an untouched claim is of a dead worker.
    """

    def __init__(self, folder: Path, stale: float = STALE_SECONDS):
        self.folder, self.stale = Path(folder), stale
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = self.now()

    def on(self, cell: str) -> Claim | None:
        """The claim in force; None where nobody has claimed the cell."""
        numbers = [int(m[1]) for p in self.folder.iterdir() if (m := re.fullmatch(re.escape(cell) + r"\.(\d+)", p.name))]
        if not numbers:
            return None
        path = self.folder / f"{cell}.{max(numbers)}"
        try:
            touched, text = path.stat().st_mtime, path.read_text()
            owner = json.loads(text) if text else {}
        except (OSError, ValueError):  # being written this moment
            touched, owner = self.now(), {}
        return Claim(path, max(numbers), owner, touched, self.now())

    def may_take(self, claim: Claim | None) -> bool:
        """Whether a cell is free: never claimed, left by a dead worker, or ended before this worker began, which then tries again."""
        if claim is None or claim.is_dead(self.stale):
            return True
        return claim.ended and claim.owner["ended"] < self.began

    def take(self, cell: str, before: Claim | None) -> Path | None:
        """Claim a cell after the claim that was in force -> the claim's file; None when another worker was first."""
        path = self.folder / f"{cell}.{before.number + 1 if before else 1}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return None
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(_me()))
        return path

    @contextmanager
    def held(self, cell: str, path: Path) -> Iterator[None]:
        """Keep a claim alive within the block. Raises TakenOver in the block's thread, the main one, when another has taken the cell."""
        end, lost = threading.Event(), threading.Event()
        taken = f"another worker has taken {cell} over: its claim was not touched for {self.stale:g} s"

        def touch() -> None:
            while not end.wait(min(20.0, self.stale / 4)):
                with suppress(OSError):  # a file system that is away for a moment
                    os.utime(path)
                    claim = self.on(cell)
                    if claim and claim.path != path:
                        lost.set()
                        _thread.interrupt_main()
                        return

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
            if lost.is_set():  # a job in the background may ignore interrupts: then it is told at the end
                raise TakenOver(taken)
        except KeyboardInterrupt:
            if lost.is_set():
                raise TakenOver(taken) from None
            raise
        finally:
            end.set()
            thread.join()

    def end(self, path: Path, status: str, seconds: float, error: str | None = None) -> None:
        """Say how a claimed cell ended."""
        draft = path.parent / f".{path.name}.tmp"
        more = {"status": status, "seconds": round(seconds, 1), "ended": self.now(), **({"error": error} if error else {})}
        draft.write_text(json.dumps(_me() | more))
        os.replace(draft, path)

    def now(self) -> float:
        """The time by the clock of the file system, which is that of all workers."""
        path = self.folder / f".clock-{socket.gethostname()}-{os.getpid()}"
        try:
            path.touch()
            os.utime(path)
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)


def _host() -> str:
    """This machine, and where processes have numbers of their own there, which of these."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _me() -> dict:
    return {"host": _host(), "pid": os.getpid(), "since": time.time()}


def _alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0
