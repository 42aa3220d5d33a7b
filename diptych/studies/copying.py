"""Does a model copy a picture that it is asked to draw again? The identity shortcut that masking is against (IOMM,
arXiv 2603.16139, 3.4; specs: IOMM 7.3, E10)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import PIL.Image
import torch

from diptych.core.layout import Kind
from diptych.core.sample import Image, Sample, user
from diptych.data.worlds.embedded import source
from diptych.generation.engine import Engine


def copying(engine: Engine, n: int = 24, seeds: Sequence[int] = (0, 1, 2), data: str = "images") -> dict[str, float]:
    """How ``n`` test pictures come back when nothing of them is masked, over several seeds.

    ``psnr`` (dB) of pixels and ``cosine`` of the reader's features (where the family has an encoder ``vision``) say how
    much is copied; ``diversity`` is the root mean square difference of two seeds' pictures, of 255 levels."""
    size = engine.model.config.size
    pictures = [i.pixels.resize(size) for k in range(n) for i in source(data, "test", size[0])[k].images()]
    drawn = [
        [d.image for d in engine.draw([_again(k, p) for k, p in enumerate(pictures)], [seed] * n, size)]
        for seed in seeds
    ]
    errors = [_error(a, b) for one in drawn for a, b in zip(one, pictures, strict=True)]
    apart = [_error(a, b) for x, y in combinations(drawn, 2) for a, b in zip(x, y, strict=True)]
    told = {
        "psnr": float(np.mean([20 * np.log10(255 / max(e, 0.5)) for e in errors])),
        "diversity": float(np.mean(apart)) if apart else float("nan"),
    }
    if "vision" in engine.model.encoders:
        features = _features(engine, pictures)
        same = [torch.cosine_similarity(_features(engine, one).flatten(1), features.flatten(1)) for one in drawn]
        told["cosine"] = float(torch.cat(same).mean())
    return told


def _again(number: int, picture: PIL.Image.Image) -> Sample:
    return Sample(f"copy/{number}", (user(Image(picture)),))


def _features(engine: Engine, pictures: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """What the reader makes of pictures, as its layout shows them to it."""
    laid = [engine.model.lay_out(_again(0, picture)) for picture in pictures]
    shown = [next(s.image for s in x.segments if s.kind == Kind.VISION) for x in laid]
    return engine.model.encode("vision", torch.stack(shown).to(engine.model.device))


def _error(a: PIL.Image.Image, b: PIL.Image.Image) -> float:
    difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
    return float(np.sqrt((difference**2).mean()))
