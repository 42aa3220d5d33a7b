"""What this machine can do, measured rather than assumed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from diptych.machine import extras
from diptych.machine.devices import fastest_precision, host_memory, matmul_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def report() -> dict[str, str]:
    """Findings by name, in the order they are shown."""
    findings = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()} (set OMP_NUM_THREADS to change it)",
        "memory": f"{host_memory() / 2**30:.1f} GiB",
        "disk free": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
        **rates("cpu", 256),
        "precision auto": f"trains in {fastest_precision('cpu')} on this processor",
        "cuda": ", ".join(gpus()) or "none",
    }
    if torch.cuda.is_available():
        findings |= rates("cuda", 4096)
    findings["mps"] = "yes" if torch.backends.mps.is_available() else "no"
    findings["attention"] = (
        f"SDPA; FlexAttention {'for training' if torch.cuda.is_available() else 'trains on GPUs only'}"
    )
    return findings | {f"extra {extra}": extras.state(extra, packages) for extra, packages in extras.declared().items()}


def rates(device: str, n: int) -> dict[str, str]:
    """The measured rate of an n x n matrix product in each dtype."""
    measured = {name: matmul_rate(dtype, device, n) for name, dtype in DTYPES.items()}
    where = "" if device == "cpu" else f"{device} "
    return {
        f"{where}{name} matrix product": f"{rate:.0f} GFLOP/s"
        + (f" (slower than fp32: do not train in {name} here)" if rate < measured["fp32"] else "")
        for name, rate in measured.items()
    }


def gpus() -> Iterator[str]:
    """Name and memory of every GPU that CUDA offers."""
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def environment() -> dict[str, str]:
    """What a score may depend on besides the recipe: versions, processor and git state."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = "not a git checkout"
    packages = {name: version(name) for name in ("diptych", "torch", "numpy", "tokenizers", "safetensors")}
    return {"python": platform.python_version(), "machine": platform.machine(), "git": git, **packages}
