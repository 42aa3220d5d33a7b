"""Steps of IOMM's first stage that encode their pictures, beside steps on what ``diptych data precompute`` kept.

In turns, so that both see the same machine; seconds are the median step's.

    python benchmarks/encoded.py [--steps 8] [--rows 300] [--turns 2]
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import finish

from diptych import recipes
from diptych.recipes.run import precompute, stage_sources
from diptych.training import loop
from diptych.training.log import read_metrics
from diptych.training.recipe import Recipe


def seconds(recipe: Recipe, folder: Path) -> list[float]:
    """Seconds of every step but the first two."""
    loop.train(recipe, folder, stage_sources, show=False)
    return [row["seconds"] for row in read_metrics(folder)[2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    found = recipes.find("iomm/tiny")
    stage = replace(found.stages[0], steps=args.steps + 2)
    fresh = replace(found, stages=(stage,), init={"autoencoder": "autoencoder/tiny"}, checkpoint_every=10**9)
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        made = precompute(fresh, Path(place) / "encoded", limit=args.rows)["images"]
        once = time.perf_counter() - start
        arms = {"pictures": fresh, "encoded once": replace(fresh, encoded=str(Path(place) / "encoded"))}
        taken: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(args.turns):
            for arm, recipe in arms.items():
                taken[arm] += seconds(recipe, Path(place) / f"{arm}-{turn}")
    middle = {arm: statistics.median(of) for arm, of in taken.items()}
    rows = [{"arm": a, "seconds a step": s, "times faster": middle["pictures"] / s} for a, s in middle.items()]
    finish("encoded", rows, seconds_to_encode=once, pictures=made["pictures"], bytes=made["bytes"])


if __name__ == "__main__":
    main()
