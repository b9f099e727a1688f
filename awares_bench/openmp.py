"""How long PyTorch's threads wait for each other awake: OpenMP's barriers spin, and beside other busy processes they spin for cores that
somebody else has. Beside two busy processes on two cores nano is answered several times as fast with a short spin (docs/speed.md has
the figures).

OpenMP reads its variables when PyTorch is loaded, so they must be set before.
"""

from __future__ import annotations

import os
import sys

SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""libgomp (PyTorch's on Linux): turns of a loop, about ten microseconds. On two AVX2 cores 1,000 give 14 % fewer documents a second than
10,000 when nothing runs beside them, and 1.6 times as many beside busy processes (docs/speed.md). libomp and Intel's: milliseconds; 200 are its default."""

OF_THE_USER = (*SHORT_SPIN, "OMP_WAIT_POLICY")
"""Whoever sets one of these has chosen."""

TOO_LATE = "AWARES_BENCH_OPENMP_TOO_LATE"
"""Holds the number of a process in which PyTorch was loaded first."""

SLOW_BESIDE_OTHERS = (
    "this machine is busy, and PyTorch's threads spin for its cores; start lmms-eval with "
    f"GOMP_SPINCOUNT={SHORT_SPIN['GOMP_SPINCOUNT']} (docs/speed.md), or run the same by awares-bench run, which sets it"
)
"""For a process that loaded PyTorch before it could be told."""


def set_short_spin() -> bool:
    """Let threads sleep soon at barriers, in this process and those that it starts -> whether this process will.

    Nothing is changed where the user has chosen a policy. False where PyTorch was loaded before, so that only processes started
    from here will.
    """
    if not any(os.environ.get(name) for name in OF_THE_USER):
        os.environ.update(SHORT_SPIN)
        if "torch" in sys.modules:
            os.environ[TOO_LATE] = str(os.getpid())
    return os.environ.get(TOO_LATE) != str(os.getpid())
