"""Where numbers come from: the time, the command, package versions, the commit, the machine, and a checkpoint's fingerprint."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from .doctor import installed


def provenance() -> dict:
    """When, with what and on what: time, command, package versions, commit of a checkout, hardware."""
    packages = ("awares-bench", "lmms-eval", "torch", "transformers", "datasets", "pillow", "numpy")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": installed(packages),
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
    }


def _commit() -> dict | None:
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        state = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here), "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"head": head.stdout.strip(), "dirty": bool(state.stdout.strip())} if head.returncode == 0 else None


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def fingerprint(folder: Path) -> str:
    """A short hash of the files of a checkpoint folder: names, sizes, and the content of all that is small."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        if path.stat().st_size < 16 * 2**20:
            digest.update(path.read_bytes())
        else:
            with path.open("rb") as f:
                digest.update(f.read(2**20))
    return digest.hexdigest()[:16]
