"""Several processes against one over 20 steps: differences of losses and parameters, for every way to shard.

    python benchmarks/equal.py [--families bagel] [--steps 20]

The recipes are the smallest of every family (tests/support/tiny.py). A step has four rows, whatever the number of
processes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import finish
from faults import start
from safetensors.torch import load_file

from diptych.training.log import read_metrics
from diptych.training.recipe import EngineConfig, Limits
from tests.support import tiny
from tests.training.test_parallel import recipe

ARMS = {
    "2 processes": (2, EngineConfig()),
    "4 processes": (4, EngineConfig()),
    "2 shards": (2, EngineConfig(shard="full")),
    "4 shards": (4, EngineConfig(shard="full")),
    "4 shards, recomputed": (4, EngineConfig(shard="full", recompute="full")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(tiny.FAMILIES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    a = parser.parse_args()
    rows = []
    for family in a.families:
        limits = Limits(tokens=192, pictures=16, rows=4)
        base = recipe(family, steps=a.steps, limits=limits, checkpoint_every=10**6)
        with tempfile.TemporaryDirectory() as name:
            one = run(base, Path(name) / "one", 1)
            for arm in a.arms:
                n, engine = ARMS[arm]
                losses, weights = run(replace(base, engine=engine), Path(name) / arm.replace(" ", "-"), n)
                rows.append(
                    {
                        "family": family,
                        "arm": arm,
                        "losses apart": max(
                            abs(x - y) / max(abs(x), 1e-9) for x, y in zip(one[0], losses, strict=True)
                        ),
                        "parameters apart": max(float((one[1][k] - w).abs().max()) for k, w in weights.items()),
                    }
                )
    finish("equal", rows, steps=a.steps)


def run(recipe, folder: Path, processes: int) -> tuple[list[float], dict]:
    """The losses of a run and the weights it ends with."""
    file = folder.with_suffix(".json")
    file.write_text(recipe.to_json())
    codes = [p.wait() for p in start(file, folder, processes, "train")]
    assert codes == [0] * processes, (folder.name, codes)
    losses = [row["loss"] for row in read_metrics(folder)]
    return losses, load_file(folder / "release" / "model.safetensors")


if __name__ == "__main__":
    main()
