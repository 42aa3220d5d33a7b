"""Which sample comes n-th: a weighted mixture of data sets as a pure function of the seed and of small counters.

The n-th draw picks a data set from a hash of (seed, stream, n). The k-th draw from a data set in stream s of S is draw
g = k S + s from that data set: row (g mod N) of the seeded permutation of epoch (g div N). So the streams together
visit every row exactly once per epoch, without talking to each other and without a list of N numbers anywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Protocol

from diptych.core.sample import Sample

ROUNDS = 6  # of the Feistel network


class Source(Protocol):
    """A data set: ``source[index]`` is a pure function of the index and its pictures are decoded."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class First:
    """The first ``n`` samples of a data set; its name ends with ``#n``."""

    source: Source
    n: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= len(self.source):
            raise ValueError(f"{self.name}: the data set has {len(self.source)} samples")

    @property
    def name(self) -> str:
        return f"{self.source.name}#{self.n}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.source[index]


def bits(*address: object) -> int:
    """64 random bits that belong to this address."""
    key = "\0".join(map(str, address)).encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")


def uniform(*address: object) -> float:
    """A number in [0, 1) that belongs to this address."""
    return (bits(*address) >> 11) * 2.0**-53


def permuted(place: int, length: int, *address: object) -> int:
    """Where ``place`` goes in the permutation of ``range(length)`` that belongs to this address.

    A Feistel network over the next even power of two, walked until it lands inside: constant memory, any length.
    """
    if not 0 <= place < length:
        raise ValueError(f"place {place} is outside a permutation of {length}")
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    prefix = "\0".join(map(str, address))
    while True:
        left, right = place >> half, place & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (bits(prefix, turn, right) & mask)
        place = left << half | right
        if place < length:
            return place


@dataclass(frozen=True)
class Draw:
    """One draw: row ``index`` of data set ``source``, drawn as the ``number``-th of its stream."""

    source: str
    index: int
    number: int


class Mixture:
    """The draws of one stream: ``draw()`` returns the next one, ``state_dict`` says where it stands."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        seed: int,
        stream: int = 0,
        streams: int = 1,
        generations: Mapping[str, int] | None = None,
    ) -> None:
        """``weights`` are of samples and need not add up to one; they choose among ``sources``. ``generations`` says
        how often a data set has grown since the run began: then its rows are shuffled anew, from where ``starts`` of
        the state says.

        Raises ``ValueError`` for an unknown name, a weight that is not positive and finite, an empty data set, and a
        stream outside ``range(streams)``.
        """
        if not weights:
            raise ValueError(f"a mixture needs at least one weight; data sets: {', '.join(sources) or 'none'}")
        if unknown := sorted(weights.keys() - sources.keys()):
            raise ValueError(f"unknown data sets {unknown}; choose from {', '.join(sources) or 'none'}")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of data set {name!r} is {weight}; weights must be positive and finite")
            if not len(sources[name]):
                raise ValueError(f"data set {name!r} is empty")
        if not 0 <= stream < streams:
            raise ValueError(f"stream {stream} is outside 0..{streams - 1}")
        self.names = tuple(sorted(weights))
        self.lengths = {name: len(sources[name]) for name in self.names}
        self.seed, self.stream, self.streams = seed, stream, streams
        total = math.fsum(weights.values())
        self._edges = list(accumulate(weights[name] / total for name in self.names))[:-1]
        self._number = 0
        self._counts = dict.fromkeys(self.names, 0)
        self._generations = dict(generations or {})
        self._starts = dict.fromkeys(self._generations, 0)  # draws from a data set before it last grew

    def draw(self) -> Draw:
        """The next draw; moves the counters."""
        name = self.names[bisect_right(self._edges, uniform(self.seed, "choice", self.stream, self._number))]
        since = self._counts[name] - self._starts.get(name, 0)
        epoch, place = divmod(since * self.streams + self.stream, self.lengths[name])
        shuffle = f"{self._generations[name]}.{epoch}" if self._generations.get(name) else epoch
        drawn = Draw(name, permuted(place, self.lengths[name], self.seed, "order", name, shuffle), self._number)
        self._number += 1
        self._counts[name] += 1
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """How many draws were made, in all and from each data set; JSON-able."""
        state = {"number": self._number, "counts": dict(self._counts)}
        return state | ({"starts": dict(self._starts)} if self._starts else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken. Raises ``ValueError`` when it was taken from other data sets."""
        if set(state["counts"]) != set(self.names):
            raise ValueError(f"the saved state mixes {sorted(state['counts'])}, this mixture {list(self.names)}")
        self._number = int(state["number"])
        self._counts = {name: int(state["counts"][name]) for name in self.names}
        self._starts |= {name: int(start) for name, start in state.get("starts", {}).items()}
