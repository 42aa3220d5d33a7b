"""The grounds that scenes are drawn on, and the sizes of their canvases.

A ground is plain, a gradient from top to bottom, checkers, or noise. Its picture without the noise depends on its name
and the size alone, so a judge knows which colour to expect at every pixel.

Held out: one pair of ground and canvas size in ten, by a hash, is in split "test" only (``held_out``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
import skia

from diptych.data.canvas import pick

PALE = {
    "white": (255, 255, 255),
    "cream": (250, 240, 205),
    "pink": (255, 212, 220),
    "light blue": (205, 228, 252),
    "light green": (208, 242, 210),
    "grey": (195, 195, 195),
}
DARK = {"black": (0, 0, 0), "navy": (16, 26, 72)}
COLOURS = PALE | DARK
NOISE = 12.0  # standard deviation in levels of 255
CHECKERS = 8  # fields on the shorter side
NEAR = 110.0  # a thing whose colour is nearer to the ground than this Euclidean distance cannot be told from it
SIZES = tuple((w, h) for w in range(64, 129, 16) for h in range(64, 129, 16))  # canvases to draw: width and height
SMALL = tuple((w, h) for w in range(32, 64, 16) for h in range(32, 64, 16))  # pictures to read only

Kind = Literal["plain", "gradient", "checkers", "noise"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Ground:
    """A kind of ground and the names of its colours: one, or two for gradients and checkers."""

    kind: Kind
    colours: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {"kind": self.kind, "colours": list(self.colours)}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Ground:
        """The ground of ``to_json``'s fields."""
        return Ground(row["kind"], tuple(row["colours"]))

    @property
    def text(self) -> str:
        """Words that name it after "on": "a black background", "pink and white checkers"."""
        if self.kind == "plain":
            return f"a {self.colours[0]} background"
        if self.kind == "noise":
            return f"a noisy {self.colours[0]} background"
        if self.kind == "gradient":
            return f"a gradient from {self.colours[0]} to {self.colours[1]}"
        return f"{self.colours[0]} and {self.colours[1]} checkers"

    def hides(self, colour: tuple[int, int, int]) -> bool:
        """Whether a thing of this colour cannot be seen on the ground."""
        return any(np.linalg.norm(np.subtract(COLOURS[name], colour)) < NEAR for name in self.colours)

    def paper(self, size: Size) -> np.ndarray:
        """The (h, w, 3) uint8 picture of the ground without noise; read-only."""
        return _paper(self, size)

    def canvas(self, rng: np.random.Generator, size: Size) -> tuple[np.ndarray, skia.Canvas]:
        """A (h, w, 4) RGBA array that shows the ground, and the skia canvas that draws into it."""
        pixels = np.full((size[1], size[0], 4), 255, np.uint8)
        pixels[..., :3] = self.paper(size)
        if self.kind == "noise":
            noisy = rng.standard_normal(pixels.shape[:2], np.float32)[..., None] * NOISE + pixels[..., :3]
            pixels[..., :3] = noisy.clip(0, 255)
        return pixels, skia.Surface(pixels, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType).getCanvas()


@lru_cache(maxsize=512)
def _paper(ground: Ground, size: Size) -> np.ndarray:
    width, height = size
    pixels = np.empty((height, width, 3), np.uint8)
    first, last = (np.array(COLOURS[name], np.float32) for name in (ground.colours[0], ground.colours[-1]))
    if ground.kind == "gradient":
        pixels[:] = (first + (last - first) * np.linspace(0, 1, height, dtype=np.float32)[:, None, None]).round()
    elif ground.kind == "checkers":
        field = min(size) // CHECKERS
        y, x = np.mgrid[:height, :width] // field
        pixels[:] = np.where(((x + y) % 2 == 0)[..., None], first, last)
    else:
        pixels[:] = first
    pixels.flags.writeable = False
    return pixels


WHITE = Ground("plain", ("white",))


@cache
def every(kind: Kind) -> tuple[Ground, ...]:
    """Every ground of a kind."""
    if kind == "plain":
        return tuple(Ground(kind, (name,)) for name in COLOURS)
    if kind == "noise":
        return tuple(Ground(kind, (name,)) for name in PALE)
    return tuple(Ground(kind, (a, b)) for a in PALE for b in PALE if a != b)


def held_out(ground: Ground, size: Size) -> bool:
    """Whether no training sample shows this ground at this size. White grounds and canvases of 64 x 64 never are."""
    if ground == WHITE or size == (64, 64):
        return False
    text = f"{ground.text} {size[0]}x{size[1]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def random_size(rng: np.random.Generator, small: bool = False) -> Size:
    """A canvas size of aspect ratio 1:2 to 2:1: 64 x 64 half the time; ``small`` adds sides of 32 and 48."""
    return (64, 64) if rng.random() < 0.5 else pick(rng, SIZES + SMALL * 2 if small else SIZES)


def random_ground(
    rng: np.random.Generator,
    split: str,
    size: Size,
    colours: Iterable[tuple[int, int, int]] = (),
    white: float = 0.4,
) -> Ground:
    """A ground on which things of these colours can be seen, white with probability ``white``."""
    if rng.random() < white:
        return WHITE
    colours = tuple(colours)
    while True:
        ground = pick(rng, every(pick(rng, ("plain", "gradient", "checkers", "noise"), (5, 2, 2, 2))))
        if not any(map(ground.hides, colours)) and not (split == "train" and held_out(ground, size)):
            return ground
