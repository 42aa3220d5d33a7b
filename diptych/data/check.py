"""Validation of a catalog: every row is read, and rows that are broken or carry no target are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diptych.core.sample import Sample, Text
from diptych.data.catalog import CatalogEntry, read_catalog
from diptych.data.sources import decode, describe_left_out


class Problem(NamedTuple):
    """A row (or a whole data set) that cannot be used; ``reason`` begins with the file and line."""

    data_set: str
    reason: str


@dataclass
class DataSetTally:
    """Counts over the rows of a data set that were read. Sizes are (width, height) in pixels."""

    rows: int = 0  # rows read, good and bad
    of: int = 0  # rows in the data set
    bad: int = 0
    pictures: int = 0
    targets: int = 0
    characters: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    no_target: int = 0  # readable rows without text with loss and without a target picture
    left_out: dict[str, int] = field(default_factory=dict)  # files of the folder that are not read, by suffix


@dataclass(frozen=True)
class Report:
    """The result of ``check``. ``str(report)`` is the table that the command line prints."""

    problems: tuple[Problem, ...]
    tallies: Mapping[str, DataSetTally] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every row that was read can be used."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "ok": self.ok,
            "problems": [p._asdict() for p in self.problems],
            "data_sets": {name: asdict(tally) for name, tally in self.tallies.items()},
        }

    def __str__(self) -> str:
        head = (
            "data set",
            "rows",
            "of",
            "bad",
            "no target",
            "pictures",
            "targets",
            "characters",
            "smallest",
            "largest",
        )
        lines: list[tuple[str, ...]] = [head]
        for name, t in self.tallies.items():
            sizes = ("x".join(map(str, s)) if s else "-" for s in (t.smallest, t.largest))
            lines.append(
                (name, *map(str, (t.rows, t.of, t.bad, t.no_target, t.pictures, t.targets, t.characters)), *sizes)
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        reasons = [f"{p.data_set}: {p.reason}" for p in self.problems]
        left_out = [
            f"{name}: leaves out {describe_left_out(t.left_out)}" for name, t in self.tallies.items() if t.left_out
        ]
        verdict = f"problems: {len(reasons)}" if reasons else "every row can be used"
        return "\n".join([*table, "", *left_out, *reasons, verdict])


def check(catalog_path: str | Path, limit: int | None = None) -> Report:
    """Reads every row of every data set of a catalog (the first ``limit`` of each) and decodes every picture.

    Rows and pictures that cannot be read, rows without a target (no text with loss, no picture to draw), ids that come
    twice, and data sets that cannot be opened are problems in the report; a catalog that cannot be read raises
    ``ValueError``. Files that a data set leaves out are counted by suffix; they are no problem by themselves.
    """
    problems: list[Problem] = []
    tallies: dict[str, DataSetTally] = {}
    for name, entry in read_catalog(catalog_path).items():
        tallies[name] = DataSetTally()
        problems += [Problem(name, reason) for reason in _problems(entry, tallies[name], limit)]
    return Report(tuple(problems), tallies)


def _problems(entry: CatalogEntry, tally: DataSetTally, limit: int | None) -> Iterator[str]:
    try:
        source = entry.open()
    except ValueError as error:
        yield str(error)
        return
    tally.of, tally.left_out = len(source), dict(source.left_out)
    seen: dict[str, int] = {}
    for index in range(tally.of if limit is None else min(limit, tally.of)):
        tally.rows += 1
        where = source.where(index)
        try:
            row = source.row(index)
            sample = decode(row, where, partial(source.picture, index))
        except ValueError as error:
            tally.bad += 1
            yield str(error)
            continue
        if not sample.has_target:
            tally.no_target += 1
            yield f"{where}: the row has no target: no text with loss and no picture to draw"
        if (first := seen.setdefault(row.id, index)) != index:
            tally.bad += 1
            yield f"{where}: id {row.id!r} comes twice; first in {source.where(first)}"
        _count(sample, tally)


def _count(sample: Sample, tally: DataSetTally) -> None:
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                tally.characters += len(part.text)
                continue
            size = part.pixels.size
            tally.pictures += 1
            tally.targets += part.role == "target"
            tally.smallest = min(tally.smallest or size, size, key=_area)
            tally.largest = max(tally.largest or size, size, key=_area)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
