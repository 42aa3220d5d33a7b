"""What this machine can do, measured rather than assumed."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from importlib.metadata import version

import torch

EXTRAS = {
    "hf": ("transformers", "diffusers", "accelerate"),
    "data": ("pyarrow",),
    "track": ("tensorboard",),
}


def matmul_rate(dtype: torch.dtype, device: str = "cpu", n: int = 768, seconds: float = 0.3) -> float:
    """The best rate of an n x n matrix product, in GFLOP/s: the peak that utilisation is measured against."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def report() -> dict[str, str]:
    """Findings by name, in the order they are shown."""
    fp32, bf16 = matmul_rate(torch.float32), matmul_rate(torch.bfloat16, n=256)
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "fp32 matrix product": f"{fp32:.0f} GFLOP/s",
        "bf16 matrix product": f"{bf16:.0f} GFLOP/s" + ("" if bf16 > fp32 else " (no bf16 units: train in fp32)"),
        "cuda": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "mps": "yes" if torch.backends.mps.is_available() else "no",
        "attention": f"SDPA; FlexAttention {'for training' if torch.cuda.is_available() else 'trains on GPUs only'}",
        "disk free": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
    }  # fmt: skip
    for extra, packages in EXTRAS.items():
        have = [f"{p} {version(p)}" for p in packages if importlib.util.find_spec(p)]
        missing = [p for p in packages if not importlib.util.find_spec(p)]
        hint = f"missing {', '.join(missing)}: pip install 'diptych[{extra}]'" if missing else ""
        found[f"extra {extra}"] = "; ".join(filter(None, [", ".join(have), hint]))
    return found
