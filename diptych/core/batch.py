"""Several sequences in one row: flat columns of length T, and the pictures grouped by kind and shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from diptych.core.sequence import Kind, Sequence
from diptych.core.tensors import NONE, Bool, Int, Tensor


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures (or learned queries) of one kind, shape and purpose in a batch.

    ``tokens[i]`` are the places in the row that take their input from picture i; ``owners[i]`` is the id of its sample
    and ``ordinals[i]`` its number among the sample's pictures of this kind (together they address its noise).
    """

    kind: Kind
    grid: tuple[int, int]
    drawn: bool
    encoded: bool
    masked: float
    images: Tensor | None  # (N, ...) as the segments held them; None for queries
    tokens: Int[Tensor, "N n"]
    owners: tuple[str, ...]
    ordinals: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """A packed row. Padding is only a tail (document ``NONE``). Immutable; ``to`` returns a copy on a device."""

    ids: Int[Tensor, " T"]
    targets: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    document: Int[Tensor, " T"]
    segment: Int[Tensor, " T"]
    full: Bool[Tensor, " T"]
    hidden: Bool[Tensor, " T"]
    routes: tuple[Tensor, ...]  # for every route, the places that take it, ascending
    pictures: tuple[Pictures, ...]
    samples: tuple[str, ...]  # id of each document
    lengths: tuple[int, ...]  # tokens of each document

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, kind: Kind) -> list[Pictures]:
        """The groups of pictures of this kind."""
        return [p for p in self.pictures if p.kind == kind]

    def take(self, places: Tensor) -> Batch:
        """The row with nothing but these places (ascending) on one route, its pictures left out."""
        columns = {n: getattr(self, n)[places] for n in ("ids", "targets", "positions", "segment", "full", "hidden")}
        document = self.document[places]
        lengths = tuple(torch.bincount(document, minlength=len(self.samples)).tolist())
        route = (torch.arange(len(places), device=places.device),)
        return replace(self, **columns, document=document, routes=route, pictures=(), lengths=lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return _to(self, torch.device(device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if isinstance(value, (Batch, Pictures)):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value


def pack(sequences: Iterable[Sequence], routes: int = 1, pad_to: int | None = None) -> Batch:
    """The batch that holds ``sequences`` one after another, padded at the end to a multiple of ``pad_to``.

    ``routes`` is how many experts the family has (each gets an index list, empty or not).
    Raises ``ValueError`` for an empty list and for a segment whose route does not exist.
    """
    sequences = list(sequences)
    if not sequences:
        raise ValueError("cannot pack an empty list of sequences")
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    document: list[int] = []
    segment: list[int] = []
    full: list[bool] = []
    hidden: list[bool] = []
    route: list[int] = []
    groups: dict[tuple, list[tuple]] = {}
    number = 0
    for d, sequence in enumerate(sequences):
        positions += sequence.positions()
        for s in sequence.segments:
            n = len(s)
            if not 0 <= s.route < routes:
                raise ValueError(f"sample {sequence.id!r}: a {s.kind} segment takes route {s.route} of {routes}")
            if s.open:
                places = [len(ids) + i for i, token in enumerate(s.ids) if token == NONE]
                shape = None if s.image is None else (tuple(s.image.shape), s.image.dtype)
                key = (s.kind, s.grid or (1, len(places)), s.drawn, s.encoded, s.masked, shape)
                groups.setdefault(key, []).append((s.image, places, sequence.id, s.ordinal))
            ids += s.ids
            targets += s.targets or [NONE] * n
            document += [d] * n
            segment += [number] * n
            full += [s.full] * n
            hidden += [s.hidden] * n
            route += [0 if token != NONE else s.route for token in s.ids]
            number += 1
    pad = -len(ids) % pad_to if pad_to else 0
    if pad:
        ids, targets, document = ids + [0] * pad, targets + [NONE] * pad, document + [NONE] * pad
        positions, segment, route = positions + [0] * pad, segment + [number] * pad, route + [0] * pad
        full, hidden = full + [False] * pad, hidden + [False] * pad
    columns = torch.tensor([ids, targets, positions, document, segment, full, hidden, route]).unbind()
    return Batch(
        columns[0],
        columns[1],
        columns[2],
        columns[3],
        columns[4],
        columns[5].bool(),
        columns[6].bool(),
        tuple((columns[7] == r).nonzero()[:, 0] for r in range(routes)),
        tuple(
            Pictures(
                kind,
                grid,
                drawn,
                encoded,
                masked,
                None if shape is None else torch.stack([m[0] for m in members]),
                torch.tensor([m[1] for m in members]),
                tuple(m[2] for m in members),
                tuple(m[3] for m in members),
            )
            for (kind, grid, drawn, encoded, masked, shape), members in groups.items()
        ),
        tuple(s.id for s in sequences),
        tuple(len(s) for s in sequences),
    )
