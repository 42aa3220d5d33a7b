"""Packed rows from a mixture: laid out in workers, under two budgets, and exactly resumable.

::

    stream 0 ── mixture ── lay out ── pending ── pack ── row 0, row S, row 2S, ...
    stream 1 ── mixture ── lay out ── pending ── pack ── row 1, row S + 1, ...           row k belongs to stream k mod S

The streams are fixed by the run, not by the machine: rank r of R serves the streams s with s mod R = r and its workers
share those, so neither the number of workers nor the number of ranks changes any row. Every row comes with the state of
its stream behind it; the loader keeps the states of the rows it has handed out, so ``state_dict`` never speaks of rows
that a worker has prefetched.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diptych.core.batch import Batch, pack
from diptych.core.layout import Layout
from diptych.core.sample import Sample
from diptych.core.tensors import NONE
from diptych.data.mixture import Draw, Mixture, Source, uniform

LayOut = Callable[..., Layout]  # lay_out(sample, drop=frozenset of conditions): a family's, or any function
NAMED = 5  # how many bad rows an error lists

log = logging.getLogger("diptych.data")


@dataclass(frozen=True)
class Stats:
    """What a row holds and what making it cost."""

    tokens: int
    fill: float  # tokens / token budget
    pictures: int
    target_words: int
    samples: Mapping[str, int]  # data set -> how many of its samples are in the row
    dropped: Mapping[str, int]  # condition -> how many samples lost it
    skipped: Mapping[str, str]  # bad sample -> why; in the order met


@dataclass(frozen=True, eq=False)
class Row:
    """Row ``index`` of the run (counted over all ranks)."""

    batch: Batch
    index: int
    stats: Stats


@dataclass(frozen=True)
class Plan:
    """All that decides the rows; the same for every rank and every worker, and checked on resume."""

    weights: Mapping[str, float]
    seed: int
    tokens: int
    pictures: int
    streams: int
    ahead: int
    dropout: Mapping[str, float]


class Bad(NamedTuple):
    """A sample that cannot be used."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Pending:
    """A sample that waits for its row."""

    draw: Draw
    sequence: Layout
    tokens: int
    pictures: int
    dropped: tuple[str, ...]


