"""Files and folders that are written whole or not at all: the one atomic writer of the library.

Content is written under a temporary name in the same folder, flushed to the disk and renamed. A reader sees the old
content or the new one, also after a kill or a power failure. Any error, a full disk included, removes what is
temporary."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from threading import get_ident

from diptych.machine import addresses


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    with atomic(path) as part:
        part.write_text(text, "utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic(path) as part:
        part.write_bytes(data)


def check_folder(folder: Path) -> None:
    """Raises ``ValueError`` for a folder that cannot be written into: a file is in its way, or it is read-only. Of a
    remote address nothing is checked."""
    if addresses.is_remote(folder):
        return
    above = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not above.is_dir():
        raise ValueError(f"{above} is a file; a folder is needed there")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{above} is read-only")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, unique to this thread; it is renamed to ``path`` on success and removed
    on an error. Missing folders above ``path`` are made. For a remote address the temporary file is local, and it is
    uploaded."""
    if addresses.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (local := Path(folder) / path.name)
            addresses.upload(local, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.part")
    try:
        yield part
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk (fsync)."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def flush_all(folder: Path) -> None:
    """``flush`` for every file and folder below ``folder``, and for ``folder`` itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` on a temporary folder, then renames it ``folder``: a kill leaves the old one or the new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    tmp, old = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), folder.with_name(f".{folder.name}.diptych-old")
    for stale in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):  # of a process that was killed
        if stale.suffixes[-2:-1] and stale.suffixes[-2][1:].isdecimal():
            shutil.rmtree(stale, ignore_errors=True)
    try:
        tmp.mkdir()
        write(tmp)
        flush_all(tmp)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        recover(folder)
        shutil.rmtree(tmp, ignore_errors=True)


def recover(folder: Path) -> None:
    """Brings back the old folder where a kill fell between the two renames of ``write_folder``."""
    old = folder.with_name(f".{folder.name}.diptych-old")
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def write_into(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` on a temporary folder inside ``folder``, then moves its files, one by one, over those of the same
    names. No other file is touched. Raises ``ValueError`` where a folder stands in the place of a file or the reverse.
    """
    tmp = folder / f".diptych.{os.getpid()}.tmp"
    tmp.mkdir()
    try:
        write(tmp)
        flush_all(tmp)
        files = [path.relative_to(tmp) for path in sorted(tmp.rglob("*")) if path.is_file()]
        for file in files:
            blocked = [p for p in (folder / parent for parent in file.parents) if p.exists() and not p.is_dir()]
            blocked += [folder / file] if (folder / file).is_dir() else []
            if blocked:
                raise ValueError(f"{blocked[0]} is in the way of {folder / file}")
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(tmp / file, folder / file)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
