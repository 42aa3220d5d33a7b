"""What drawing costs, and how well it is predicted: these numbers separate the arms of a study before pictures do."""

from __future__ import annotations

import time

import torch

from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.noise import Noise
from diptych.core.sample import Sample, user
from diptych.data.worlds.embedded import source
from diptych.generation.engine import Engine


def drawing(engine: Engine, n: int = 96, data: str = "shapes/draw") -> dict[str, float]:
    """Measurements of the model as it draws.

    ``image loss``  on ``n`` test pictures, with the same noise and times for every model
    ``tokens``      that the decoder reads of one picture
    ``seconds``     that one picture takes, the fastest of three
    ``parameters``  in millions
    """
    model, side = engine.model, min(engine.model.config.size)
    samples = source(data, "test", side)
    layouts = [model.lay_out(samples[k]) for k in range(n)]
    batch = pack(layouts, model.routes).to(model.device)
    with torch.inference_mode():
        loss = model.losses(batch, Noise())["image"]
    tokens = next(s.open for s in layouts[0].segments if s.kind in (Kind.NOISED, Kind.CODES))
    seconds = []
    for seed in range(3):
        start = time.perf_counter()
        engine.draw([Sample("a red circle", (user("a red circle"),))], [seed])
        seconds.append(time.perf_counter() - start)
    return {
        "image loss": float(loss.sum) / loss.count,
        "tokens": float(tokens),
        "seconds": min(seconds),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }
