"""Files by address: a local path, or ``s3://``, ``gs://``, ``https://`` and ``hf://`` through fsspec.

``address`` turns text into a path object. Remote ones are ``UPath`` objects of universal_pathlib, which have the
methods of ``pathlib.Path``. Requests are repeated with back-off where the network or the server fails. ``local_copy``
keeps whole remote files in a folder of limited size: ``DIPTYCH_CACHE`` (default ``~/.cache/diptych``), at most
``DIPTYCH_CACHE_GB`` (default 50).
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast

from diptych.machine.extras import install

T = TypeVar("T")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
COMPRESSED = (".gz", ".zst")
TRIES = 5
PAUSE = 0.5  # seconds before the second try; each pause is twice the one before
# what a file system raises where another try gives the same answer
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def scheme(text: str | os.PathLike[str]) -> str:
    """``s3`` of ``s3://bucket/key``; empty for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(text))
    return match[1].lower() if match else ""


def is_remote(path: Any) -> bool:
    """Whether a path is an address that ``address`` made of a URL."""
    return not isinstance(path, str) and scheme(path) in PACKAGES


def address(text: str | os.PathLike[str]) -> Path:
    """The path of a text; a path stays as it is. Raises ``ValueError`` for an unknown scheme and for one whose package
    is not installed."""
    if not isinstance(text, str):
        return cast(Path, text)
    kind = scheme(text)
    if not kind:
        return Path(text).expanduser()
    if kind not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ValueError(f"{text!r}: unknown scheme {kind}://; choose from {known}, or give a local path")
    if not re.match(r"[^:/]+://[^/]", text):
        raise ValueError(f"{text!r} names no host or bucket; an address looks like {kind}://NAME/PATH")
    _need(kind)
    from upath import UPath

    return cast(Path, UPath(text))


def _need(kind: str) -> None:
    """Raises ``ValueError`` where the package of a scheme is not installed."""
    from importlib.util import find_spec

    if find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"{kind}:// needs {PACKAGES[kind]}: {install('remote')}")


def join(folder: Path, text: str) -> Path:
    """The path of ``text``: an address or an absolute path as it is, any other inside ``folder``."""
    return address(text) if scheme(text) else folder / text


def file_system(path: Path) -> tuple[Any, str]:
    """The fsspec file system of an address, in this process, and the address's key in it."""
    import fsspec

    remote = cast(Any, path)
    return fsspec.filesystem(remote.protocol, **remote.storage_options), remote.path


def retried(work: Callable[[], T], path: Any) -> T:
    """The result of ``work``; it is repeated up to ``TRIES`` times with growing pauses where it fails.

    Raises ``FileNotFoundError`` and other lasting errors at once, and ``ConnectionError`` after the last try."""
    failures: tuple[type[BaseException], ...] = (OSError, asyncio.TimeoutError)
    with suppress(ImportError):
        from aiohttp import ClientError

        failures = (*failures, ClientError)
    for number in range(1, TRIES + 1):
        try:
            return work()
        except FINAL:
            raise
        except failures as error:
            if getattr(error, "status", 500) in (400, 401, 403, 404, 405, 410):
                raise PermissionError(f"{path} is refused: {error}") from error
            if number == TRIES:
                raise ConnectionError(
                    f"{path} cannot be read after {TRIES} tries: {type(error).__name__}: {error}"
                ) from error
            time.sleep(PAUSE * 2 ** (number - 1) * random.uniform(0.75, 1.25))
    raise AssertionError("unreachable")


def size_of(path: Path) -> int:
    """The size of a file in bytes."""
    if not is_remote(path):
        return path.stat().st_size
    return int(_info(path)["size"] or 0)


