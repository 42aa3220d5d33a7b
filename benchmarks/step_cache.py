"""What OmniGen2's step cache costs and saves: the same requests and seeds with and without it.

python benchmarks/step_cache.py FOLDER
python benchmarks/step_cache.py FOLDER --steps 50 --pictures 16
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
from common import finish

from diptych.core.sample import Sample, user
from diptych.generation.engine import load
from diptych.recipes.run import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--pictures", type=int, default=8)
    args = parser.parse_args()
    engine = load(args.model)
    samples = [Sample(str(i), (user(PROMPTS[i % len(PROMPTS)]),)) for i in range(args.pictures)]
    pictures, rows = {}, []
    for cache in ("none", "taylor"):
        settings = replace(engine.model.settings, num_inference_steps=args.steps, cache=cache)
        started = time.process_time()
        drawn = engine.draw(samples, list(range(args.pictures)), settings=settings)
        seconds = time.process_time() - started
        pictures[cache] = np.stack([np.asarray(d.image, float) for d in drawn])
        error = np.square(pictures["none"] - pictures[cache]).mean((1, 2, 3))
        with np.errstate(divide="ignore"):
            psnr = 10 * np.log10(255**2 / error)  # inf where nothing differs
        runs = sum(settings.computed(i, args.steps) for i in range(args.steps))
        row = {"cache": cache, "runs of the network": runs, "processor seconds": seconds}
        rows.append(row | {"mean PSNR (dB)": float(psnr.mean()), "least PSNR (dB)": float(psnr.min())})
    finish("step_cache", rows, model=args.model, steps=args.steps, pictures=args.pictures)


if __name__ == "__main__":
    main()
