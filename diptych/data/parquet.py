"""Parquet files as a source: columns of the schema's messages with the pictures inside, or of pictures and captions."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diptych.core.sample import Sample
from diptych.data.decoding import MAX_PIXELS, open_picture
from diptych.data.index import Index, Scanned, build
from diptych.data.reading import Stream
from diptych.data.sources import Read, caption_messages, find_files, open_row, parse_row, unread_files
from diptych.machine.addresses import is_remote
from diptych.machine.extras import install

HELD = 4  # row groups that a process always keeps decoded
HELD_BYTES = 2**29  # more are kept up to this size

Columns = tuple[tuple[str, ...], tuple[str, ...]]
COLUMNS: dict[Read, Columns] = {  # (required, optional)
    "rows": (("messages",), ("id", "images")),
    "draw": (("image", "caption"), ("id",)),
    "caption": (("image", "caption"), ("id",)),
    "pictures": (("image",), ("id",)),
}


@dataclass(frozen=True, eq=False)
class Parquet:
    """Rows of parquet files with the pictures inside; a row's group is read whole, the last few are kept."""

    name: str
    index: Index = field(repr=False)  # a row group is a shard
    read: Read
    max_pixels: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of rows up to the end of each row group."""
        return self.index.shard_ends

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files of the folder are not read, by suffix."""
        return self.index.left_out

    def _number(self, index: int) -> int:
        """The row's number in its file, from 1."""
        return index - self.index.first(self.index.first_shard(self.index.shard(index))) + 1

    def where(self, index: int) -> str:
        """``file:row N``, counted from 1."""
        return f"{self.index.file(index)}:row {self._number(index)}"

    def _cells(self, index: int, *columns: str) -> dict[str, Any]:
        """The values of the named columns that the file has. Bytes of pictures are copied here, so ask for few."""
        file, shard, row = self.index.place(index)
        table = _row_group(file, shard - self.index.first_shard(shard), COLUMNS[self.read])
        cells = {}
        for column in columns:
            if column not in table.column_names:
                continue
            try:
                cells[column] = table.column(column)[row].as_py()
            except ValueError as error:  # text that is not UTF-8, a time that Python cannot hold
                raise ValueError(f"{self.where(index)}: column {column!r} cannot be read: {error}") from error
        return cells

    def row(self, index: int) -> Sample:
        """The sample, its pictures by name."""
        cells, where = self._cells(index, "messages", "caption", "id"), self.where(index)
        number = self._number(index)
        default = str(number) if len(self.index.files) == 1 else f"{self.index.file(index).stem}/{number}"
        if self.read == "rows":
            return parse_row(_messages_text(cells["messages"], where), where, default, cells.get("id"))
        text = cells.get("caption", "")
        if not isinstance(text, str):
            raise ValueError(f"{where}: column 'caption' must be a string, not {text!r}")
        id = default if cells.get("id") is None else str(cells["id"])
        return Sample(id, caption_messages(self.read, "image", text, where))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """A picture of the row."""
        return open_picture(self.data(index, reference), reference, self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The bytes in ``image``, or those of that picture in ``images``: by path, else by number (``"0"``), else,
        where one of them has no path, by position among the row's pictures."""
        cells = self._cells(index, "image", "images")
        if self.read != "rows":
            return _bytes(cells["image"], "image", reference)
        held = cells.get("images")
        items = [] if held is None else held if isinstance(held, list) else [held]
        shown = list(dict.fromkeys(str(image.image) for image in self.row(index).images()))
        paths = [item.get("path") if isinstance(item, dict) else None for item in items]
        names: list[str] = [str(path) for path in paths if path]
        if len(names) < len(items) or not set(shown) <= set(names):
            numbers = [str(number) for number in range(len(items))]
            if set(shown) <= set(numbers):
                names = numbers
            elif len(names) < len(items):
                if len(shown) != len(items):
                    counts = f"{len(items)} pictures without paths; the row shows {len(shown)}"
                    raise ValueError(f"'images' holds {counts}")
                names = shown
        by_name = dict(zip(names, items, strict=True))
        if reference not in by_name:
            raise ValueError(f"picture {reference!r} is not in the row's 'images'; it has {', '.join(names) or 'none'}")
        return _bytes(by_name[reference], "images", reference)


def parquet(
    name: str, path: Path, read: Read = "rows", max_pixels: int = MAX_PIXELS, index: Index | None = None
) -> Parquet:
    """The rows of a parquet file, or of all ``*.parquet`` in a folder or a pattern.

    ``read`` says what a row is. ``rows``: column ``messages`` (the schema's messages, as JSON text or as a list of
    structs) and, when it shows pictures, ``images`` (a list of {path, bytes} or of bytes; without paths, the n-th is
    the n-th picture of the messages). Else ``image`` (bytes, or {bytes, path}) and ``caption``: ``draw`` asks for the
    picture with the caption, ``caption`` asks for the caption of the picture, ``pictures`` has no words. Column ``id``
    is optional. Small row groups (about 100 rows) make random access fast.

    Raises ``ValueError`` for files that are not parquet, lack a column, or hold another type in it.
    """
    files = index.files if index else find_files(path, (".parquet",))
    index = index or build(files, partial(scan_groups, read=read), unread_files(path, (".parquet",)))
    if not len(index):
        raise ValueError(f"{path} holds no rows")
    return Parquet(name, index, read, max_pixels)


def scan_groups(file: Path, read: Read) -> Scanned:
    """The rows of every row group of a parquet file. Raises ``ValueError`` as ``parquet`` does."""
    pq, errors = pyarrow()
    try:
        with pq.ParquetFile(Stream(file)) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    except ConnectionError:
        raise
    except errors as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
    if missing := [c for c in COLUMNS[read][0] if c not in schema.names]:
        raise ValueError(f"{file} lacks columns {missing} to be read as {read!r}; it has {', '.join(schema.names)}")
    for column in COLUMNS[read][0] + COLUMNS[read][1]:
        if column in schema.names:
            _check_type(file, column, schema.field(column).type)
    return Scanned([], sizes, rows=sum(sizes))


def pyarrow() -> tuple[Any, tuple[type[Exception], ...]]:
    """pyarrow.parquet, and what it raises for files that it cannot read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading parquet needs pyarrow: {install('data')}") from error
    return pyarrow.parquet, (pyarrow.ArrowException, OSError)


def _check_type(file: Path, column: str, type: Any) -> None:
    """Raises ``ValueError`` naming file, column and type for a type that a column cannot be read from."""
    import pyarrow.types as t

    def value(arrow: Any) -> Any:
        return arrow.value_type if t.is_dictionary(arrow) else arrow

    def text(arrow: Any) -> bool:
        return t.is_string(arrow) or t.is_large_string(arrow) or t.is_string_view(arrow) or t.is_null(arrow)

    def data(arrow: Any) -> bool:
        return (
            t.is_binary(arrow) or t.is_large_binary(arrow) or t.is_binary_view(arrow) or t.is_fixed_size_binary(arrow)
        )

    def picture(arrow: Any) -> bool:
        return data(arrow) or t.is_null(arrow) or (t.is_struct(arrow) and arrow.get_field_index("bytes") >= 0)

    def a_list(arrow: Any) -> bool:
        return t.is_list(arrow) or t.is_large_list(arrow) or t.is_fixed_size_list(arrow)

    type = value(type)
    allowed, wanted = {
        "messages": (
            text(type) or data(type) or (a_list(type) and t.is_struct(value(type.value_type))),
            "JSON text or a list of structs {role, content}",
        ),
        "images": (picture(type) or (a_list(type) and picture(type.value_type)), "a list of {path, bytes}"),
        "image": (picture(type), "bytes or {bytes, path}"),
        "caption": (text(type), "text"),
        "id": (text(type) or t.is_integer(type), "text or integers"),
    }[column]
    if not allowed:
        raise ValueError(f"{file}: column {column!r} has the type {type}; it must hold {wanted}")


_TABLES: OrderedDict[tuple, Any] = OrderedDict()  # row groups of this process, the last used last


def _row_group(file: Path, group: int, columns: Columns) -> Any:
    """The table of a row group; it is read once while it is among the last used, and anew from a file written anew."""
    stamp = () if is_remote(file) else (file.stat().st_mtime_ns, file.stat().st_size)
    key = (str(file), group, columns, stamp)
    if key not in _TABLES:
        pq, errors = pyarrow()
        try:
            with pq.ParquetFile(Stream(file)) as opened:
                wanted = [c for c in columns[0] + columns[1] if c in opened.schema_arrow.names]
                _TABLES[key] = opened.read_row_group(group, wanted, use_threads=False)
        except ConnectionError:
            raise
        except errors as error:
            raise ValueError(f"{file}: row group {group} cannot be read: {error}") from error
        while len(_TABLES) > HELD and sum(table.nbytes for table in _TABLES.values()) > HELD_BYTES:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(key)
    return _TABLES[key]


def _bytes(held: Any, column: str, reference: str) -> bytes:
    """The bytes of one picture. Raises ``ValueError``."""
    data = held.get("bytes") if isinstance(held, dict) else held
    if not isinstance(data, bytes):
        raise ValueError(f"picture {reference!r} holds no bytes in column {column!r}")
    return data


def _messages_text(cell: Any, where: str) -> str | None:
    """The JSON text of a cell of ``messages``. A list of structs has every key in every struct: those that are null are
    not there. A picture without a path is named by its number in ``images``: its ``index``, else its place."""
    if isinstance(cell, bytes):
        try:
            return cell.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: column 'messages' is not UTF-8 at byte {error.start}") from error
    if cell is None or isinstance(cell, str):
        return cell
    pictures = 0

    def part(value: Any) -> Any:
        nonlocal pictures
        if not isinstance(value, dict):
            return value
        kept = {key: inner for key, inner in value.items() if inner is not None}
        if kept.get("type") == "image" and "image" not in kept:
            kept["image"] = str(kept.get("index", pictures))
        pictures += kept.get("type") == "image"
        kept.pop("index", None)  # of HF's interleaved parts
        return kept

    messages = []
    for message in cell:
        kept = {} if message is None else {key: inner for key, inner in message.items() if inner is not None}
        if isinstance(kept.get("content"), list):
            kept["content"] = [part(value) for value in kept["content"]]
        messages.append(kept)
    try:
        return json.dumps(messages)
    except TypeError as error:
        raise ValueError(f"{where}: column 'messages' holds a value that JSON has no place for: {error}") from error
