"""The table of embedded data sets: generated ones, and photographs that ``diptych data prepare`` builds."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from diptych.core.sample import Sample
from diptych.data.mixture import Source, uniform
from diptych.data.self_condition import bare
from diptych.data.worlds import canvas_sources, emoji_sources, glyphs, shapes_sources, stamps, talk_sources

WORLDS = (shapes_sources, emoji_sources, glyphs, canvas_sources, talk_sources)
POOL = {"shapes/draw": 0.6, "emoji64/draw": 0.2, "emoji/scenes": 0.2}  # the sources of ``images`` and their shares


@dataclass(frozen=True, eq=False)
class Pool:
    """``images``: unlabelled pictures of shapes and emoji, each a function of its index alone."""

    sources: tuple[Source, ...]
    name: str = "images"

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, index: int, /) -> Sample:
        edges = list(accumulate(POOL.values()))
        source = self.sources[min(bisect_right(edges, uniform("images", index) * edges[-1]), len(edges) - 1)]
        return bare(source[index])


def names() -> tuple[str, ...]:
    """The names that ``source`` knows; those of stamps need ``diptych data prepare stamps`` once."""
    return (*(name for world in WORLDS for name in world.SOURCES), "images", *stamps.SOURCES)


def source(name: str, split: str = "train", size: int = 64, seed: int = 0, root: str | Path | None = None) -> Source:
    """The source of that name: ``len(source)`` samples, each a pure function of its index.

    ``split`` is "train" or "test", ``size`` the side of the pictures in pixels; ``root`` is where stamps were prepared,
    if not in their default folder. Raises ``ValueError`` for an unknown name, and for stamps that were not prepared.
    """
    if name == "images":
        return Pool(tuple(source(n, split, size, seed) for n in POOL))
    if name in stamps.SOURCES:
        return stamps.source(name, split, size, seed, root)
    for world in WORLDS:
        if name in world.SOURCES:
            return world.source(name, split, size, seed)
    raise ValueError(f"unknown source {name!r}; embedded: {', '.join(names())}")
