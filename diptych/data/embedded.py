"""The data that ships with the package, or that one command prepares: a table of source names."""

from __future__ import annotations

from pathlib import Path

from diptych.data import emoji, glyphs, shapes, stamps
from diptych.data.render import Generated


def names() -> tuple[str, ...]:
    """The names that ``source`` knows; those of stamps need ``diptych data prepare stamps`` once."""
    return (*shapes.SOURCES, *emoji.SOURCES, *glyphs.SOURCES, *stamps.SOURCES)


def source(name: str, split: str = "train", size: int = 64, seed: int = 0, root: str | Path | None = None) -> Generated:
    """The source of that name: ``len(source)`` samples, each a pure function of its index.

    ``split`` is "train" or "test", ``size`` the side of the pictures in pixels; ``root`` is where stamps were prepared,
    if not in their default folder. Raises ``ValueError`` for an unknown name, and for stamps that were not prepared.
    """
    if name in stamps.SOURCES:
        return stamps.source(name, split, size, seed, root)
    for world in (shapes, emoji, glyphs):
        if name in world.SOURCES:
            return world.source(name, split, size, seed)
    raise ValueError(f"unknown source {name!r}; embedded: {', '.join(names())}")
