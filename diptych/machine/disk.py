"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from threading import get_ident


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: a reader sees the old content or the new one."""
    with atomic(path) as part:
        part.write_text(text, "utf-8")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, unique to this thread; it is renamed to ``path`` on success and removed
    on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` on a temporary folder, then renames it ``folder``: a kill leaves the old one or the new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    tmp, old = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), folder.with_name(f".{folder.name}.old")
    for stale in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    try:
        tmp.mkdir()
        write(tmp)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        recover(folder)
        shutil.rmtree(tmp, ignore_errors=True)


def recover(folder: Path) -> None:
    """Brings back the old folder where a kill fell between the two renames of ``write_folder``."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
