"""Shared by the embedded worlds: drawing with skia, connected components, and sources that generate samples."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import skia

from diptych.core.sample import Message, Sample

SPLITS = ("train", "test")
ENDLESS = 2**40

Made = tuple[tuple[Message, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Generated:
    """A source that generates sample ``index`` with ``make(rng, split, size) -> (messages, info)``.

    ``rng`` is seeded with (seed, split, name, index), so a sample is the same in every process and in every order.
    """

    name: str
    make: Callable[[np.random.Generator, str, int], Made]
    split: str = "train"
    size: int = 64
    seed: int = 0
    length: int = ENDLESS

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; choose from {', '.join(SPLITS)}")
        if self.size < 8:
            raise ValueError(f"size is {self.size}; pictures need at least 8 pixels a side")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"{self.name} has no sample {index}; it has {self.length}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), zlib.crc32(self.name.encode()), index))
        messages, info = self.make(rng, self.split, self.size)
        return Sample(f"{self.name}/{self.split}/{self.seed}/{index}", messages, info)


def canvas(
    size: int, colour: tuple[int, ...] = (255, 255, 255, 255), height: int | None = None
) -> tuple[np.ndarray, skia.Canvas]:
    """A (height or size, size, 4) RGBA array (premultiplied) and the skia canvas that draws into it."""
    words = np.full((height or size, size), int.from_bytes(colour, sys.byteorder), np.uint32)
    pixels = words.view(np.uint8).reshape(*words.shape, 4)
    return pixels, skia.Surface(pixels, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType).getCanvas()


def picture(pixels: np.ndarray) -> PIL.Image.Image:
    """The RGB picture of an (h, w, 3 or 4) uint8 array; a fourth channel is dropped."""
    mode = "RGBX" if pixels.shape[2] == 4 else "RGB"
    return PIL.Image.frombytes("RGB", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", mode)


def rgb(image: PIL.Image.Image) -> np.ndarray:
    """The (h, w, 3) uint8 array of a picture."""
    return np.asarray(image.convert("RGB"))


def mask_picture(mask: np.ndarray) -> PIL.Image.Image:
    """The RGB picture of an (h, w) boolean mask: white where true, black elsewhere."""
    return PIL.Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")


def pick(rng: np.random.Generator, items, weights=None):
    """One of ``items``, drawn uniformly or by ``weights`` (which need not sum to one)."""
    if weights is None:
        return items[int(rng.integers(len(items)))]
    edges = np.cumsum(weights)
    return items[min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(items) - 1)]


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of an (h, w) boolean mask, each an (n, 2) array of rows and columns."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()
    runs = [(row, a, b) for (row, a), (_, b) in zip(starts, stops, strict=True)]  # one past the last column
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_row: dict[int, list[int]] = {}
    for i, (row, a, b) in enumerate(runs):
        for other in by_row.get(row - 1, ()):
            if runs[other][1] < b and a < runs[other][2]:
                parent[root(other)] = root(i)
        by_row.setdefault(row, []).append(i)
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(root(i), []).append(run)
    return [np.array([(r, c) for r, a, b in group for c in range(a, b)]) for group in groups.values()]
