"""The lines that start several processes, exactly as the documents print them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_torchrun_trains_on_two_processes(tmp_path):
    """``torchrun --nproc-per-node 2 -m diptych train bagel/tiny --out DIR --steps 4``: torchrun itself reads the line
    too, and an option of ours that begins like two of its own is an error there."""
    folder = tmp_path / "two"
    line = f"torchrun --nproc-per-node 2 -m diptych train bagel/tiny --out {folder} --steps 4"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"done: {folder / 'release'}") == 1  # one of the processes speaks
    assert (folder / "release" / "model.safetensors").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
