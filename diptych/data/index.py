"""The index of a data set: where each row is, in memory or in one file that processes share.

A row is a record of a few bytes that its format defines (``data/sources.py``). Rows that are next to each other in one
file form a shard: a whole tar, a row group of a parquet file, some thousand lines of a jsonl file. Shards are what
``order: shards`` shuffles and what digests are kept of.

::

    magic  records  end of each record (uint64)  header (JSON)  length of the header

The file is mapped into memory, so a process holds the pages that it reads. A shard's records are compared with their
digest, and the file that they describe with its size and the digest of its first bytes, when one of its rows is first
read."""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.reading import read
from diptych.machine import addresses, disk

MAGIC = b"diptych index 1\n"
HEAD = 4096  # bytes at the start of a file whose digest is kept
SUFFIX = ".index"


@dataclass(frozen=True)
class Scanned:
    """What a scan of one file yields: a record for each row, the rows of each shard, and the files left out."""

    records: Sequence[bytes]
    shards: Sequence[int]
    left_out: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0  # of a format without records
    folder: bool = False  # what was scanned is a folder


Scan = Callable[[Path], Scanned]


@dataclass(frozen=True, eq=False)
class Index:
    """The rows of a data set. ``shard_ends[k]`` is the number of rows up to the end of shard k."""

    files: tuple[Path, ...]
    shard_files: np.ndarray = field(repr=False)  # the file of each shard, as a place in ``files``
    shard_ends: np.ndarray = field(repr=False)
    left_out: Mapping[str, int] = field(default_factory=dict)
    ends: Any = field(default=None, repr=False)  # where each record ends; None for a format without records
    records: Any = field(default=b"", repr=False)
    digests: Sequence[str] = ()  # of each shard's records; none for an index in memory
    heads: Sequence[tuple[int, str]] = ()  # (size, digest of the first bytes) of each file
    where: Path | None = None  # the index's file
    settings: Mapping[str, Any] = field(default_factory=dict)  # it was written for
    checked: set[int] = field(default_factory=set, repr=False)  # shards that were compared with their digests

    def __len__(self) -> int:
        return int(self.shard_ends[-1]) if len(self.shard_ends) else 0

    def shard(self, row: int) -> int:
        """The shard of a row."""
        return int(np.searchsorted(self.shard_ends, row, side="right"))

    def first(self, shard: int) -> int:
        """The first row of a shard."""
        return int(self.shard_ends[shard - 1]) if shard else 0

    def first_shard(self, shard: int) -> int:
        """The first shard of the file that holds a shard."""
        return int(np.searchsorted(self.shard_files, self.shard_files[shard]))

    def place(self, row: int) -> tuple[Path, int, int]:
        """(file, shard, row in the shard). Raises ``ValueError`` where the shard differs from what was indexed."""
        shard = self.shard(row)
        if self.where and shard not in self.checked:
            self.check(shard)
        return self.files[self.shard_files[shard]], shard, row - self.first(shard)

    def file(self, row: int) -> Path:
        """The file of a row."""
        return self.files[self.shard_files[self.shard(row)]]

    def record(self, row: int) -> bytes:
        """The record of a row. Raises ``ValueError`` as ``place`` does."""
        self.place(row)
        return bytes(self.records[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])])

    def check(self, shard: int) -> None:
        """Compares a shard with its digests. Raises ``ValueError`` where it differs."""
        file = self.files[self.shard_files[shard]]
        first, end = self.first(shard), int(self.shard_ends[shard])
        if self.ends is not None and _digest(self._span(first, end)) != self.digests[shard]:
            raise ValueError(f"index {self.where} is damaged in shard {shard}, of {file}; write it again")
        size, head = self.heads[self.shard_files[shard]]
        if size and (addresses.size_of(file) != size or _digest(read(file, 0, min(size, HEAD))) != head):
            raise ValueError(f"index {self.where} describes another {file} than the one there; write it again")
        self.checked.add(shard)

    def _span(self, first: int, end: int) -> bytes:
        return bytes(self.records[int(self.ends[first - 1]) if first else 0 : int(self.ends[end - 1]) if end else 0])

    def __reduce__(self) -> Any:
        if self.where:  # the pages of the file are shared, not copied
            return load, (self.where, self.files, self.settings)
        return Index, (self.files, self.shard_files, self.shard_ends, self.left_out, self.ends, self.records)


def build(files: Sequence[Path], scan: Scan, left_out: Mapping[str, int] | None = None) -> Index:
    """The index of files, in memory."""
    records, sizes, shard_files, lengths, has_records = list[bytes](), [], list[int](), list[int](), True
    others = Counter(left_out or {})
    for number, file in enumerate(files):
        scanned = scan(file)
        records.append(b"".join(scanned.records))
        sizes.append(np.fromiter(map(len, scanned.records), np.uint64, len(scanned.records)))
        has_records = has_records and not scanned.rows
        shard_files += [number] * len(scanned.shards)
        lengths += scanned.shards
        others.update(scanned.left_out)
    ends = np.cumsum(np.concatenate(sizes), dtype=np.uint64) if sizes and has_records else None
    kept = {suffix: n for suffix, n in others.items() if n}
    places, shard_ends = np.array(shard_files, np.int64), np.cumsum(np.array(lengths, np.int64))
    return Index(tuple(files), places, shard_ends, kept, ends, b"".join(records))


