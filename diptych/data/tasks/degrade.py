"""How a photo is spoilt for the restoration tasks, and the edge operator (parameters: SGT's published task ladder).

Every function takes (h, w, 3) uint8 pixels and a generator and returns pixels of the same shape. Lengths in pixels are
those of a picture with a long side of 320 or more; in a smaller one they shrink in proportion.
"""

from __future__ import annotations

import io
from math import cos, radians, sin

import numpy as np
import PIL.Image
import PIL.ImageDraw

from diptych.data.canvas import pick, picture, rgb

FULL = 320  # long side from which on lengths count as they are


def noisy(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A subset, in any order, of Gaussian noise, JPEG, Poisson and salt and pepper; never none: then it is Gaussian."""
    chosen = [spoil for spoil, share in _NOISES if rng.random() < share] or [_gaussian]
    for i in rng.permutation(len(chosen)):
        photo = chosen[i](photo, rng)
    return photo


def blurred(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Motion blur: a line of 10, 20 or 30 pixels at a random angle, borders reflected."""
    length = _length(pick(rng, (10, 20, 30)), photo)
    return _bytes(smear(photo / 255, length, rng.uniform(0, 180)))


def rainy(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rain or fog, each half of the time, at strength 0.4, 0.6 or 0.8."""
    weather, strength = pick(rng, (_rain, _fog)), pick(rng, (0.4, 0.6, 0.8))
    return _bytes(weather(photo / 255, rng, strength))


def dark(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Too little light: a gain of 0.1 to 0.5, then Gaussian noise of 0.01 to 0.04 of the range."""
    dimmed = photo / 255 * rng.uniform(0.1, 0.5)
    return _bytes(dimmed + rng.normal(0, rng.uniform(0.01, 0.04), photo.shape))


def coarse(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bicubic down and up again by 2, 4, 6 or 8."""
    image, factor = picture(photo), pick(rng, (2, 4, 6, 8))
    small = (max(1, image.width // factor), max(1, image.height // factor))
    return rgb(image.resize(small, PIL.Image.Resampling.BICUBIC).resize(image.size, PIL.Image.Resampling.BICUBIC))


def covered(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strokes, and with probability 0.3 + 0.5 i boxes, in white or black; i is 0.3, 0.5, 0.6 or 0.8."""
    image, intensity = picture(photo), pick(rng, (0.3, 0.5, 0.6, 0.8))
    draw, colour, sides = PIL.ImageDraw.Draw(image), pick(rng, ("white", "black")), np.array(image.size)
    for _ in range(1 + round(5 * intensity)):
        points = rng.uniform(0, 1, (4, 2)) * sides
        width = max(1, round(rng.uniform(0.03, 0.08) * sides.min()))
        draw.line([tuple(p) for p in points.tolist()], colour, width, joint="curve")
    if rng.random() < 0.3 + 0.5 * intensity:
        for _ in range(int(rng.integers(1, 4))):
            corner, extent = rng.uniform(0, 0.8, 2) * sides, rng.uniform(0.1, 0.4, 2) * sides
            draw.rectangle([*corner.tolist(), *(corner + extent).tolist()], colour)
    return rgb(image)


def edges(photo: np.ndarray) -> np.ndarray:
    """(h, w) uint8 edge strength: the Sobel gradient's length, the largest of the three channels, borders repeated.

    A straight step by half the range or more gives 255.
    """
    p = np.pad(photo.astype(np.float32), ((1, 1), (1, 1), (0, 0)), "edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]
    columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    strength = np.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]).max(-1) / 2
    return strength.round().clip(0, 255).astype(np.uint8)


def smear(photo: np.ndarray, length: int, degrees: float) -> np.ndarray:
    """The mean of an (h, w, c) array along a centred line of ``length`` pixels, y downwards, borders reflected."""
    along = np.arange(length) - (length - 1) / 2
    steps = [(round(t * sin(radians(degrees))), round(t * cos(radians(degrees)))) for t in along.tolist()]
    r, (h, w) = length // 2 + 1, photo.shape[:2]
    padded = np.pad(photo, ((r, r), (r, r), (0, 0)), "reflect" if min(h, w) > 1 else "edge")
    total = np.zeros(photo.shape, np.float64)
    for dy, dx in steps:
        total += padded[r + dy : r + dy + h, r + dx : r + dx + w]
    return total / length


def _rain(photo: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Sparse drops drawn out to streaks at 105 degrees: 0.8 photo + (0.4 + 0.2 strength) streaks."""
    drops = rng.random((*photo.shape[:2], 1)) < 0.01 * strength
    length = _length(30, photo)
    streaks = (smear(drops.astype(np.float64), length, 105) * length).clip(0, 1)
    return 0.8 * photo + (0.4 + 0.2 * strength) * streaks


def _fog(photo: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """0.95 (1 - t) + photo t with t = exp(-(0.5 + 3 strength) d); d falls from 0.8 to 0.2 downwards, and noise."""
    h, w = photo.shape[:2]
    far = np.linspace(0.8, 0.2, h)[:, None] + 0.05 * rng.normal(size=(h, w))
    t = np.exp(-(0.5 + 3 * strength) * far.clip(0))[..., None]
    return 0.95 * (1 - t) + photo * t


def _gaussian(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _bytes(photo / 255 + rng.normal(0, rng.uniform(5, 50) / 255, photo.shape))


def _jpeg(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = io.BytesIO()
    picture(photo).save(out, "JPEG", quality=int(rng.integers(30, 51)))
    return rgb(PIL.Image.open(out))


def _poisson(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    photons = rng.uniform(10, 50)
    return _bytes(rng.poisson(photo / 255 * photons) / photons)


def _salt_and_pepper(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    share, draw = rng.uniform(0.005, 0.05), rng.random((*photo.shape[:2], 1))
    return np.where(draw < share / 2, 0, np.where(draw > 1 - share / 2, 255, photo)).astype(np.uint8)


_NOISES = ((_gaussian, 0.8), (_jpeg, 0.5), (_poisson, 0.5), (_salt_and_pepper, 0.2))


def _length(pixels: int, photo: np.ndarray) -> int:
    return max(2, round(pixels * min(1.0, max(photo.shape[:2]) / FULL)))


def _bytes(photo: np.ndarray) -> np.ndarray:
    return (photo * 255).round().clip(0, 255).astype(np.uint8)
