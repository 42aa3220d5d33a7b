"""The user's own files as sources: jsonl with an image folder, a plain image folder, parquet, webdataset tar.

Every source here gives three things for a row: ``where(index)`` names it (file and line), ``row(index)`` is the sample
with pictures by reference, and ``source[index]`` is the sample with its pictures decoded. Each is a function of the
index alone, opens what it needs and closes it again, so sources can be forked and pickled.

Rows that cannot be read raise ``ValueError`` that begins with ``where``.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from diptych.core.sample import Image, Message, Sample, assistant, sample_from_json, user
from diptych.data.decoding import MAX_PIXELS, open_picture, read_bytes, suffixes

Read = Literal["rows", "draw", "caption", "pictures"]
HELD = 4  # row groups of parquet files kept decoded, per process


# ---- jsonl ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class JsonLines:
    """Rows of ``core.sample``'s schema, one a line; pictures are paths inside ``images``."""

    name: str
    files: tuple[Path, ...]
    images: Path
    max_pixels: int
    places: np.ndarray = field(repr=False)  # (rows, 3): file, byte offset, line number

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        return _decoded(self, index)

    def where(self, index: int) -> str:
        """``file:line``."""
        file, _, line = self.places[index].tolist()
        return f"{self.files[file]}:{line}"

    def row(self, index: int) -> Sample:
        """The sample of a line, pictures by path. A row without an id is named by its file and line."""
        file, offset, line = self.places[index].tolist()
        with self.files[file].open("rb") as stream:
            stream.seek(offset)
            text = stream.readline()
        default = str(line) if len(self.files) == 1 else f"{self.files[file].stem}/{line}"
        return _parse(text, self.where(index), default)

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """A picture of the row."""
        return open_picture(inside(self.images, reference), reference, self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's file as it is."""
        return read_bytes(inside(self.images, reference), reference)


def jsonl(name: str, path: Path, images: Path | None = None, max_pixels: int = MAX_PIXELS) -> JsonLines:
    """The rows of a jsonl file, or of all ``*.jsonl`` in a folder or a pattern. Blank lines are no rows.

    ``images`` is the folder that pictures' paths start from; by default that of the file.
    Raises ``ValueError`` when a file or the folder does not exist or no row is found.
    """
    files = find_files(path, (".jsonl",))
    root = images if images is not None else files[0].parent
    if not root.is_dir():
        raise ValueError(f"image folder {str(root)!r} does not exist")
    places: list[tuple[int, int, int]] = []
    for number, file in enumerate(files):
        offset = 0
        with file.open("rb") as stream:
            for line, text in enumerate(stream, start=1):
                if text.strip():
                    places.append((number, offset, line))
                offset += len(text)
    if not places:
        raise ValueError(f"{path} holds no rows")
    return JsonLines(name, files, root, max_pixels, np.array(places, np.int64))


# ---- plain image folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Unlabelled pictures: a sample is one target picture and no words. Its id is the path inside the folder."""

    name: str
    folder: Path
    paths: tuple[str, ...] = field(repr=False)
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return _decoded(self, index)

    def where(self, index: int) -> str:
        """The picture's path."""
        return str(self.folder / self.paths[index])

    def row(self, index: int) -> Sample:
        """The sample, its picture by path."""
        return Sample(self.paths[index], _messages("pictures", self.paths[index], ""))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """The picture."""
        return open_picture(inside(self.folder, reference), reference, self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's file as it is."""
        return read_bytes(inside(self.folder, reference), reference)


def images(name: str, path: Path, max_pixels: int = MAX_PIXELS) -> ImageFolder:
    """The pictures in a folder and below, by suffix, in the order of their paths; hidden files are left out.

    Raises ``ValueError`` when the folder does not exist or holds no picture.
    """
    if not path.is_dir():
        raise ValueError(f"image folder {str(path)!r} does not exist")
    known = suffixes()
    found = (p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in known)
    paths = sorted(p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts))
    if not paths:
        raise ValueError(f"image folder {str(path)!r} holds no {', '.join(known)} file")
    return ImageFolder(name, path, tuple(paths), max_pixels)


# ---- parquet --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parquet:
    """Rows of parquet files with the pictures inside; a row's group is read whole, the last few are kept."""

    name: str
    files: tuple[Path, ...]
    read: Read
    max_pixels: int
    groups: tuple[tuple[int, int, int], ...] = field(repr=False)  # (file, group in file, its first row in file)
    ends: np.ndarray = field(repr=False)  # rows up to the end of each group

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        return _decoded(self, index)

    def _place(self, index: int) -> tuple[int, int, int]:
        """(file, group in file, row in group)."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        file, number, _ = self.groups[group]
        return file, number, index - (int(self.ends[group - 1]) if group else 0)

    def _number(self, index: int) -> int:
        """The row's number in its file, from 1."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        return self.groups[group][2] + self._place(index)[2] + 1

    def where(self, index: int) -> str:
        """``file:row N``, counted from 1."""
        return f"{self.files[self._place(index)[0]]}:row {self._number(index)}"

    def _cells(self, index: int) -> dict[str, Any]:
        file, group, row = self._place(index)
        table = _row_group(self.files[file], group, COLUMNS[self.read])
        return {name: table.column(name)[row].as_py() for name in table.column_names}

    def row(self, index: int) -> Sample:
        """The sample, its pictures by name."""
        cells, where = self._cells(index), self.where(index)
        number = self._number(index)
        default = str(number) if len(self.files) == 1 else f"{self.files[self._place(index)[0]].stem}/{number}"
        if self.read == "rows":
            return _parse(cells["messages"], where, default, cells.get("id"))
        text = cells.get("caption", "")
        if not isinstance(text, str):
            raise ValueError(f"{where}: column 'caption' must be a string, not {text!r}")
        return Sample(default if cells.get("id") is None else str(cells["id"]), _messages(self.read, "image", text))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """A picture of the row."""
        return open_picture(self.data(index, reference), reference, self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The bytes in ``image``, or those of that path in ``images``."""
        cells = self._cells(index)
        held = {"image": cells["image"]} if self.read != "rows" else _by_path(cells.get("images"))
        if reference not in held:
            raise ValueError(f"picture {reference!r} is not in the row's 'images'; it has {', '.join(held) or 'none'}")
        data = held[reference]
        data = data.get("bytes") if isinstance(data, dict) else data
        if not isinstance(data, bytes):
            raise ValueError(f"picture {reference!r} holds no bytes")
        return data


COLUMNS: dict[Read, tuple[tuple[str, ...], tuple[str, ...]]] = {  # (required, optional)
    "rows": (("messages",), ("id", "images")),
    "draw": (("image", "caption"), ("id",)),
    "caption": (("image", "caption"), ("id",)),
    "pictures": (("image",), ("id",)),
}


def parquet(name: str, path: Path, read: Read = "rows", max_pixels: int = MAX_PIXELS) -> Parquet:
    """The rows of a parquet file, or of all ``*.parquet`` in a folder or a pattern.

    ``read`` says what a row is: ``rows``: column ``messages`` (JSON text of the schema's messages) and, when it shows
    pictures, ``images`` (a list of {path, bytes}); else ``image`` (bytes, or {bytes, path}) and ``caption``: ``draw``
    asks for the picture with the caption, ``caption`` asks for the caption of the picture, ``pictures`` has no words.
    Column ``id`` is optional. Small row groups (about 100 rows) make random access fast.

    Raises ``ValueError`` for files that are not parquet or lack a column.
    """
    pq, errors = pyarrow()
    files, groups, ends = find_files(path, (".parquet",)), [], []
    total = 0
    for number, file in enumerate(files):
        try:
            with pq.ParquetFile(file) as opened:
                columns, metadata = opened.schema_arrow.names, opened.metadata
                sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        except errors as error:
            raise ValueError(f"{file} is not a readable parquet file: {error}") from error
        if missing := [c for c in COLUMNS[read][0] if c not in columns]:
            raise ValueError(f"{file} lacks columns {missing} to be read as {read!r}; it has {', '.join(columns)}")
        first = 0
        for group, size in enumerate(sizes):
            groups.append((number, group, first))
            first, total = first + size, total + size
            ends.append(total)
    if not total:
        raise ValueError(f"{path} holds no rows")
    return Parquet(name, files, read, max_pixels, tuple(groups), np.array(ends))


def pyarrow() -> tuple[Any, tuple[type[Exception], ...]]:
    """pyarrow.parquet, and what it raises for files that it cannot read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow; install it with: pip install diptych[data]") from error
    return pyarrow.parquet, (pyarrow.ArrowException, OSError)


@lru_cache(maxsize=HELD)
def _row_group(file: Path, group: int, columns: tuple[tuple[str, ...], tuple[str, ...]]) -> Any:
    pq, errors = pyarrow()
    try:
        with pq.ParquetFile(file) as opened:
            wanted = [c for c in columns[0] + columns[1] if c in opened.schema_arrow.names]
            return opened.read_row_group(group, wanted, use_threads=False)
    except errors as error:
        raise ValueError(f"{file}: row group {group} cannot be read: {error}") from error


def _by_path(held: Any) -> dict[str, Any]:
    if held is None:
        return {}
    if not (isinstance(held, list) and all(isinstance(h, dict) and h.get("path") for h in held)):
        raise ValueError("column 'images' must be a list of {path, bytes}")
    return {h["path"]: h for h in held}


# ---- webdataset -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tar:
    """Samples of webdataset shards: members that share a key, found by offset; nothing is unpacked."""

    name: str
    files: tuple[Path, ...]
    read: Read
    max_pixels: int
    members: tuple[tuple[int, str, dict[str, tuple[int, int]]], ...] = field(repr=False)  # (file, key, {ext: place})
    damaged: Mapping[int, str] = field(default_factory=dict, repr=False)  # index in place of what a shard lost -> why

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sample:
        return _decoded(self, index)

    def where(self, index: int) -> str:
        """``shard:key``."""
        file, key, _ = self.members[index]
        return f"{self.files[file]}:{key}"

    def member(self, index: int, extension: str) -> bytes:
        """The content of a member. Raises ``ValueError`` when the sample lacks it or the shard ends inside it."""
        file, key, places = self.members[index]
        if extension not in places:
            raise ValueError(f"{key} has no member .{extension}; it has {', '.join(places)}")
        offset, size = places[extension]
        with self.files[file].open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) != size:
            raise ValueError(f"member .{extension} ends after {len(data)} of {size} bytes")
        return data

    def row(self, index: int) -> Sample:
        """The sample, its pictures by extension."""
        if index in self.damaged:
            raise ValueError(self.damaged[index])
        file, key, places = self.members[index]
        default, where = key if len(self.files) == 1 else f"{self.files[file].stem}/{key}", self.where(index)
        if self.read == "rows":
            if "json" not in places:
                raise ValueError(f"{where}: has no .json member; it has {', '.join(places)}")
            return _parse(self.member(index, "json"), where, default)
        known = suffixes()
        shown = [e for e in places if f".{e.rsplit('.', 1)[-1]}" in known]
        if len(shown) != 1:
            raise ValueError(f"{where}: needs one picture to be read as {self.read!r}; it has {shown or 'none'}")
        if self.read == "pictures":
            return Sample(default, _messages(self.read, shown[0], ""))
        if "txt" not in places:
            raise ValueError(f"{where}: has no .txt member; it has {', '.join(places)}")
        return Sample(default, _messages(self.read, shown[0], _utf8(self.member(index, "txt"), where).strip()))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """The picture in the member of that extension."""
        return open_picture(self.data(index, reference), f"{self.members[index][1]}.{reference}", self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's member as it is."""
        _, key, places = self.members[index]
        if reference not in places:
            raise ValueError(f"picture {reference!r} is not a member; {key} has {', '.join(places)}")
        return self.member(index, reference)


def webdataset(name: str, path: Path, read: Read = "rows", max_pixels: int = MAX_PIXELS) -> Tar:
    """The samples of an uncompressed tar shard, or of all ``*.tar`` in a folder or a pattern.

    Members with one key (the name up to its first dot) are one sample. ``read`` says what it is: ``rows``: ``.json``
    holds a row of the schema whose pictures are named by extension ("jpg", "source.png"); else one picture and a
    ``.txt``: ``draw`` asks for the picture with the text, ``caption`` asks for the text, ``pictures`` has no words.

    Reads every header once. What stands behind the damage of a shard (compressed, overwritten, cut off) is one sample
    that cannot be read: skipped, counted and listed as others are. Raises ``ValueError`` where nothing can be read.
    """
    files = find_files(path, (".tar",))
    damaged: dict[int, str] = {}
    members: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
    for number, file in enumerate(files):
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        found, wrong = _tar_members(file)
        for member, offset, size in found:
            folder, slash, base = member.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not (stem and dot):  # hidden files, and members without an extension
                continue
            group = groups.setdefault(folder + slash + stem, {})
            if extension.lower() in group:
                raise ValueError(f"{file}: member {member!r} comes twice")
            group[extension.lower()] = (offset, size)
        members += [(number, key, group) for key, group in groups.items()]
        if wrong:
            damaged[len(members)] = wrong
            members.append((number, "damaged", {}))
    if len(members) == len(damaged):
        raise ValueError("; ".join(damaged.values()) or f"{path} holds no samples")
    return Tar(name, files, read, max_pixels, tuple(members), damaged)


def _tar_members(file: Path) -> tuple[list[tuple[str, int, int]], str]:
    """(name, offset of the data, bytes) of every file in a tar, and what is wrong with the tar behind them, or ""."""
    end, last, found = 0, "its start", []
    try:
        with tarfile.open(file, "r:") as opened:
            for member in opened:
                end, last = member.offset_data + -(-member.size // 512) * 512, repr(member.name)
                if member.isreg() and not member.issparse():
                    found.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        return found, f"{file} is not a readable uncompressed tar; damaged after {last}: {error}"
    with file.open("rb") as stream:  # tarfile takes a damaged header for the end of the archive
        stream.seek(end)
        if any(stream.read(512)):
            return found, f"{file} is damaged after {last}: what follows is no tar header"
    return found, ""


# ---- shared ---------------------------------------------------------------------------------------------------------


def find_files(path: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The file at ``path``, or those with one of the suffixes in that folder or in that pattern (``*``), sorted.

    Raises ``ValueError`` when there is none.
    """
    if path.is_file():
        return (path,)
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix in suffixes]
    elif "*" in path.name:
        found = list(path.parent.glob(path.name))
    else:
        raise ValueError(f"{str(path)!r} does not exist")
    if not found:
        raise ValueError(f"{str(path)!r} holds no {' or '.join(suffixes)} file")
    return tuple(sorted(found))


def inside(root: Path, reference: str) -> Path:
    """The file that a row refers to. Raises ``ValueError`` when it lies outside ``root``, links followed."""
    base = root.resolve()
    if "\0" in reference:
        raise ValueError(f"picture {reference!r} is no path")
    found = (base / reference).resolve()
    if re.match(r"[a-z]+://", reference) or Path(reference).is_absolute() or not found.is_relative_to(base):
        raise ValueError(f"picture {reference!r} lies outside the image folder {str(root)!r}")
    return found


def _decoded(source: JsonLines | ImageFolder | Parquet | Tar, index: int) -> Sample:
    if not 0 <= index < len(source):
        raise IndexError(f"{source.name} has no row {index}; it has {len(source)}")
    return decode(source.row(index), source.where(index), partial(source.picture, index))


def decode(sample: Sample, where: str, picture: Callable[[str], PIL.Image.Image]) -> Sample:
    """The sample with its pictures opened. Raises ``ValueError`` that begins with ``where``."""

    def opened(image: Image) -> Image:
        try:
            return replace(image, image=picture(str(image.image)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return sample.map_images(opened)


def _messages(read: Read, picture: str, text: str) -> tuple[Message, ...]:
    target = assistant(Image(picture, "target"))
    if read == "pictures":
        return (target,)
    return (user(text), target) if read == "draw" else (user(Image(picture)), assistant(text))


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from error


def _parse(text: bytes | str | None, where: str, default_id: str, given: Any = None) -> Sample:
    """The sample of JSON text: a row, or (for a parquet column) the list of its messages."""
    if text is None:
        raise ValueError(f"{where}: 'messages' is empty")
    decoded = _utf8(text, where) if isinstance(text, bytes) else text
    try:
        row = json.loads(decoded.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a row: nested too deeply") from error
    if isinstance(text, str):
        row = {"messages": row} if given is None else {"messages": row, "id": given}
    try:
        return sample_from_json(row, default_id)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