def write(
    out: Path,
    files: Sequence[Path],
    scan: Scan,
    settings: Mapping[str, Any],
    *,
    left_out: Mapping[str, int] | None = None,
    processes: int = 1,
    progress: Callable[[int], None] = lambda files: None,
) -> int:
    """Scans files with several processes and writes their index, atomically; returns its number of rows.

    ``settings`` are what decides the rows besides the files. ``progress`` is called with the number of files scanned
    since the last call. Memory grows by eight bytes a row."""
    header: dict[str, Any] = {"settings": dict(settings), "files": [f.name for f in files], "heads": []}
    header |= {"shard_files": [], "shard_ends": [], "digests": []}
    others, ends, has_records, rows = Counter(left_out or {}), [np.zeros(0, np.uint64)], True, 0
    with disk.atomic(out) as part, part.open("wb") as file:
        file.write(MAGIC)
        for number, (scanned, head) in enumerate(_scans(files, scan, processes)):
            first, begin = 0, file.tell() - len(MAGIC)
            for length in scanned.shards:
                span = b"".join(scanned.records[first : first + length])
                file.write(span)
                header["shard_files"].append(number)
                header["shard_ends"].append(rows := rows + length)
                header["digests"].append(_digest(span))
                first += length
            header["heads"].append(head)
            sizes = np.fromiter(map(len, scanned.records), np.uint64, len(scanned.records))
            ends.append(np.cumsum(sizes, dtype=np.uint64) + np.uint64(begin))
            has_records = has_records and not scanned.rows
            others.update(scanned.left_out)
            progress(1)
        if not rows:
            raise ValueError(f"{out}: the data set holds no rows")
        header |= {"left_out": {suffix: n for suffix, n in others.items() if n}, "records": file.tell() - len(MAGIC)}
        file.write(bytes(-file.tell() % 8))
        header["ends"] = file.tell() if has_records else None
        if has_records:
            file.write(np.concatenate(ends).tobytes())
        text = json.dumps(header).encode()
        file.write(text + len(text).to_bytes(8, "little"))
    return rows


def _scans(files: Sequence[Path], scan: Scan, processes: int) -> Iterator[tuple[Scanned, tuple[int, str]]]:
    """The scans of files in order, with (size, digest of the head) of each, by several processes."""
    work = partial(_scan, scan)
    if processes < 2 or len(files) < 2:
        yield from map(work, files)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        try:
            yield from pool.map(work, files, chunksize=max(1, min(16, len(files) // (4 * processes))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _scan(scan: Scan, file: Path) -> tuple[Scanned, tuple[int, str]]:
    if (scanned := scan(file)).folder:
        return scanned, (0, "")
    size = addresses.size_of(file)
    return scanned, (size, _digest(read(file, 0, min(size, HEAD))))


def load(file: Path, files: Sequence[Path], settings: Mapping[str, Any]) -> Index:
    """The index in ``file`` of the data set's ``files``. Raises ``ValueError`` where it is damaged, was written with
    other settings, or describes other files."""
    again = f"write it again with `diptych data index`, or remove {file}"
    with addresses.local_copy(file).open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if mapped[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{file} is no index of this version; {again}")
    length = int.from_bytes(mapped[-8:], "little")
    try:
        header = json.loads(mapped[-8 - length : -8])
        rows = header["shard_ends"][-1]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"index {file} is damaged or cut off: {error}; {again}") from error
    if header["settings"] != json.loads(json.dumps(dict(settings))):
        raise ValueError(f"index {file} was written for {header['settings']}, not for {dict(settings)}; {again}")
    names = [f.name for f in files]
    if header["files"] != names:
        changed = sorted(set(header["files"]) ^ set(names)) or ["their order"]
        raise ValueError(f"index {file} describes other files (first difference: {changed[0]}); {again}")
    return Index(
        tuple(files),
        np.array(header["shard_files"], np.int64),
        np.array(header["shard_ends"], np.int64),
        header["left_out"],
        np.frombuffer(mapped, np.uint64, rows, header["ends"]) if header["ends"] is not None else None,
        memoryview(mapped)[len(MAGIC) : len(MAGIC) + header["records"]],
        header["digests"],
        header["heads"],
        file,
        dict(settings),
    )


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()


def default_processes() -> int:
    """How many processes index a data set: one for each processor that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fields(*parts: object) -> bytes:
    """A record of several fields."""
    return "\0".join(map(str, parts)).encode("utf-8", "surrogateescape")


def split(record: bytes) -> list[str]:
    """The fields of a record."""
    return record.decode("utf-8", "surrogateescape").split("\0")


def chunks(rows: int, size: int) -> list[int]:
    """``rows`` as shards of at most ``size`` rows."""
    return [min(size, rows - start) for start in range(0, rows, size)]
