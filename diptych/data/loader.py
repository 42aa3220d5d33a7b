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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from diptych.core.batch import Batch, pack
from diptych.core.layout import Layout
from diptych.core.sample import Sample
from diptych.core.tensors import NONE
from diptych.data.mixture import BUFFER, Draw, Mixture, Order, Source, uniform
from diptych.data.reading import COUNTS, Counts, whole_files
from diptych.data.variants import prompted, varied
from diptych.data.workers import read_ahead

LayOut = Callable[..., Layout]  # lay_out(sample, drop=frozenset of conditions): a family's, or any function
NAMED = 5  # how many bad rows an error lists
REASONS = 100  # bad samples whose reason is kept
LEAST = 10  # bad samples that a share always allows
IN_VAIN = 1000  # bad samples in a row that end a stream, where the limit is a share

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
    untargeted: int = 0  # samples without anything to predict or to draw
    files: Counts = Counts()  # read for it


@dataclass(frozen=True, eq=False)
class Row:
    """Row ``index`` of the run (counted over all ranks)."""

    batch: Batch
    index: int
    stats: Stats


@dataclass(frozen=True)
class LoaderConfig:
    """All that decides the rows; the same for every rank and every worker, and checked on resume.

    ``weights``   data set -> weight, of samples
    ``tokens``    the budget of a row, as ``pictures``
    ``streams``   independent streams of rows, a multiple of world x workers
    ``ahead``     how many samples of a stream wait for a row that they fit in
    ``dropout``   condition -> how often ``lay_out`` leaves it out, where a sample has a picture to draw; ``A|B`` is how
                  often a sample that lost condition B loses A too (OmniGen2: ``image|text``), and ``A*`` how often
                  each segment of condition A is left out, by a draw of its own (BAGEL: ``text*``)
    ``order``     of the rows of each data set: ``global`` (shuffled as a whole) or ``shards`` (see data/mixture.py)
    ``buffer``    rows of a shuffled window of the order ``shards``
    ``reading``   data set -> the size rule at which its pictures are read (``Image.reading``)
    ``prompts``   data set -> how its requests are worded (``variants.prompted``)
    ``samples``   the most samples of a row; None: as many as fit
    """

    weights: Mapping[str, float]
    tokens: int
    pictures: int
    seed: int = 0
    streams: int = 16
    ahead: int = 24
    dropout: Mapping[str, float] = field(default_factory=dict)
    order: Order = "global"
    buffer: int = BUFFER
    reading: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None


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
    has_target: bool


