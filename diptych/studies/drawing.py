"""What drawing costs and how well it is predicted: numbers that tell arms of a study apart before pictures do."""

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
    """``image loss`` of ``n`` test pictures with the same noise and times whatever the model, ``tokens`` that the
    decoder reads of one picture, ``seconds`` that one takes (the fastest of three), ``parameters`` in millions."""
    model, size = engine.model, min(engine.model.config.size)
    samples = source(data, "test", size)
    laid = [model.lay_out(samples[k]) for k in range(n)]
    batch = pack(laid, model.routes).to(model.device)
    with torch.inference_mode():
        term = model.losses(batch, Noise())["image"]
    tokens = next(s.open for s in laid[0].segments if s.kind in (Kind.NOISED, Kind.CODES))
    seconds = []
    for seed in range(3):
        start = time.perf_counter()
        engine.draw([Sample("a red circle", (user("a red circle"),))], [seed])
        seconds.append(time.perf_counter() - start)
    return {
        "image loss": float(term.sum) / term.count,
        "tokens": float(tokens),
        "seconds": min(seconds),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }
