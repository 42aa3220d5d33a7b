"""Several layouts in one row: flat columns of length T, and the pictures grouped by kind and shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from diptych.core.layout import Kind, Layout
from diptych.core.tensors import NONE, Bool, Int, Tensor


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures (or learned queries) of one kind, shape and purpose in a batch.

    ``tokens[i]`` are the places in the row that take their input from picture i; ``owners[i]`` is the id of its sample
    and ``ordinals[i]`` its number among the sample's pictures of this kind (together they address its noise).
    """

    kind: Kind
    grid: tuple[int, int]
    generated: bool
    encoded: bool
    masked: float
    reference: bool
    images: Tensor | None  # (N, ...) as the segments held them; None for queries
    tokens: Int[Tensor, "N n"]
    owners: tuple[str, ...]
    ordinals: tuple[int, ...]

    @property
    def pixels(self) -> Tensor:
        """``images`` of a kind that always has them."""
        assert self.images is not None
        return self.images


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
        """The row restricted to these places (ascending), on one route and without its pictures."""
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


def pack(sequences: Iterable[Layout], routes: int = 1, pad_to: int | None = None) -> Batch:
    """The batch that holds ``sequences`` one after another, padded at the end to a multiple of ``pad_to``.

    ``routes`` is how many experts the family has (each gets an index list, empty or not).
    Raises ``ValueError`` for an empty list and for a segment whose route does not exist.
    """
    sequences = list(sequences)
    pairs = [(d, s) for d, sequence in enumerate(sequences) for s in sequence.segments]
    if not pairs:
        raise ValueError("cannot pack an empty list of sequences, or sequences without segments")
    documents, segments = zip(*pairs, strict=True)
    lengths = torch.tensor([len(s) for s in segments])
    pad = -int(lengths.sum()) % pad_to if pad_to else 0

    def column(values: Iterable[Iterable[int]], after: int) -> Tensor:
        return F.pad(torch.tensor([*chain.from_iterable(values)]), (0, pad), value=after)

    def spread(values: Iterable[int], after: int) -> Tensor:
        return F.pad(torch.tensor([*values]).repeat_interleave(lengths), (0, pad), value=after)

    ids = column((s.ids for s in segments), 0)
    route = torch.where(ids == NONE, spread((s.route for s in segments), 0), 0)
    groups: dict[tuple, list[tuple]] = {}
    places = (ids == NONE).nonzero()[:, 0].split([s.open for s in segments])
    for d, s, tokens in zip(documents, segments, places, strict=True):
        if not 0 <= s.route < routes:
            raise ValueError(f"sample {sequences[d].id!r}: a {s.kind} segment takes route {s.route} of {routes}")
        if len(tokens):
            shape = None if s.image is None else (tuple(s.image.shape), s.image.dtype)
            key = (s.kind, s.grid or (1, len(tokens)), s.generated, s.encoded, s.masked, s.reference, shape)
            groups.setdefault(key, []).append((s.image, tokens, sequences[d].id, s.ordinal))
    return Batch(
        ids,
        column((s.targets or (NONE,) * len(s) for s in segments), NONE),
        column((s.positions() for s in sequences), 0),
        spread(documents, NONE),
        spread(range(len(segments)), len(segments)),
        spread((s.full for s in segments), False),
        spread((s.hidden for s in segments), False),
        tuple((route == r).nonzero()[:, 0] for r in range(routes)),
        tuple(
            Pictures(
                kind,
                grid,
                generated,
                encoded,
                masked,
                reference,
                None if shape is None else torch.stack([m[0] for m in members]),
                torch.stack([m[1] for m in members]),
                tuple(m[2] for m in members),
                tuple(m[3] for m in members),
            )
            for (kind, grid, generated, encoded, masked, reference, shape), members in groups.items()
        ),
        tuple(s.id for s in sequences),
        tuple(len(s) for s in sequences),
    )
