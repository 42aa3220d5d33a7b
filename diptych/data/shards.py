"""Webdataset shards of any source, statistics of laid-out samples, and the speed of a loader."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.layout import Layout
from diptych.core.sample import Image, Sample, sample_to_json
from diptych.data.catalog import files_left_out
from diptych.data.encoded import add_member, shard_name, written
from diptych.data.loader import Loader
from diptych.data.mixture import Source, permuted
from diptych.data.reading import read
from diptych.machine.addresses import is_remote
from diptych.machine.disk import write_text
from diptych.parts.images import png_bytes


def shard(
    source: Source,
    folder: Path,
    *,
    rows: int = 1000,
    seed: int | None = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Writes a data set as webdataset shards of ``rows`` rows, shuffled by ``seed`` (None: in order); process ``rank``
    of ``world`` writes every ``world``-th. Returns counts of rows, pictures and shards, and why rows were skipped.
    Shards that an earlier call with the same settings wrote are kept (``.shards.json`` names them); no other file is
    touched. Raises ``ValueError`` where the folder holds shards of other settings, or files of those names that this
    function did not write.

    Pictures keep their bytes (a picture that cannot be decoded skips its row); generated pictures become PNG. A catalog
    reads the folder with
    ``{format: webdataset, path: FOLDER/*.tar}``; ``webdataset`` and other readers of its layout read it too."""
    total = len(source)
    shards = range(rank, -(-total // rows), world)
    report: dict[str, Any] = {"rows": 0, "pictures": 0, "shards": len(shards), "skipped": {}}
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"data_set": source.name, "length": total, "rows": rows, "seed": seed}, -(-total // rows))
    for k in shards:
        places = range(k * rows, min((k + 1) * rows, total))
        progress(len(places))
        if (folder / shard_name(k)).is_file():
            continue
        with written(folder / shard_name(k)) as tar:
            for place in places:
                index = place if seed is None else permuted(place, total, seed, "shards", source.name)
                try:
                    row, pictures = _row(source, index)
                except (ValueError, OSError) as error:
                    report["skipped"][f"{source.name}/{index}"] = str(error)
                    continue
                key = f"{index:09d}"
                add_member(tar, f"{key}.json", json.dumps(row).encode())
                for extension, data in pictures.items():
                    add_member(tar, f"{key}.{extension}", data)
                report["rows"] += 1
                report["pictures"] += len(pictures)
    return report


def _claim(folder: Path, settings: dict[str, Any], shards: int) -> None:
    """Writes what the folder's shards are made from. Raises ``ValueError`` where they are made from something else."""
    index = folder / ".shards.json"
    try:
        there = json.loads(read(index))
    except FileNotFoundError:
        there = None
    except (OSError, ValueError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
    if there is not None and there != settings:
        raise ValueError(f"{folder} holds shards of {there}, not of {settings}; name another folder")
    taken = [] if there else [name for name in map(shard_name, range(shards)) if (folder / name).exists()]
    if taken:
        raise ValueError(f"{folder / taken[0]} was not written by `diptych data shard`; name another folder")
    if there is None:
        write_text(index, json.dumps(settings))


def _row(source: Any, index: int) -> tuple[dict, dict[str, bytes]]:
    """The JSON row of a sample whose pictures are named by extension, and the pictures."""
    stored = hasattr(source, "data")
    decoded: Sample = source[index]  # raises for what a training would skip
    sample = source.row(index) if stored else decoded
    pictures: dict[str, bytes] = {}

    def named(image: Image) -> Image:
        number = len(pictures)
        if stored:
            data = source.data(index, str(image.image))
            suffix = str(image.image).rpartition(".")[2].lower() or "png"
        else:
            data, suffix = png_bytes(image.pixels), "png"
        pictures[f"{number}.{suffix}"] = data
        return replace(image, image=f"{number}.{suffix}")

    return sample_to_json(sample.map_images(named)), pictures


# ---- statistics -----------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Token counts and picture shapes of a data set's samples, as a model lays them out."""

    rows: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # row -> why
    tokens: list[int] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)  # tokens by kind of segment
    supervised: int = 0
    no_target: int = 0  # rows without text with loss and without a target picture
    left_out: Mapping[str, int] = field(default_factory=dict)  # files that are not read, by suffix
    shapes: Counter = field(default_factory=Counter)  # pictures by size and kind

    def add(self, other: Lengths) -> None:
        """Adds the counts of other rows of the same data set."""
        self.rows, self.supervised = self.rows + other.rows, self.supervised + other.supervised
        self.no_target += other.no_target
        self.skipped |= other.skipped
        self.tokens += other.tokens
        self.kinds.update(other.kinds)
        self.shapes.update(other.shapes)
        self.left_out = self.left_out or other.left_out

    def to_json(self) -> dict[str, Any]:
        """Counts, and quantiles of the lengths."""
        q = {f"p{p}": float(np.percentile(self.tokens, p)) for p in (5, 50, 95)} if self.tokens else {}
        return {
            "rows": self.rows,
            "bad": len(self.skipped),
            "skipped": self.skipped,
            "tokens": sum(self.tokens),
            "longest": max(self.tokens, default=0),
            **q,
            "kinds": {str(k): n for k, n in self.kinds.most_common()},
            "supervised": self.supervised,
            "no_target": self.no_target,
            "left_out": dict(self.left_out),
            "shapes": {shape: n for shape, n in self.shapes.most_common()},
        }


def stats(
    sources: Mapping[str, Source],
    lay_out: Callable[[Sample], Layout],
    limit: int = 1000,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Lengths]:
    """Lengths, kinds of tokens and shapes of pictures of the first ``limit`` rows of every data set; process ``rank``
    of ``world`` counts every ``world``-th row."""
    out = {}
    for name, source in sources.items():
        lengths = out[name] = Lengths(left_out=files_left_out(source))
        for index in range(rank, min(limit, len(source)), world):
            try:
                sample = source[index]
                layout = lay_out(sample)
            except (ValueError, OSError) as error:
                lengths.skipped[f"{name}/{index}"] = str(error)
                continue
            lengths.rows += 1
            lengths.no_target += not sample.has_target
            lengths.tokens.append(len(layout))
            for s in layout.segments:
                lengths.kinds[s.kind] += len(s)
                lengths.supervised += s.supervised + (s.open if s.generated else 0)
                if s.image is not None:
                    shape = s.image.shape
                    lengths.shapes[f"{shape[-1]}x{shape[-2]} {'encoded' if s.encoded else s.kind}"] += 1
    return out


def write_stats(counts: Mapping[str, Lengths], file: Path) -> None:
    """Writes the counts of one share for ``merge_stats``. Raises ``ValueError`` where another file has that name."""
    if file.exists():
        merge_stats([file])
    rows = {name: {**vars(c), "kinds": {str(k): n for k, n in c.kinds.items()}} for name, c in counts.items()}
    write_text(file, json.dumps(rows))


def merge_stats(files: Sequence[Path]) -> dict[str, Lengths]:
    """The counts of all shares together. Raises ``ValueError`` for a file that ``write_stats`` did not write."""
    merged: dict[str, Lengths] = {}
    for file in files:
        try:
            rows = json.loads(read(file))
            parts = {name: Lengths(**row) for name, row in rows.items()}
            for part in parts.values():
                part.kinds, part.shapes = Counter(part.kinds), Counter(part.shapes)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} was not written by `diptych data stats --out`: {error}") from error
        for name, part in parts.items():
            merged.setdefault(name, Lengths()).add(part)
    return merged


# ---- speed ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """The throughput of a loader per second of waiting for it, how full its rows are, and what a sample costs: files
    opened, reads (requests, where remote) and bytes."""

    rows: int
    seconds: float
    tokens_per_second: float
    samples_per_second: float
    pictures_per_second: float
    fill: float
    skipped: int
    opens_per_sample: float
    reads_per_sample: float
    bytes_per_sample: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def speed(loader: Loader, rows: int, warm: int = 2) -> Speed:
    """The speed of a loader over ``rows`` rows, after ``warm`` that are not counted."""
    endless: Iterator = iter(loader)
    for _ in range(warm):
        next(endless)
    start = time.perf_counter()
    rows_read = list(islice(endless, rows))
    seconds = time.perf_counter() - start
    stats = [row.stats for row in rows_read]
    samples = sum(sum(t.samples.values()) for t in stats)
    return Speed(
        rows,
        seconds,
        sum(t.tokens for t in stats) / seconds,
        samples / seconds,
        sum(t.pictures for t in stats) / seconds,
        sum(t.fill for t in stats) / rows,
        len(loader.skipped),
        sum(t.files.opens for t in stats) / samples,
        sum(t.files.reads for t in stats) / samples,
        sum(t.files.bytes for t in stats) / samples,
    )
