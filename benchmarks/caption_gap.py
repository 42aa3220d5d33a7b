"""How much a caption helps a model to draw: the image loss with another picture's caption minus that with its own.

Both losses use the same pictures, noise and times. Only times above 0.6 count (1 is noise): there the layout and the
colours are decided. The gap is a graded measure: it leaves zero long before a strict judge accepts a drawing. A model
that ignores its prompt scores 0, the chance level; there is no upper bound.

    python benchmarks/caption_gap.py [bagel/tiny cheers/tiny] [--data shapes/draw emoji/scenes] [--pictures 512]
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from common import finish

from diptych.core.batch import pack
from diptych.core.noise import Noise
from diptych.core.sample import Sample
from diptych.data.worlds.embedded import source
from diptych.models import store
from diptych.models.predictions import FlowPrediction

LATE = 0.6


@torch.no_grad()
def errors(model, samples: list[Sample], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean squared error and the time of every sample's picture. Noise and times belong to the sample's id."""
    batch = pack([model.lay_out(s) for s in samples], model.routes)
    error, times = np.full(len(samples), np.nan), np.full(len(samples), np.nan)
    for part in model.predict(batch, Noise(seed))["image"]:
        if not isinstance(part, FlowPrediction):
            raise ValueError(f"{model.family} draws token by token; the gap needs a family that draws by flow matching")
        rows = part.document.numpy()
        error[rows], times[rows] = part.error().mean(1).numpy(), part.target.times.numpy()
    return error, times


def gap(model, name: str, pictures: int, seed: int, batch: int = 32) -> dict:
    """The gap over ``pictures`` samples of the test split whose time is above ``LATE``, with its 95 % interval."""
    data, own, other, start = source(name, "test", seed=seed), [], [], 0
    while len(own) < pictures:
        samples = [data[i] for i in range(start, start + batch)]
        shuffled = [replace(s, messages=(samples[i - 1].messages[0], *s.messages[1:])) for i, s in enumerate(samples)]
        (right, times), (wrong, _) = errors(model, samples, seed), errors(model, shuffled, seed)
        own, other, start = [*own, *right[times > LATE]], [*other, *wrong[times > LATE]], start + batch
    difference = np.array(other) - np.array(own)
    half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    mean = float(difference.mean())
    row = {"data": name, "pictures": len(difference), "loss": float(np.mean(own)), "gap": mean}
    return row | {"low": mean - half, "high": mean + half}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["bagel/tiny"])
    parser.add_argument("--data", nargs="+", default=["shapes/draw", "emoji/scenes"])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        loaded = store.load(name).eval()
        rows += [{"model": name} | gap(loaded, data, args.pictures, args.seed) for data in args.data]
    finish("caption_gap", rows)