class Stream:
    """One stream of rows: its own mixture, its own pending samples."""

    def __init__(
        self,
        mixture: Mixture,
        plan: LoaderConfig,
        sources: Mapping[str, Source],
        lay_out: LayOut,
        routes: int,
        pad_to: int | None,
        skip_limit: int | float,
    ) -> None:
        self.mixture, self.plan, self.sources, self.lay_out = mixture, plan, sources, lay_out
        self.routes, self.pad_to = routes, pad_to
        self.most = IN_VAIN if isinstance(skip_limit, float) else skip_limit  # bad samples for one row
        self.pending: list[Pending] = []

    def state_dict(self) -> dict[str, Any]:
        """The mixture's counters and the draws that wait."""
        waiting = [list(astuple(p.draw)) for p in self.pending]
        return {"mixture": self.mixture.state_dict(), "pending": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``: what waited is laid out again. Raises ``ValueError`` when that fails now."""
        self.mixture.load_state_dict(state["mixture"])
        self.pending = []
        for draw in state["pending"]:
            made = self._lay_out(Draw(*draw))
            if isinstance(made, Bad):
                raise ValueError(f"cannot resume: {made.name} was readable when the state was saved; {made.reason}")
            self.pending.append(made)

    def row(self) -> tuple[Batch, Stats]:
        """The next row: the oldest samples while they fit, then the longest that fit, until none does."""
        chosen: list[Pending] = []
        skipped: dict[str, str] = {}
        before = COUNTS.copy()
        tokens, pictures = self.plan.tokens, self.plan.pictures
        while True:
            self._refill(skipped)
            fits = [p for p in self.pending if p.tokens <= tokens and p.pictures <= pictures]
            if not fits or len(chosen) == self.plan.samples:
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
            untargeted=sum(not p.has_target for p in chosen),
            files=COUNTS.since(before),
        )

    def _refill(self, skipped: dict[str, str]) -> None:
        run = 0
        while len(self.pending) < self.plan.ahead:
            pending = self._lay_out(self.mixture.draw())
            if isinstance(pending, Pending):
                self.pending.append(pending)
                run = 0
                continue
            skipped[pending.name] = pending.reason
            run += 1
            # the consumer counts over all streams; this ends a stream that would never yield a row
            if run > self.most or len(skipped) > self.most:
                raise ValueError(_too_many(skipped, self.most, len(skipped), run if run > len(skipped) else 0))

    def _lay_out(self, draw: Draw) -> Pending | Bad:
        name = f"{draw.source}/{draw.index}"
        with _naming(f"while reading row {draw.index} of data set {draw.source!r}"):
            try:
                with whole_files(self.plan.order == "shards"):
                    sample = self.sources[draw.source][draw.index]
            except ConnectionError:  # the storage is gone; the row is not at fault
                raise
            except (ValueError, OSError) as error:  # what sources raise for rows and pictures that cannot be read
                return Bad(name, str(error))
        sample = replace(sample, id=f"{draw.source}/{sample.id}")
        with _naming(f"while varying sample {sample.id!r} (row {draw.index} of data set {draw.source!r})"):
            sample = varied(sample, self.plan.seed, "variant", self.mixture.stream, draw.number)
        if prompt := self.plan.prompts.get(draw.source):
            sample = prompted(sample, prompt)
        if reading := self.plan.reading.get(draw.source):
            sample = sample.map_images(lambda image: replace(image, reading=reading))
        drop = self._drop(sample, draw)
        with _naming(f"while laying out sample {sample.id!r} (row {draw.index} of data set {draw.source!r})"):
            sequence = self.lay_out(sample, drop=drop)
        tokens, pictures = len(sequence), sequence.pictures
        for what, has, budget in (("tokens", tokens, self.plan.tokens), ("pictures", pictures, self.plan.pictures)):
            if has > budget:
                return Bad(name, f"sample {sample.id!r} has {has} {what}; a row has room for {budget}")
        has_target = sample.has_target and sequence.has_target  # the end of an empty answer teaches nothing
        return Pending(draw, sequence, tokens, pictures, tuple(sorted(drop)), has_target)

    def _drop(self, sample: Sample, draw: Draw) -> frozenset[str]:
        if not any(image.role == "target" for image in sample.images()):
            return frozenset()
        address = (self.plan.seed, "dropout", self.mixture.stream, draw.number)
        drawn = [name for name, p in self.plan.dropout.items() if name[-1] != "*" and uniform(*address, name) < p]
        most = sum(len(message.parts) for message in sample.messages)
        each = ((name[:-1], k, p) for name, p in self.plan.dropout.items() if name[-1] == "*" for k in range(most))
        drawn += [f"{name}:{k}" for name, k, p in each if uniform(*address, name, k) < p]
        alone = {name for name in drawn if "|" not in name}
        together = {name.partition("|")[0] for name in drawn if name.partition("|")[2] in alone}
        return frozenset(alone | together)


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


class Skips:
    """The bad samples of a process: how many, and the reasons of the first ``REASONS``.

    A ``limit`` below 1 is a share of the samples drawn, where every skip counts; any other is a number of different
    samples."""

    def __init__(self, limit: int | float) -> None:
        self.limit, self.share = limit, isinstance(limit, float)
        if self.share and not 0 < limit < 1:
            raise ValueError(f"skip_limit is a count or a share between 0 and 1, not {limit}")
        self.reasons: dict[str, str] = {}
        self.events = self.draws = 0

    def add(self, stats: Stats) -> dict[str, str]:
        """Counts the samples of a row; returns the newly met bad ones with their reasons. Raises ``ValueError`` above
        the limit."""
        self.events += len(stats.skipped)
        self.draws += sum(stats.samples.values()) + len(stats.skipped)
        room = REASONS if self.share else max(REASONS, int(self.limit) + 1)
        fresh = {name: why for name, why in stats.skipped.items() if name not in self.reasons}
        self.reasons |= dict(list(fresh.items())[: max(0, room - len(self.reasons))])
        count, most = len(self.reasons), self.limit
        if self.share:
            count, most = self.events, max(LEAST, self.limit * self.draws)
        if count > most:
            raise ValueError(_too_many(self.reasons, self.limit, count, self.draws if self.share else 0))
        return fresh


class Loader:
    """Endless packed rows of a weighted mixture. Iterating continues after the last row handed out."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        plan: LoaderConfig,
        lay_out: LayOut,
        *,
        routes: int = 1,
        conditions: Iterable[str] = ("text", "image"),
        pad_to: int | None = None,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        skip_limit: int | float = 100,
    ) -> None:
        """Rows of ``plan`` over ``sources``, for rank ``rank`` of ``world``.

        ``routes``      how many experts the family has
        ``conditions``  what the family can leave out
        ``pad_to``      pads the row to a multiple of this
        ``workers``     processes that lay out (forked, so ``lay_out`` may be a network's method); 0 works in this one
        ``skip_limit``  bad samples this process may skip before it stops: how many, or (below 1) which share

        Raises ``ValueError`` for settings that contradict each other, naming the value and the choices.
        """
        lowest = {"tokens": 1, "pictures": 0, "routes": 1, "streams": 1, "ahead": 1, "buffer": 1, "world": 1}
        given = {name: getattr(plan, name) for name in ("tokens", "pictures", "streams", "ahead", "buffer")}
        given |= {"routes": routes, "world": world, "skip_limit": skip_limit, "workers": workers}
        for name, value in given.items():
            if value < lowest.get(name, 0):
                raise ValueError(f"{name} must be at least {lowest.get(name, 0)}, not {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside 0..{world - 1}")
        if plan.streams % (shares := world * max(workers, 1)):
            raise ValueError(
                f"streams must be a multiple of world x workers = {world} x {max(workers, 1)}, not {plan.streams}; "
                f"the next that fits is {-(-plan.streams // shares) * shares}"
            )
        for name, p in plan.dropout.items():
            for condition in name.split("|", 1):
                if condition not in (known := tuple(conditions)):
                    where = "" if condition == name else f" ({name!r})"
                    raise ValueError(
                        f"unknown condition {condition!r} in dropout{where}; choose from {', '.join(known)}"
                    )
            if "|" in name and (base := name.partition("|")[2]) not in plan.dropout:
                raise ValueError(f"the dropout of {name!r} needs one of {base!r}, which the recipe does not drop")
            if not 0 <= p <= 1:
                raise ValueError(f"the dropout of {name!r} is {p}; it must lie in [0, 1]")
        self.plan, self.lay_out, self.routes, self.pad_to = plan, lay_out, routes, pad_to
        self.sources = {name: sources[name] for name in plan.weights if name in sources}
        self._generations: dict[str, int] = {}  # how often a data set has grown since the run began
        self.lengths = self._mixture(0, sources).lengths
        self.workers, self.rank, self.world = workers, rank, world
        self._rows = 0  # handed out by this rank
        self._states: dict[str, Any] = {}
        self._skips = Skips(skip_limit)

    @property
    def skipped(self) -> Mapping[str, str]:
        """The bad samples met so far, and why each was skipped."""
        return dict(self._skips.reasons)

    def __iter__(self) -> Iterator[Row]:
        """Rows without end, see ``running``."""
        with self.running() as rows:
            yield from rows

    @contextmanager
    def running(self) -> Iterator[Iterator[Row]]:
        """Yields rows without end; the workers end with the block.

        Rows raise ``ValueError`` where more than ``skip_limit`` samples were bad, and whatever a source or ``lay_out``
        raises otherwise; a worker that dies raises ``ChildProcessError`` at once."""
        numbers = tuple(range(self.rank, self.plan.streams, self.world))
        rows = Rows(self._stream, numbers, dict(self._states), self._rows)
        with read_ahead(rows, self.workers) as items:
            yield self._counted(items)

    def _counted(self, items: Iterator[tuple[int, Batch, Stats, dict[str, Any]]]) -> Iterator[Row]:
        """The rows of ``items``; moves the counters and states of this loader with every row handed out."""
        for number, batch, stats, state in items:
            row = Row(batch, self._rows * self.world + self.rank, stats)
            self._rows += 1
            self._states[str(number)] = state
            for name, reason in self._skips.add(stats).items():
                log.warning("skipped %s: %s", name, reason)
            yield row

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the last row it handed out; JSON-able. ``merge_states`` joins the ranks'."""
        return {
            "rows": self._rows * self.world,
            "plan": _plain(self.plan, self.lengths),
            "streams": dict(self._states),
            "skipped": dict(self._skips.reasons),
            "skips": {"events": self._skips.events, "draws": self._skips.draws},
            "generations": dict(self._generations),
        }

    def load_state_dict(self, state: Mapping[str, Any], grown: bool = False) -> None:
        """Continues after the row that ``state`` was taken behind, with any number of workers and ranks.

        With ``grown`` data sets may be longer than they were: each then begins an epoch of all its rows.

        Raises ``ValueError`` when the rows would not be those of the saved run: other data, budgets, seed or streams; a
        number of rows that the ranks cannot share; or streams of another rank missing (see ``merge_states``).
        """
        now = _plain(self.plan, self.lengths)
        saved = {"order": "global", "buffer": BUFFER, "reading": {}, "prompts": {}, "samples": None} | state["plan"]
        longer = [n for n, length in self.lengths.items() if length > saved["lengths"].get(n, length)]
        for name in now:
            if name == "lengths" and longer and now[name] == saved[name] | {n: self.lengths[n] for n in longer}:
                if grown:
                    continue
                raise ValueError(
                    f"cannot resume: data set {longer[0]!r} had {saved[name][longer[0]]} rows when the state was saved "
                    f"and has {self.lengths[longer[0]]} now; to go on with grown data say so (--grown-data)"
                )
            if saved.get(name) != now[name]:
                raise ValueError(
                    f"cannot resume: {name} was {saved.get(name)} when the state was saved and is {now[name]} now"
                )
        rows, rest = divmod(state["rows"], self.world)
        if rest:
            raise ValueError(f"cannot resume: {state['rows']} rows do not divide among {self.world} ranks")
        numbers = range(self.rank, min(self.plan.streams, state["rows"]), self.world)
        if missing := [s for s in numbers if str(s) not in state["streams"]]:
            raise ValueError(f"cannot resume: the state lacks streams {missing}; merge the states of all ranks first")
        self._rows = rows
        self._generations = dict(state.get("generations", {}))
        self._generations |= {name: self._generations.get(name, 0) + 1 for name in longer}
        self._states = {str(s): _regrown(state["streams"][str(s)], longer) for s in numbers}
        self._skips.reasons = dict(state["skipped"])
        if self.rank == 0:  # the state counts for all ranks, and their counts are added when they are saved
            counts = state.get("skips", {"events": 0, "draws": 0})
            self._skips.events, self._skips.draws = counts["events"], counts["draws"]

    def _mixture(self, stream: int, sources: Mapping[str, Source]) -> Mixture:
        plan = self.plan
        return Mixture(
            sources, plan.weights, plan.seed, stream, plan.streams, self._generations, plan.order, plan.buffer
        )

    def _stream(self, number: int) -> Stream:
        mixture = self._mixture(number, self.sources)
        return Stream(mixture, self.plan, self.sources, self.lay_out, self.routes, self.pad_to, self._skips.limit)


