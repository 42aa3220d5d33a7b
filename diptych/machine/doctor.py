"""What this machine can do, measured rather than assumed."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from diptych.machine.devices import matmul_rate

EXTRAS = {
    "hf": ("transformers", "diffusers", "accelerate"),
    "data": ("pyarrow",),
    "track": ("tensorboard",),
}


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


def environment() -> dict[str, str]:
    """What a score may depend on besides the recipe: versions, processor, git state."""
    from importlib.metadata import version

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
