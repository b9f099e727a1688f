"""What a device can do: matrix products, memory, transfers, and how long a small operation takes to start."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from awares_bench.inference.varlen_batch import products


def seconds_of(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Median seconds of a call, after one that does not count."""
    times = []
    for n in range(-1, repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        if n >= 0:
            times.append(time.perf_counter() - start)
    return median(times)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul(device: str, size: int, dtype: torch.dtype) -> float:
    """Operations per second of a (size, size) by (size, size) product of random numbers; float32 without TF32."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return 2 * size**3 / seconds_of(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rates(device: str, size: int, copied: int) -> dict:
    """Operations and bytes per second, and what the device is. size: of the matrices; copied: bytes of each copy."""
    out: dict = {name: matmul(device, size, getattr(torch, name)) for name in ("bfloat16", "float32")}
    there = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
    here, other = there.cpu(), torch.empty_like(there)
    few = torch.zeros(8, device=device)
    result: dict = {
        "matmul_flops": out,
        "memory_bytes": 2 * copied / seconds_of(lambda: other.copy_(there), device),
        "small_operation_seconds": seconds_of(lambda: [few.add_(1) for _ in range(100)], device) / 100,
    }
    if device.startswith("cuda"):
        pinned, properties = here.pin_memory(), torch.cuda.get_device_properties(device)
        result |= {
            "to_device_bytes": {
                "pageable": copied / seconds_of(lambda: there.copy_(here), device, 3),
                "pinned": copied / seconds_of(lambda: there.copy_(pinned, non_blocking=True), device, 3),
            },
            "from_device_bytes": copied / seconds_of(lambda: pinned.copy_(there, non_blocking=True), device, 3),
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    length = 2048 if device.startswith("cuda") else 128
    result |= {"attention_tokens": length, "attention": attention(device, length)}
    return result | {"step_attention": [step_attention(device, batch, keys) for batch, keys in STEPS[device.startswith("cuda")]]}


STEPS = {True: ((1, 1300), (1, 4900), (16, 1300), (64, 1300)), False: ((1, 64), (2, 64))}
"""Rows and keys of a decoding step that are timed, on a GPU and in a rehearsal."""


def step_attention(device: str, batch: int, keys: int, heads: int = 16, groups: int = 2, width: int = 128) -> dict[str, float]:
    """Seconds of a decoding step's attention at the heads of 3B, fused and by products."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    q = torch.randn(batch, groups, heads // groups, width, device=device).to(dtype)
    k, v = torch.randn(2, batch, groups, keys, width, device=device).to(dtype)
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device)
    out = {"batch": batch, "keys": keys, "fused": seconds_of(lambda: scaled_dot_product_attention(q, k, v, mask), device)}
    return out | {"products": seconds_of(lambda: products(q, k, v, mask), device)}


def attention(device: str, length: int, heads: int = 16, groups: int = 2, width: int = 128) -> dict[str, float | str]:
    """Seconds of causal attention over a prompt of ``length`` tokens at the heads of 3B, by each of PyTorch's kernels; in words where one
    refuses."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    q, k, v = (torch.randn(1, h, length, width, device=device).to(dtype) for h in (heads, groups, groups))
    out: dict[str, float | str] = {}

    def call() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                out[backend.name.lower()] = seconds_of(call, device, 5)
        except RuntimeError as error:
            out[backend.name.lower()] = str(error).splitlines()[0][:200]
    return out
