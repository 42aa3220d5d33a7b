"""Which device to use, and how fast its matrix products are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch


def matmul_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    n: int = 768,
    seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The best rate of an n x n matrix product, in GFLOP/s: the peak that utilisation is measured against. ``clock``
    says what a second is."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best, end = 0.0, clock() + seconds
    while clock() < end or not best:
        start = clock()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / max(clock() - start, 1e-9) / 1e9)
    return best


BF16_GAIN = 1.5  # products must be this much faster in bf16 to pay for the casts around them


@lru_cache
def fastest_precision(device: str = "cpu") -> Literal["bf16", "fp32"]:
    """The precision in which training is faster on a device. GPUs have units for bfloat16 or not; on a processor the
    rates of matrix products are measured, in processor seconds, so that other work there does not change the choice."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device != "cpu":
        return "fp32"
    rates = [matmul_rate(dtype, n=256, clock=time.process_time) for dtype in (torch.bfloat16, torch.float32)]
    return "bf16" if rates[0] > BF16_GAIN * rates[1] else "fp32"


def pick_device(device: str) -> str:
    """The device to use: ``auto`` is a GPU when there is one. Raises ``ValueError`` for one that is not there."""
    there = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if device == "auto":
        return "cuda" if "cuda" in there else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {device!r}; choose from auto, cpu, cuda, mps")
    if kind not in there:
        raise ValueError(f"device {device!r} is not there; this machine has {', '.join(there)}")
    return device


def host_memory() -> int:
    """Bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
