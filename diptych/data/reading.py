"""Reads of byte ranges of local and remote files, counted. Local files stay open between reads."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from diptych.machine import addresses

OPEN = 128  # local files that a process keeps open


@dataclass(eq=True, unsafe_hash=True)
class Counts:
    """Files opened, reads (requests, where remote) and bytes."""

    opens: int = 0
    reads: int = 0
    bytes: int = 0

    def since(self, before: Counts) -> Counts:
        """The difference to earlier counts."""
        return Counts(self.opens - before.opens, self.reads - before.reads, self.bytes - before.bytes)

    def copy(self) -> Counts:
        """The counts as they are now."""
        return Counts(**asdict(self))


COUNTS = Counts()  # of this process since it started


_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def whole_files(wanted: bool = True) -> Iterator[None]:
    """Inside, a read of a part of a remote file first copies the whole file to the cache: right where neighbouring rows
    are read next."""
    before = _WHOLE.set(wanted)
    try:
        yield
    finally:
        _WHOLE.reset(before)


class _Handle:
    """An open file; it is closed when nobody refers to it any more. Reads name their place, so forks may share it."""

    def __init__(self, path: Path, stamp: tuple[int, ...]) -> None:
        self.number, self.stamp = os.open(path, os.O_RDONLY), stamp
        COUNTS.opens += 1

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_HANDLES: OrderedDict[str, _Handle] = OrderedDict()
_LOCK = Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_LOCK=Lock()))


def _handle(path: Path) -> _Handle:
    stat = os.stat(path)
    stamp = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    with _LOCK:
        held = _HANDLES.get(str(path))
        if held is None or held.stamp != stamp:
            held = _HANDLES[str(path)] = _Handle(path, stamp)
        _HANDLES.move_to_end(str(path))
        while len(_HANDLES) > OPEN:
            _HANDLES.popitem(last=False)
        return held


def read(path: Path, start: int = 0, size: int | None = None) -> bytes:
    """``size`` bytes of a file from ``start`` on (None: to its end); fewer where it ends before.

    A remote file is read from its local copy where this process has one. Raises ``OSError``."""
    if addresses.is_remote(path):
        part = (bool(start) or size is not None) and path.suffix not in addresses.COMPRESSED
        copy = None
        if part:  # of a compressed file the copy has other bytes
            copy = addresses.local_copy(path) if _WHOLE.get() else addresses.known_copy(path)
        if copy:
            path = copy
        else:
            system, key = addresses.file_system(path)
            end = None if size is None else start + size
            data = addresses.retried(lambda: system.cat_file(key, start=start or None, end=end), path)
            COUNTS.reads += 1
            COUNTS.bytes += len(data)
            return data
    if not start and size is None:  # a file of its own, such as a picture
        data = path.read_bytes()
        COUNTS.opens += 1
        COUNTS.reads += 1
        COUNTS.bytes += len(data)
        return data
    handle = _handle(path)
    size = max(0, handle.stamp[-1] - start) if size is None else size
    pieces = []
    while size > 0 and (piece := os.pread(handle.number, min(size, 2**30), start)):
        pieces.append(piece)
        start, size = start + len(piece), size - len(piece)
    COUNTS.reads += 1
    COUNTS.bytes += sum(map(len, pieces))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Stream:
    """A seekable file for libraries that read one (pyarrow, tarfile): every read goes through ``read``."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.size, self.closed = path, 0, addresses.size_of(path), False

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, or all that are left."""
        left = max(0, self.size - self.place)
        size = left if size is None or size < 0 else min(size, left)
        data = read(self.path, self.place, size) if size else b""
        self.place += len(data)
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        """Moves as ``io.IOBase.seek`` does."""
        self.place = place + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        """The place in the file."""
        return self.place

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """False."""
        return False

    def close(self) -> None:
        """Nothing is held open by this object."""
        self.closed = True

    def flush(self) -> None:
        """Nothing is written."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
