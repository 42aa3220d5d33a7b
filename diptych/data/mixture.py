"""Which sample comes n-th: a weighted mixture of data sets as a pure function of the seed and of small counters.

The n-th draw picks a data set from a hash of (seed, stream, n). Which of its rows comes next depends on the order:

``global``  the k-th draw from a data set in stream s of S is draw g = k S + s from that data set: row (g mod N) of the
            seeded permutation of epoch (g div N)
``shards``  in each epoch the shards are shuffled and put behind each other; stream s reads rows s N / S to
            (s + 1) N / S of that sequence, ``buffer`` rows at a time, each such window shuffled

Either way the streams together visit every row exactly once per epoch, without talking to each other and without a list
of N numbers anywhere.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Literal, Protocol

import numpy as np

from diptych.core.sample import Sample

ROUNDS = 6  # of the Feistel network
BUFFER = 4096  # rows of a window of ``order: shards``
Order = Literal["global", "shards"]


class Source(Protocol):
    """A data set: ``source[index]`` is a pure function of the index and its pictures are decoded."""

    @property
    def name(self) -> str:
        """The name in recipes and logs; sample ids begin with it."""

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
        """The name of the data set, followed by ``#n``."""
        return f"{self.source.name}#{self.n}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.source[index]


def shard_ends(source: Any) -> np.ndarray | None:
    """The number of rows up to the end of each shard of a data set; None for one that is not read from files."""
    if isinstance(source, First):
        ends = shard_ends(source.source)
        return None if ends is None else np.unique(np.minimum(ends, source.n))
    if hasattr(source, "source"):
        return shard_ends(source.source)
    return getattr(source, "shard_ends", None)


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


@lru_cache(maxsize=64)
def _shuffled_shards(shards: int, address: str) -> np.ndarray:
    """The order of ``shards`` shards that belongs to this address."""
    return np.argsort(np.random.Philox(key=bits(address)).random_raw(shards), kind="stable")


@dataclass(frozen=True)
class ShardOrder:
    """The rows of one data set as one stream of several reads them in the order ``shards``."""

    ends: np.ndarray
    buffer: int
    seed: int
    name: str
    stream: int
    streams: int

    @property
    def bounds(self) -> tuple[int, int]:
        """The stream's first and last place (exclusive) in the sequence of shuffled shards."""
        rows = int(self.ends[-1])
        return self.stream * rows // self.streams, (self.stream + 1) * rows // self.streams

    def row(self, number: int, generation: int) -> tuple[int, int]:
        """(row, epoch) of the stream's draw ``number`` from the data set."""
        low, high = self.bounds
        epoch, place = divmod(number, high - low)
        shuffle = f"{generation}.{epoch}" if generation else str(epoch)
        window = place // self.buffer
        first = window * self.buffer
        size = min(self.buffer, high - low - first)
        turn = (self.seed, "window", self.name, shuffle, self.stream, window)
        place = low + first + permuted(place - first, size, *turn)
        shards, ends = self._sequence(shuffle)
        at = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[at])
        start = int(self.ends[shard - 1]) if shard else 0
        return start + place - (int(ends[at - 1]) if at else 0), epoch

    def _sequence(self, shuffle: str) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the number of rows up to the end of each."""
        shards = _shuffled_shards(len(self.ends), f"{self.seed}\0shards\0{self.name}\0{shuffle}")
        return shards, np.cumsum(np.diff(self.ends, prepend=0)[shards])


@dataclass(frozen=True)
class Draw:
    """One draw: row ``index`` of data set ``source``, drawn as the ``number``-th of its stream."""

    source: str
    index: int
    number: int
    epoch: int = 0  # of the data set


class Mixture:
    """The draws of one stream: ``draw()`` returns the next one, ``state_dict`` holds its position."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        seed: int,
        stream: int = 0,
        streams: int = 1,
        generations: Mapping[str, int] | None = None,
        order: Order = "global",
        buffer: int = BUFFER,
    ) -> None:
        """``weights`` are of samples and need not add up to one; they choose among ``sources``. ``generations`` says
        how often a data set has grown since the run began: then its rows are shuffled anew, from where ``starts`` of
        the state says. With the order ``shards`` a window has ``buffer`` rows; data sets that are not read from files
        keep the order ``global``.

        Raises ``ValueError`` for an unknown name, a weight that is not positive and finite, an empty data set, a stream
        outside ``range(streams)``, and a data set in shard order with fewer rows than there are streams.
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
        self._shards: dict[str, ShardOrder] = {}
        for name in self.names if order == "shards" else ():
            if (ends := shard_ends(sources[name])) is not None:
                if int(ends[-1]) < streams:
                    raise ValueError(
                        f"data set {name!r} has {int(ends[-1])} rows, fewer than the {streams} streams; "
                        "such a data set needs the order global"
                    )
                self._shards[name] = ShardOrder(ends, buffer, seed, name, stream, streams)

    def draw(self) -> Draw:
        """The next draw; moves the counters."""
        name = self.names[bisect_right(self._edges, uniform(self.seed, "choice", self.stream, self._number))]
        since = self._counts[name] - self._starts.get(name, 0)
        generation = self._generations.get(name, 0)
        if name in self._shards:
            row, epoch = self._shards[name].row(since, generation)
        else:
            epoch, place = divmod(since * self.streams + self.stream, self.lengths[name])
            shuffle = f"{generation}.{epoch}" if generation else epoch
            row = permuted(place, self.lengths[name], self.seed, "order", name, shuffle)
        drawn = Draw(name, row, self._number, epoch)
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
