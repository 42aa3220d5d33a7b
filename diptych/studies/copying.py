"""Whether a model copies a picture that it is asked to draw again.

Masking of the picture's tokens is meant to prevent this shortcut (IOMM, arXiv 2603.16139, section 3.4).
"""

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
    """How alike ``n`` test pictures come back where none of their tokens is masked, means over several seeds.

    ``psnr``       of the pixels against the original, in dB
    ``cosine``     of the reader's features against the original's, where the family has an encoder ``vision``
    ``diversity``  root mean square difference of the pictures of two seeds, in levels of 255; NaN for one seed
    """
    size = engine.model.config.size
    test = source(data, "test", size[0])
    originals = [image.pixels.resize(size) for k in range(n) for image in test[k].images()]
    requests = [_again(k, picture) for k, picture in enumerate(originals)]
    drawn = [[d.image for d in engine.draw(requests, [seed] * n, size)] for seed in seeds]
    errors = [_rms(a, b) for pictures in drawn for a, b in zip(pictures, originals, strict=True)]
    apart = [_rms(a, b) for one, other in combinations(drawn, 2) for a, b in zip(one, other, strict=True)]
    measures = {
        "psnr": float(np.mean([20 * np.log10(255 / max(error, 0.5)) for error in errors])),
        "diversity": float(np.mean(apart)) if apart else float("nan"),
    }
    if "vision" in engine.model.encoders:
        target = _features(engine, originals).flatten(1)
        alike = [torch.cosine_similarity(_features(engine, pictures).flatten(1), target) for pictures in drawn]
        measures["cosine"] = float(torch.cat(alike).mean())
    return measures


def _again(number: int, picture: PIL.Image.Image) -> Sample:
    """The request to draw a picture that is shown."""
    return Sample(f"copy/{number}", (user(Image(picture)),))


def _features(engine: Engine, pictures: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """(N, …) the reader's features of pictures, as its layout shows them to it."""
    layouts = [engine.model.lay_out(_again(0, picture)) for picture in pictures]
    shown = [
        next(s.image for s in layout.segments if s.kind == Kind.VISION and s.image is not None) for layout in layouts
    ]
    return engine.model.encode("vision", torch.stack(shown).to(engine.model.device))


def _rms(a: PIL.Image.Image, b: PIL.Image.Image) -> float:
    """Root mean square difference of two pictures, in levels of 255."""
    difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
    return float(np.sqrt((difference**2).mean()))
