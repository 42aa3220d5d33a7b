"""Savings of folding: a row of the same pictures of 16 x 16 codes with folds of 1x1, 2x4 and 2x8, forward and backward,
and a picture of 64 x 64 codes drawn with guidance. SynerGen-VL at its tiny size with random weights.

python benchmarks/folding.py [PICTURES]
"""

import sys
from dataclasses import replace

import torch
from common import best, finish

from diptych.core.batch import pack
from diptych.core.losses import combine
from diptych.core.noise import Noise
from diptych.data.worlds import embedded
from diptych.generation.engine import Engine
from diptych.models import store, table
from diptych.parts.images import SizeRule

FOLDS = ((1, 1), (2, 4), (2, 8))
WEIGHTS = {"text": 1.0, "image": 2.0}


def made(fold: tuple[int, int]):
    """The tiny model with this fold; embeddings are such that every fold has the same number of features."""
    config = replace(table.config("synergen/tiny"), draw=SizeRule(longest=256, shortest=32, stride=32))
    model = store.create("synergen", replace(config, fold=fold, embed_size=1024 // (fold[0] * fold[1])))
    model.initialise(0)
    return model


def kept(model, batch) -> float:
    """MiB that one forward keeps for backward, parameters aside."""
    held = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(batch, Noise())
    return sum(n for at, n in held.items() if at not in own) / 2**20


def main() -> None:
    torch.set_num_threads(1)
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    sources = [embedded.source(name) for name in ("shapes/draw", "shapes/ask")]
    samples = [source[i] for i in range(pictures // 2) for source in sources]
    rows = []
    for fold in FOLDS:
        model = made(fold)
        batch = pack([model.lay_out(s) for s in samples], model.routes)
        counts = model.counts(batch)

        def step(model=model, batch=batch, counts=counts) -> None:
            combine(model(batch, Noise()), WEIGHTS, counts).backward()
            model.zero_grad(set_to_none=True)

        seconds, engine = best(step, 3), Engine(model)
        drawing = best(lambda engine=engine: engine.generate("a red circle", size=(256, 256), guidance_scale=2.5), 1, 0)
        width = model.config.decoder.num_key_value_heads * model.config.decoder.width
        cache = 4096 // model.config.codes_per_token * model.config.decoder.num_hidden_layers * 2 * width * 4
        rows.append(
            {
                "fold": f"{fold[0]}x{fold[1]}",
                "tokens a picture": 256 // model.config.codes_per_token,
                "tokens of the row": len(batch),
                "seconds a step": seconds,
                "pictures a second": len(samples) / seconds,
                "MiB kept for backward": kept(model, batch),
                "64x64 codes: tokens": 4096 // model.config.codes_per_token,
                "MiB of cache": cache / 2**20,
                "seconds to draw": drawing,
            }
        )
    finish("folding", rows, pictures=len(samples))


if __name__ == "__main__":
    main()
