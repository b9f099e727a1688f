"""Peak memory: of tensors on a GPU; on a CPU of the whole process, which Linux counts and lets one count anew."""

from __future__ import annotations

from pathlib import Path

import torch


def start_peak(device: torch.device) -> bool:
    """Count the peak from here on -> whether that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a sandbox
        return False
    return True


def peak(device: torch.device) -> int:
    """Most bytes in use since ``start_peak`` returned true."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_status("VmHWM")


def process_status(name: str) -> int:
    """Bytes that Linux states of this process under ``name``, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