def upload(local: Path, path: Path) -> None:
    """Copies a local file, or a folder with all its files, to an address."""
    system, key = file_system(path)
    if local.is_dir():
        for file in sorted(local.rglob("*")):
            if file.is_file():
                upload(file, path / file.relative_to(local).as_posix())
        return
    if scheme(path) in ("http", "https"):
        raise ValueError(f"{path} cannot be written: http addresses are read only")
    retried(lambda: system.put_file(str(local), key), path)


def _info(path: Path) -> Mapping[str, Any]:
    system, key = file_system(path)
    return retried(lambda: system.info(key), path)


# ---- whole files on the local disk ----------------------------------------------------------------------------------

_COPIES: dict[str, Path] = {}  # of this process: address -> its copy


def cache_folder() -> Path:
    """The folder of local copies."""
    return Path(os.environ.get("DIPTYCH_CACHE", "~/.cache/diptych")).expanduser() / "files"


def known_copy(path: Path) -> Path | None:
    """The local copy of a file that this process has asked for before, if it is still there."""
    copy = _COPIES.get(str(path))
    return copy if copy and copy.is_file() else None


def local_copy(path: Path) -> Path:
    """A local file with the content of ``path``, uncompressed where it ends with .gz or .zst; ``path`` itself where
    that is a plain local file. Processes share the copies. Raises ``OSError`` and ``ValueError`` naming the file."""
    if not is_remote(path) and path.suffix not in COMPRESSED:
        return path
    if copy := known_copy(path):
        with suppress(OSError):  # another process may have removed it
            stat = copy.stat()
            if time.time() - stat.st_atime > 60:
                os.utime(copy, ns=(time.time_ns(), stat.st_mtime_ns))
        return copy
    from filelock import FileLock

    from diptych.machine import disk  # which uploads through this module

    if is_remote(path):
        info = _info(path)
        version = [str(info.get(k)) for k in ("size", "ETag", "etag", "LastModified", "mtime", "updated")]
    else:
        stat = path.stat()
        version = [str(path.absolute()), str(stat.st_size), str(stat.st_mtime_ns)]
    digest = blake2b("\0".join([str(path), *version]).encode(), digest_size=16).hexdigest()
    copy = cache_folder() / digest
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if not copy.is_file():
            with disk.atomic(copy) as part:
                _fetch(path, part)
            _evict(copy)
    _COPIES[str(path)] = copy
    return copy


def _fetch(path: Path, part: Path) -> None:
    """Copies a file to ``part``, uncompressed."""
    raw = part
    if is_remote(path):
        raw = part.with_suffix(".raw.part") if path.suffix in COMPRESSED else part
        system, key = file_system(path)
        retried(lambda: system.get_file(key, str(raw)), path)
    else:
        raw = path
    try:
        if path.suffix in COMPRESSED:
            with part.open("wb") as out, _opened(raw, path) as stream:
                shutil.copyfileobj(stream, out, 2**20)
    finally:
        if raw not in (part, path):
            raw.unlink(missing_ok=True)


def _opened(raw: Path, path: Path) -> Any:
    """A stream of the content of a compressed file."""
    if path.suffix == ".gz":
        import gzip

        return gzip.open(raw, "rb")
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{path} needs zstandard: {install('data')}") from error
    return zstandard.open(raw, "rb")


def _evict(kept: Path) -> None:
    """Removes the copies that were not used for longest, until all together are within the limit; ``kept`` stays."""
    text = os.environ.get("DIPTYCH_CACHE_GB", "50")
    try:
        limit = float(text) * 1e9
    except ValueError as error:
        raise ValueError(f"DIPTYCH_CACHE_GB is {text!r}; it must be a number of gigabytes") from error
    copies = []
    for file in kept.parent.iterdir():
        if not file.suffix:
            with suppress(FileNotFoundError):
                copies.append((file.stat().st_atime, file.stat().st_size, file))
    total = sum(size for _, size, _ in copies)
    for _, size, file in sorted(copies):
        if total <= limit:
            break
        if file != kept:
            file.unlink(missing_ok=True)  # open handles stay readable
            file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
            total -= size
