"""Kills one of several processes at random moments, starts again, and ends where the undisturbed run ends, bit for bit.

python benchmarks/faults.py --kills 10 --processes 2 [--shard full] [--steps 40]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from diptych import recipes
from diptych.training.recipe import Engine, Recipe


def start(recipe: Path, run: Path, processes: int, verb: str) -> list[subprocess.Popen]:
    """The run (or its resumption) on so many processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    what = ["train", recipe, "--out", run] if verb == "train" else ["resume", run]
    command = [sys.executable, "-m", "diptych", *map(str, what), "--device", "cpu"]
    env = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, env=env | {"RANK": str(r)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for r in range(processes)
    ]


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def end(running: list[subprocess.Popen]) -> None:
    """Ends what is left of a run whose process was killed, as a launcher does."""
    for p in running:
        p.kill()
    for p in running:
        p.wait()


def survive(recipe: Recipe, folder: Path, kills: int, processes: int, seed: int, patience: float = 600.0) -> list[dict]:
    """Runs the recipe to its end through ``kills`` kills of one process each; returns when and whom."""
    file, run, draw = folder / "recipe.json", folder / "killed", random.Random(seed)
    file.write_text(recipe.to_json())
    told: list[dict] = []
    while True:
        verb = "resume" if (run / "recipe.json").is_file() else "train"
        running, since = start(file, run, processes, verb), time.monotonic()
        left = recipe.steps - steps_done(run)
        goal = (
            steps_done(run) + draw.randint(1, max(1, left // (kills - len(told) + 1))) if len(told) < kills else 10**9
        )
        while steps_done(run) < goal and all(p.poll() is None for p in running):
            assert time.monotonic() - since < patience, "the run does not move"
            time.sleep(0.02)
        if goal == 10**9:
            codes = [p.wait(timeout=patience) for p in running]
            assert codes == [0] * processes, codes
            return told
        victim = draw.randrange(processes)
        time.sleep(draw.random() * 0.2)  # anywhere in a step or a save
        running[victim].kill()
        end(running)
        told.append({"step": steps_done(run), "victim": victim})


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same losses and the same bytes."""
    rows = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    keys = [k for k in rows[0][0] if k.startswith(("step", "loss", "count", "gradient_norm", "lr"))]
    losses = [[[row[k] for k in keys] for row in some] for some in rows]
    weights = [(run / "release" / "model.safetensors").read_bytes() for run in (a, b)]
    return losses[0] == losses[1] and weights[0] == weights[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bagel/tiny")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shard", choices=["none", "full"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    recipe = recipes.find(a.recipe).with_steps(a.steps)
    recipe = replace(recipe, checkpoint_every=3, workers=0, engine=Engine(shard=a.shard))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "whole.json").write_text(recipe.to_json())
        for p in start(folder / "whole.json", folder / "whole", a.processes, "train"):
            assert p.wait() == 0
        told = survive(recipe, folder, a.kills, a.processes, a.seed)
        equal = same(folder / "whole", folder / "killed")
    for row in told:
        print(f"killed process {row['victim']} after step {row['step']}")
    print("bit-identical" if equal else "DIFFERENT")
    print(
        json.dumps({"benchmark": "faults", "kills": len(told), "processes": a.processes, "equal": equal, "rows": told})
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
