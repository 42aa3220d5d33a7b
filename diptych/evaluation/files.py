"""Files of an evaluation and of its benchmarks. Rows are appended whole and flushed to the disk; other files are
written atomically, so a crash damages none."""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.data.decoding import open_picture
from diptych.machine.disk import atomic, write_text


def read(path: Path, *keys: str) -> list[dict]:
    """The rows of a jsonl file of ours, none where there is no file. An incomplete last line is removed from the file.
    Raises ``ValueError`` for any other damaged line, and for a row without one of the ``keys``."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    kept = rows(path, whole)
    for row in kept:
        for key in keys:
            field(row, (key,), f"{path}: a row")
    return kept


def rows(path: Path, data: bytes | None = None) -> list[dict]:
    """The rows of a user's jsonl file, which is not changed. Raises ``ValueError`` naming the line."""
    parsed = []
    for number, line in enumerate((path.read_bytes() if data is None else data).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not an object: {row!r}")
        parsed.append(row)
    return parsed


def load(path: Path) -> Any:
    """The content of a JSON file. Raises ``ValueError`` naming a file that is not JSON."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def append(path: Path, rows: Sequence[Mapping]) -> None:
    """Appends rows and flushes them to the disk."""
    if rows:
        with path.open("ab") as file:
            file.write("".join(json.dumps(row, default=_plain) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"an engine's parameters must be JSON, not {value!r}")


def save(image: PIL.Image.Image, path: Path) -> None:
    """Writes a PNG in one step."""
    with atomic(path) as part:
        image.convert("RGB").save(part, "PNG")


def merge(path: Path, order: Iterable[str]) -> None:
    """Puts the rows of a jsonl file into ``order`` of their ids, together with the rows that several processes wrote
    (STEM.RANK.jsonl), also those of a run that was cut off; a process's rows replace older ones."""
    parts = sorted(f for f in path.parent.glob(f"{path.stem}.*.jsonl") if f.name.split(".")[-2].isdecimal())
    rows = {row["id"]: row for file in (path, *parts) for row in read(file, "id")}
    rank = {id: i for i, id in enumerate(order)}
    ordered = sorted(rows, key=lambda id: rank.get(id, -1))  # rows of other benchmarks first, as they were
    if parts or ordered != list(rows):
        write_text(path, "".join(json.dumps(rows[id]) + "\n" for id in ordered))
    for part in parts:
        part.unlink()


def picture(source: Any, root: Path | None = None, name: str = "") -> PIL.Image.Image:
    """The RGB picture of a path (under ``root`` unless it is absolute), a "data:" address, or itself. Raises
    ``ValueError`` naming it."""
    if isinstance(source, PIL.Image.Image):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        return open_picture(decoded(source.partition(",")[2], name), name or "a data: address")
    return open_picture(Path(root or ".") / source, name)


def decoded(text: str, name: str = "") -> bytes:
    """The bytes of base64 text. Raises ``ValueError`` that names its source."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name or 'a picture'} is not base64: {error}") from None


def field(row: Any, names: Sequence[str], where: str, kind: type = str) -> Any:
    """The value of the first of these keys that a row has, converted to ``kind`` (``object``: unchanged). Raises
    ``ValueError`` naming the row, and the keys or the value."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is not an object: {row!r}")
    name = next((n for n in names if row.get(n) is not None), None)
    if name is None:
        has = ", ".join(str(k) for k, v in row.items() if v is not None) or "nothing"
        raise ValueError(f"{where} has no {' or '.join(map(repr, names))}; it has {has}")
    value = row[name]
    if isinstance(value, str):
        writable(value, f"{where}: {name}")
    if isinstance(value, kind):
        return value
    if kind in (str, int, float) and isinstance(value, (str, int, float)):
        with suppress(ValueError, OverflowError):
            return kind(value)
    raise ValueError(f"{where}: {name} is {value!r}, not {kind.__name__}")


def writable(text: str, where: str) -> str:
    """The text. Raises ``ValueError`` for one that UTF-8 cannot write (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {text[error.start]!r}, which UTF-8 cannot write") from None
    return text


def table(path: Path) -> list[dict]:
    """The rows of a user's table: columns are separated by tabs in a .tsv, else by commas; missing cells are None.
    Raises ``ValueError`` naming a file that is not such a table."""
    csv.field_size_limit(sys.maxsize)  # pictures in base64
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            return list(csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of text: {error}") from None