class Stream:
    """One stream of rows: its own mixture, its own pending samples."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        sources: Mapping[str, Source],
        lay_out: LayOut,
        routes: int,
        pad_to: int | None,
        skip_limit: int,
    ) -> None:
        self.mixture = Mixture(sources, plan.weights, plan.seed, number, plan.streams)
        self.number, self.plan, self.sources, self.lay_out = number, plan, sources, lay_out
        self.routes, self.pad_to, self.skip_limit = routes, pad_to, skip_limit
        self.pending: list[Pending] = []

    def state_dict(self) -> dict[str, Any]:
        """The mixture's counters and the draws that wait."""
        waiting = [[p.draw.source, p.draw.index, p.draw.number] for p in self.pending]
        return {"mixture": self.mixture.state_dict(), "pending": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``: what waited is laid out again. Raises ``ValueError`` when that fails now."""
        self.mixture.load_state_dict(state["mixture"])
        self.pending = []
        for source, index, number in state["pending"]:
            made = self._lay_out(Draw(source, index, number))
            if isinstance(made, Bad):
                raise ValueError(f"cannot resume: {made.name} was readable when the state was saved; {made.reason}")
            self.pending.append(made)

    def row(self) -> tuple[Batch, Stats]:
        """The next row: the oldest samples while they fit, then the longest that fit, until none does."""
        chosen: list[Pending] = []
        skipped: dict[str, str] = {}
        tokens, pictures = self.plan.tokens, self.plan.pictures
        while True:
            self._refill(skipped)
            fits = [p for p in self.pending if p.tokens <= tokens and p.pictures <= pictures]
            if not fits:
                break
            best = fits[0] if fits[0] is self.pending[0] else max(fits, key=lambda p: p.tokens)
            self.pending.remove(best)
            chosen.append(best)
            tokens, pictures = tokens - best.tokens, pictures - best.pictures
        batch = pack((p.sequence for p in chosen), self.routes, self.pad_to)
        used = self.plan.tokens - tokens
        return batch, Stats(
            tokens=used,
            fill=used / self.plan.tokens,
            pictures=self.plan.pictures - pictures,
            target_words=int((batch.targets != NONE).sum()),
            samples=dict(Counter(p.draw.source for p in chosen)),
            dropped=dict(Counter(c for p in chosen for c in p.dropped)),
            skipped=skipped,
        )

    def _refill(self, skipped: dict[str, str]) -> None:
        run = 0
        while len(self.pending) < self.plan.ahead:
            made = self._lay_out(self.mixture.draw())
            if isinstance(made, Pending):
                self.pending.append(made)
                run = 0
                continue
            skipped[made.name] = made.reason
            run += 1
            # the consumer counts over all streams; this ends a stream that would never bring forth a row
            if run > self.skip_limit or len(skipped) > self.skip_limit:
                raise ValueError(_too_many(skipped, self.skip_limit, run))

    def _lay_out(self, draw: Draw) -> Pending | Bad:
        name = f"{draw.source}/{draw.index}"
        with _naming(f"while reading row {draw.index} of data set {draw.source!r}"):
            try:
                sample = self.sources[draw.source][draw.index]
            except (ValueError, OSError) as error:  # what sources raise for rows and pictures that cannot be read
                return Bad(name, str(error))
        sample = replace(sample, id=f"{draw.source}/{sample.id}")
        drop = self._drop(sample, draw)
        with _naming(f"while laying out sample {sample.id!r} (row {draw.index} of data set {draw.source!r})"):
            sequence = self.lay_out(sample, drop=drop)
        tokens, pictures = len(sequence), sequence.pictures
        for what, has, budget in (("tokens", tokens, self.plan.tokens), ("pictures", pictures, self.plan.pictures)):
            if has > budget:
                return Bad(name, f"sample {sample.id!r} has {has} {what}; a row has room for {budget}")
        return Pending(draw, sequence, tokens, pictures, tuple(sorted(drop)))

    def _drop(self, sample: Sample, draw: Draw) -> frozenset[str]:
        if not any(image.role == "target" for image in sample.images()):
            return frozenset()
        address = (self.plan.seed, "dropout", self.number, draw.number)
        return frozenset(name for name, p in self.plan.dropout.items() if uniform(*address, name) < p)


class Rows(IterableDataset):
    """What a worker runs: the rank's rows from local row ``first`` on, one worker's share of them."""

    def __init__(self, make: Callable[[int], Stream], numbers: tuple[int, ...], states: Mapping[str, Any], first: int):
        self.make, self.numbers, self.states, self.first = make, numbers, states, first

    def __iter__(self) -> Iterator[tuple[int, Batch, Stats, dict[str, Any]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        streams: dict[int, Stream] = {}
        row = self.first + worker
        while True:
            number = self.numbers[row % len(self.numbers)]
            if number not in streams:
                streams[number] = self.make(number)
                if str(number) in self.states:
                    streams[number].load_state_dict(self.states[str(number)])
            batch, stats = streams[number].row()
            yield number, batch, stats, streams[number].state_dict()
            row += workers


class Loader:
    """Endless packed rows of a weighted mixture. Iterating continues after the last row handed out."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        lay_out: LayOut,
        *,
        tokens: int,
        pictures: int,
        routes: int = 1,
        seed: int = 0,
        workers: int = 0,
        streams: int = 16,
        dropout: Mapping[str, float] | None = None,
        conditions: Iterable[str] = ("text", "image"),
        rank: int = 0,
        world: int = 1,
        skip_limit: int = 100,
        ahead: int = 24,
        pad_to: int | None = None,
    ) -> None:
        """``tokens`` and ``pictures`` are the budgets of one row; ``weights`` are of samples.

        ``routes``      how many experts the family has
        ``workers``     processes that lay out (forked, so ``lay_out`` may be a network's method); 0 works in this one
        ``streams``     independent streams of rows, a multiple of world x workers; decides the rows, so fixed for a run
        ``dropout``     condition -> how often ``lay_out`` is told to leave it out, where a target picture is
        ``conditions``  what the family can leave out
        ``skip_limit``  how many different bad samples this process may skip before it stops
        ``ahead``       how many samples of a stream wait for a row that they fit in
        ``pad_to``      pads the row to a multiple of this

        Raises ``ValueError`` for settings that contradict each other, naming the value and the choices.
        """
        dropout = dict(dropout or {})
        lowest = {"tokens": 1, "pictures": 0, "routes": 1, "streams": 1, "ahead": 1, "world": 1, "skip_limit": 0}
        given = {
            "tokens": tokens, "pictures": pictures, "routes": routes, "streams": streams, "ahead": ahead,
            "world": world, "skip_limit": skip_limit, "workers": workers,
        }  # fmt: skip
        for name, value in given.items():
            if value < lowest.get(name, 0):
                raise ValueError(f"{name} must be at least {lowest.get(name, 0)}, not {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside 0..{world - 1}")
        if streams % (world * max(workers, 1)):
            raise ValueError(
                f"streams must be a multiple of world x workers = {world} x {max(workers, 1)}, not {streams}; "
                f"the next that fits is {-(-streams // (world * max(workers, 1))) * world * max(workers, 1)}"
            )
        for name, p in dropout.items():
            if name not in (known := tuple(conditions)):
                raise ValueError(f"unknown condition {name!r} in dropout; choose from {', '.join(known)}")
            if not 0 <= p <= 1:
                raise ValueError(f"the dropout of {name!r} is {p}; it must lie in [0, 1]")
        self.plan = Plan(dict(weights), seed, tokens, pictures, streams, ahead, dropout)
        self.sources = {name: sources[name] for name in weights if name in sources}
        self.lengths = Mixture(sources, weights, seed).lengths
        self.lay_out, self.routes, self.pad_to = lay_out, routes, pad_to
        self.workers, self.rank, self.world, self.skip_limit = workers, rank, world, skip_limit
        self._rows = 0  # handed out by this rank
        self._states: dict[str, Any] = {}
        self._skipped: dict[str, str] = {}

    @property
    def skipped(self) -> Mapping[str, str]:
        """The bad samples met so far, and why each was skipped."""
        return dict(self._skipped)

    def __iter__(self) -> Iterator[Row]:
        """Rows without end. Raises ``ValueError`` when more than ``skip_limit`` different samples were bad."""
        numbers = tuple(range(self.rank, self.plan.streams, self.world))
        rows = DataLoader(
            Rows(self._stream, numbers, dict(self._states), self._rows),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_same,
            worker_init_fn=as_worker,
            generator=torch.Generator(),  # DataLoader draws a seed nobody uses; not from the global state
            multiprocessing_context="fork" if self.workers else None,
        )
        for number, batch, stats, state in rows:
            row = Row(batch, self._rows * self.world + self.rank, stats)
            self._rows += 1
            self._states[str(number)] = state
            for name, reason in stats.skipped.items():
                if name not in self._skipped:
                    self._skipped[name] = reason
                    log.warning("skipped %s: %s", name, reason)
            if len(self._skipped) > self.skip_limit:
                raise ValueError(_too_many(self._skipped, self.skip_limit))
            yield row

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the last row it handed out; JSON-able. ``merge_states`` joins the ranks'."""
        return {
            "rows": self._rows * self.world,
            "plan": _plain(self.plan, self.lengths),
            "streams": dict(self._states),
            "skipped": dict(self._skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the row that ``state`` was taken behind, with any number of workers and ranks.

        Raises ``ValueError`` when the rows would not be those of the saved run: other data, budgets, seed or streams; a
        number of rows that the ranks cannot share; or streams of another rank missing (see ``merge_states``).
        """
        now = _plain(self.plan, self.lengths)
        for name in now:
            if state["plan"].get(name) != now[name]:
                saved = state["plan"].get(name)
                raise ValueError(f"cannot resume: {name} was {saved} when the state was saved and is {now[name]} now")
        rows, rest = divmod(state["rows"], self.world)
        if rest:
            raise ValueError(f"cannot resume: {state['rows']} rows do not divide among {self.world} ranks")
        mine = range(self.rank, min(self.plan.streams, state["rows"]), self.world)
        if missing := [s for s in mine if str(s) not in state["streams"]]:
            raise ValueError(f"cannot resume: the state lacks streams {missing}; merge the states of all ranks first")
        self._rows = rows
        self._states = {str(s): state["streams"][str(s)] for s in mine}
        self._skipped = dict(state["skipped"])

    def _stream(self, number: int) -> Stream:
        return Stream(number, self.plan, self.sources, self.lay_out, self.routes, self.pad_to, self.skip_limit)


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from the states of all ranks. Raises ``ValueError`` when they stand at different rows or plans."""
    states = list(states)
    if not states:
        raise ValueError("there are no states to merge")
    for name in ("rows", "plan"):
        if any(s[name] != states[0][name] for s in states):
            raise ValueError(f"the ranks' states differ in {name!r}: {[s[name] for s in states]}")
    merged = {key: {k: v for s in states for k, v in s[key].items()} for key in ("streams", "skipped")}
    return {"rows": states[0]["rows"], "plan": states[0]["plan"]} | merged


def _plain(plan: Plan, lengths: Mapping[str, int]) -> dict[str, Any]:
    return asdict(plan) | {"lengths": dict(lengths)}


def _too_many(skipped: Mapping[str, str], limit: int, draws: int = 0) -> str:
    first = "\n".join(f"  {name}: {reason}" for name, reason in list(skipped.items())[:NAMED])
    more = f"\n  and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    within = f" in {draws} draws" if draws > len(skipped) else ""
    return f"{len(skipped)} bad samples{within}, and the limit is {limit}:\n{first}{more}"


@contextmanager
def _naming(note: str) -> Iterator[None]:
    """Adds ``note`` to whatever is raised inside, so that the trace says which sample it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


def _same(row: Any) -> Any:
    return row


def as_worker(worker: int) -> None:
    """A worker keeps to one thread and gives way: one of the trainer's threads interrupted makes all of them wait.

    Signals are the trainer's: sent to the whole job (Ctrl-C, ``scancel``), they must not end the worker whose position
    the trainer is about to save. Workers end when the trainer tells them to or is gone.
    """
    torch.set_num_threads(1)
    os.nice(5)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
