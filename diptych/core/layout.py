"""A sample as typed segments: families produce layouts, and packing needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from diptych.core.tensors import NONE, Tensor


class Kind(StrEnum):
    """What a run of tokens holds."""

    TEXT = "text"
    VISION = "vision"  # semantic features of a picture to read
    CLEAN = "clean"  # latents of a picture to read
    NOISED = "noised"  # latents of a target, mixed with noise
    CODES = "codes"  # discrete image tokens
    QUERY = "query"  # learned queries
    PAD = "pad"


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens, described by columns.

    ``ids``       token id of each position, or ``NONE`` where the input comes from the picture. The markers around a
                  picture are part of its segment where they share its attention
    ``targets``   the id that each position must predict, or ``NONE``; empty where nothing is predicted
    ``image``     the picture: (3, H, W) pixels, uint8 or float in [-1, 1]; latents (c, h, w); codes ([tiles,] h, w)
    ``grid``      (rows, columns) of the picture's tokens
    ``full``      every token attends to the whole segment (else causal)
    ``hidden``    later segments do not attend to this one (a noised picture)
    ``shared``    all tokens share one position id (else one each)
    ``advance``   by how much the position counter moves past this segment; ``None`` means by its length
    ``gap``       by how much the position counter moves before this segment
    ``route``     which expert serves the picture's tokens; positions that carry an id take route 0
    ``generated`` the picture is a target: it carries the picture loss
    ``encoded``   ``image`` holds features of an encoder, not its input (``Image.through``)
    ``masked``    the share of the picture's tokens that the network blanks, at random (IOMM's self-conditioning)
    ``reference`` a later target is conditioned on the picture's latents, and not on the reader's states of it
    ``ordinal``   its number among its sample's segments of this kind, which addresses its random draws; ``NONE`` until
                  it is part of a ``Layout``
    """

    kind: Kind
    ids: tuple[int, ...]
    targets: tuple[int, ...] = ()
    image: Tensor | None = field(default=None, repr=False)
    grid: tuple[int, int] | None = None
    full: bool = False
    hidden: bool = False
    shared: bool = False
    advance: int | None = None
    gap: int = 0
    route: int = 0
    generated: bool = False
    encoded: bool = False
    masked: float = 0.0
    reference: bool = False
    ordinal: int = NONE

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"a {self.kind} segment needs at least one token")
        if self.targets and len(self.targets) != len(self.ids):
            raise ValueError(f"a {self.kind} segment has {len(self.ids)} ids but {len(self.targets)} targets")
        if self.image is not None and self.grid and self.open % (self.grid[0] * self.grid[1]):
            raise ValueError(f"a {self.kind} segment has {self.open} picture tokens for a grid of {self.grid}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def open(self) -> int:
        """How many positions take their input from the picture."""
        return self.ids.count(NONE)

    @property
    def moves(self) -> int:
        """By how much the position counter moves over this segment, ``gap`` included."""
        return self.gap + (len(self) if self.advance is None else self.advance)

    @property
    def supervised(self) -> int:
        """How many positions have a target id."""
        return len(self.targets) - self.targets.count(NONE)


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of a sample in order, and its id, which addresses its random draws.

    Pictures without an ``ordinal`` are numbered here. Segments that are cut out of a layout keep their numbers, and
    therefore their random draws."""

    id: str
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        numbered: list[Segment] = []
        following: dict[Kind, int] = {}
        for s in self.segments:
            if s.open:
                s = replace(s, ordinal=following.get(s.kind, 0)) if s.ordinal == NONE else s
                following[s.kind] = s.ordinal + 1
            numbered.append(s)
        object.__setattr__(self, "segments", tuple(numbered))

    def __len__(self) -> int:
        return sum(len(s) for s in self.segments)

    @property
    def pictures(self) -> int:
        """How many pictures the sequence carries."""
        return sum(s.image is not None for s in self.segments)

    @property
    def has_target(self) -> bool:
        """Whether any segment carries a loss."""
        return any(s.supervised or s.generated for s in self.segments)

    def positions(self, start: int = 0) -> list[int]:
        """The position id of every token, counting from ``start``."""
        out: list[int] = []
        for s in self.segments:
            first = start + s.gap
            out += [first] * len(s) if s.shared else range(first, first + len(s))
            start += s.moves
        return out

    def describe(self, decode: Callable[[list[int]], str] | None = None) -> str:
        """A text with one line for each segment; ``decode`` turns ids into text."""
        lines, at, position = [f"{self.id}: {len(self)} tokens, {self.pictures} pictures"], 0, 0
        for s in self.segments:
            sees = ("full" if s.full else "causal") + (", hidden" if s.hidden else "")
            first = position + s.gap
            places = f"@{first}" if s.shared else f"@{first}..{first + len(s) - 1}"
            what = f"grid {s.grid[0]}x{s.grid[1]}" if s.grid else ""
            if decode and s.kind == Kind.TEXT:
                what = repr(decode([i for i in s.ids if i != NONE]))
            loss = f"loss on {s.supervised}" if s.supervised else ""
            if s.generated:
                loss = f"loss on {s.open}"
            if s.masked:
                what += f"  masked {s.masked:g}"
            line = f"  {at:5d}  {s.kind:<7} {len(s):5d} tokens  {places:<12} {sees:<15} route {s.route}  {what}  {loss}"
            lines.append(line.rstrip())
            at += len(s)
            position += s.moves
        return "\n".join(lines)