def _regrown(stream: Mapping[str, Any], grown: Iterable[str]) -> dict[str, Any]:
    """The state of a stream whose data sets have ``grown``: the draws from them so far belong to the rows of before."""
    mixture = stream["mixture"]
    starts = mixture.get("starts", {}) | {name: mixture["counts"][name] for name in grown}
    return {**stream, "mixture": mixture | ({"starts": starts} if starts else {})}


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks. Raises ``ValueError`` when their rows or plans differ."""
    states = list(states)
    if not states:
        raise ValueError("there are no states to merge")
    for name in ("rows", "plan", "generations"):
        if any(s[name] != states[0][name] for s in states):
            raise ValueError(f"the ranks' states differ in {name!r}: {[s[name] for s in states]}")
    merged = {key: {k: v for s in states for k, v in s[key].items()} for key in ("streams", "skipped")}
    skips = {what: sum(s["skips"][what] for s in states) for what in ("events", "draws")}
    return {**{name: states[0][name] for name in ("rows", "plan", "generations")}, **merged, "skips": skips}


def _plain(plan: LoaderConfig, lengths: Mapping[str, int]) -> dict[str, Any]:
    return asdict(plan) | {"lengths": dict(lengths)}


def _too_many(reasons: Mapping[str, str], limit: int | float, count: int, draws: int = 0) -> str:
    first = "\n".join(f"  {name}: {reason}" for name, reason in list(reasons.items())[:NAMED])
    more = f"\n  and {count - NAMED} more" if count > NAMED else ""
    within = f" in {draws} draws" if draws else ""
    allowed = f"{limit:.3%} of them" if isinstance(limit, float) else limit
    return f"{count} bad samples{within}, and the limit is {allowed}:\n{first}{more}"


@contextmanager
def _naming(note: str) -> Iterator[None]:
    """Adds ``note`` to whatever is raised inside, so that the trace says which sample it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise
