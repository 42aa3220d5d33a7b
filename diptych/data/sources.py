"""Readers of the user's own files: jsonl with an image folder, a plain image folder, webdataset tar. Parquet is in
data/parquet.py.

For each row, ``where(index)`` is its file and line, ``row(index)`` the sample with pictures by reference, and
``source[index]`` the sample with decoded pictures. These are functions of the index alone, and sources can be forked
and pickled. ``left_out`` counts, by
suffix, the files of the given folder that are not read. ``index`` says where the rows are; without a file of
``diptych data index`` opening a data set scans all its files.

Rows that cannot be read raise ``ValueError`` that begins with ``where``.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image
from braceexpand import braceexpand

from diptych.core.sample import Image, Message, Sample, assistant, check_text, sample_from_json, user
from diptych.data.decoding import MAX_PIXELS, open_picture, picture_suffixes, read_bytes, suffixes
from diptych.data.index import Index, Scanned, build, chunks, fields, split
from diptych.data.reading import read
from diptych.machine import addresses

Read = Literal["rows", "draw", "caption", "pictures"]
NO_SUFFIX = "(no suffix)"
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LINES = 4096  # rows of a shard of a jsonl file, and pictures of a shard of a folder


# ---- jsonl ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class JsonLines:
    """Rows of ``core.sample``'s schema, one a line; pictures are paths inside ``images``."""

    name: str
    index: Index = field(repr=False)
    images: Path
    max_pixels: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of rows up to the end of each shard."""
        return self.index.shard_ends

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files of the folder are not read, by suffix."""
        return {s: n for s, n in self.index.left_out.items() if s not in picture_suffixes()}

    def _place(self, index: int) -> tuple[Path, int, int, int]:
        """(file, byte offset, bytes, line number)."""
        offset, size, line = map(int, split(self.index.record(index)))
        return self.index.file(index), offset, size, line

    def where(self, index: int) -> str:
        """``file:line``."""
        file, _, _, line = self._place(index)
        return f"{file}:{line}"

    def row(self, index: int) -> Sample:
        """The sample of a line, pictures by path. A row without an id is named by its file and line."""
        file, offset, size, line = self._place(index)
        text = read(_plain(file), offset, size)
        default = str(line) if len(self.index.files) == 1 else f"{_stem(file)}/{line}"
        return parse_row(text, f"{file}:{line}", default)

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """A picture of the row."""
        return open_picture(self.data(index, reference), reference, self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's file as it is."""
        return read_bytes(inside(self.images, reference), reference)


def jsonl(
    name: str, path: Path, images: Path | None = None, max_pixels: int = MAX_PIXELS, index: Index | None = None
) -> JsonLines:
    """The rows of a jsonl file, or of all ``*.jsonl`` in a folder or a pattern. Blank lines are no rows. Files that end
    with .gz or .zst are uncompressed into the cache.

    ``images`` is the folder that pictures' paths start from; by default that of the file.
    Raises ``ValueError`` when a file or the folder does not exist or no row is found.
    """
    files = index.files if index else find_files(path, JSONL)
    root = images if images is not None else files[0].parent
    if not addresses.is_remote(root) and not root.is_dir():
        raise ValueError(f"image folder {str(root)!r} does not exist")
    index = index or build(files, scan_lines, unread_files(path, JSONL))
    if not len(index):
        raise ValueError(f"{path} holds no rows")
    return JsonLines(name, index, root, max_pixels)


def scan_lines(file: Path) -> Scanned:
    """The offset, size and number of every line of a jsonl file that is not blank."""
    records, offset = [], 0
    with addresses.local_copy(file).open("rb") as stream:
        for line, text in enumerate(stream, start=1):
            if text.strip():
                records.append(fields(offset, len(text), line))
            offset += len(text)
    return Scanned(records, chunks(len(records), LINES))


def _plain(file: Path) -> Path:
    """The file, or where it is compressed its uncompressed copy."""
    return addresses.local_copy(file) if file.suffix in addresses.COMPRESSED else file


def _stem(file: Path) -> str:
    """The name without suffixes such as .jsonl and .jsonl.gz."""
    return file.stem.removesuffix(".jsonl")


# ---- plain image folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Unlabelled pictures: a sample is one target picture and no words. Its id is the path inside the folder."""

    name: str
    folder: Path
    index: Index = field(repr=False)
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of rows up to the end of each shard."""
        return self.index.shard_ends

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files of the folder are not read, by suffix."""
        return self.index.left_out

    def path(self, index: int) -> str:
        """The picture's path inside the folder."""
        return split(self.index.record(index))[0]

    def where(self, index: int) -> str:
        """The picture's path."""
        return str(self.folder / self.path(index))

    def row(self, index: int) -> Sample:
        """The sample, its picture by path."""
        path = self.path(index)
        return Sample(path, caption_messages("pictures", path))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """The picture."""
        return open_picture(self.data(index, reference), reference, self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's file as it is."""
        return read_bytes(inside(self.folder, reference), reference)


def images(name: str, path: Path, max_pixels: int = MAX_PIXELS, index: Index | None = None) -> ImageFolder:
    """The pictures in a folder and below, by suffix, in the order of their paths; hidden files are left out.

    Raises ``ValueError`` when the folder does not exist or holds no picture.
    """
    if not addresses.is_remote(path) and not path.is_dir():
        raise ValueError(f"image folder {str(path)!r} does not exist")
    index = index or build([path], scan_folder)
    if not len(index):
        others = f"; it holds {describe_left_out(index.left_out)}" if index.left_out else ""
        raise ValueError(f"image folder {str(path)!r} holds no {', '.join(suffixes())} file{others}")
    return ImageFolder(name, path, index, max_pixels)


def scan_folder(folder: Path) -> Scanned:
    """The paths of the pictures in a folder and below."""
    known, paths, left_out = suffixes(), list[str](), Counter[str]()
    for file in folder.rglob("*"):
        inner = file.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts) or file.is_dir():
            continue
        if file.suffix.lower() in known:
            paths.append(inner.as_posix())
        else:
            left_out[file.suffix.lower() or NO_SUFFIX] += 1
    return Scanned([fields(path) for path in sorted(paths)], chunks(len(paths), LINES), left_out, folder=True)


# ---- webdataset -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tar:
    """Samples of webdataset shards: members that share a key, found by offset; nothing is unpacked."""

    name: str
    index: Index = field(repr=False)
    read: Read
    max_pixels: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of rows up to the end of each shard."""
        return self.index.shard_ends

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files and members are not read, by suffix."""
        return self.index.left_out

    def places(self, index: int) -> tuple[str, dict[str, tuple[int, int]]]:
        """The key of a sample, and (offset, bytes) of its members by extension. Raises ``ValueError`` for what a
        damaged shard lost."""
        key, *rest = split(self.index.record(index))
        if not key:
            raise ValueError(rest[0])
        places = zip(rest[0::3], rest[1::3], rest[2::3], strict=True)
        return key, {extension: (int(offset), int(size)) for extension, offset, size in places}

    def where(self, index: int) -> str:
        """``shard:key``."""
        return f"{self.index.file(index)}:{split(self.index.record(index))[0] or 'damaged'}"

    def member(self, index: int, extension: str) -> bytes:
        """The content of a member. Raises ``ValueError`` when the sample lacks it or the shard ends inside it."""
        key, places = self.places(index)
        if extension not in places:
            raise ValueError(f"{key} has no member .{extension}; it has {', '.join(places)}")
        offset, size = places[extension]
        data = read(self.index.file(index), offset, size)
        if len(data) != size:
            raise ValueError(f"member .{extension} ends after {len(data)} of {size} bytes")
        return data

    def row(self, index: int) -> Sample:
        """The sample, its pictures by extension."""
        key, places = self.places(index)
        file, where = self.index.file(index), self.where(index)
        default = key if len(self.index.files) == 1 else f"{file.stem}/{key}"
        if self.read == "rows":
            if "json" not in places:
                raise ValueError(f"{where}: has no .json member; it has {', '.join(places)}")
            return parse_row(self.member(index, "json"), where, default)
        known = suffixes()
        shown = [e for e in places if f".{e.rsplit('.', 1)[-1]}" in known]
        if len(shown) != 1:
            raise ValueError(f"{where}: needs one picture to be read as {self.read!r}; it has {shown or 'none'}")
        if self.read == "pictures":
            return Sample(default, caption_messages(self.read, shown[0]))
        if "txt" not in places:
            raise ValueError(f"{where}: has no .txt member; it has {', '.join(places)}")
        text = _utf8(self.member(index, "txt"), where)
        text = text.removesuffix("\n").removesuffix("\r")  # the end of the file's last line
        return Sample(default, caption_messages(self.read, shown[0], text, where))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """The picture in the member of that extension."""
        return open_picture(self.data(index, reference), f"{self.places(index)[0]}.{reference}", self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's member as it is."""
        key, places = self.places(index)
        if reference not in places:
            raise ValueError(f"picture {reference!r} is not a member; {key} has {', '.join(places)}")
        return self.member(index, reference)


def webdataset(
    name: str, path: Path, read: Read = "rows", max_pixels: int = MAX_PIXELS, index: Index | None = None
) -> Tar:
    """The samples of an uncompressed tar shard, or of all ``*.tar`` in a folder or a pattern.

    Members with one key (the name up to its first dot) are one sample. ``read`` chooses the conversation. With
    ``rows`` the member ``.json`` is a row of the schema and names its pictures by extension ("jpg", "source.png").
    The others read one picture and a ``.txt``: with ``draw`` the text asks for the picture, with ``caption`` the
    picture asks for the text. ``pictures`` needs no text.

    The rest of a damaged shard (compressed, overwritten, cut off) counts as one sample that cannot be read. Raises
    ``ValueError`` where nothing can be read.
    """
    index = index or build(find_files(path, (".tar",)), scan_tar, unread_files(path, (".tar",)))
    if len(index) <= len(index.files):  # perhaps nothing but what damaged shards lost
        lost = [split(index.record(row)) for row in range(len(index))]
        if all(not key for key, *_ in lost):
            raise ValueError("; ".join(why for _, why in lost) or f"{path} holds no samples")
    return Tar(name, index, read, max_pixels)


def scan_tar(file: Path) -> Scanned:
    """The members of every sample of a tar. Raises ``ValueError`` for a member that comes twice."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    left_out = Counter[str]()
    listed, damage = _tar_members(file)
    for member, offset, size in listed:
        folder, slash, base = member.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not (stem and dot):  # hidden files, and members without an extension
            left_out[NO_SUFFIX] += bool(stem)
            continue
        group = groups.setdefault(folder + slash + stem, {})
        if extension.lower() in group:
            raise ValueError(f"{file}: member {member!r} comes twice")
        group[extension.lower()] = (offset, size)
    records = [fields(key, *(x for e, (o, n) in group.items() for x in (e, o, n))) for key, group in groups.items()]
    if damage:
        records.append(fields("", damage))
    return Scanned(records, [len(records)] if records else [], left_out)


def _tar_members(file: Path) -> tuple[list[tuple[str, int, int]], str]:
    """(name, offset of the data, bytes) of every readable member of a tar, and how the rest is damaged, or ""."""
    end, last, members = 0, "its start", []
    with addresses.local_copy(file).open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as opened:
                for member in opened:
                    end, last = member.offset_data + -(-member.size // 512) * 512, repr(member.name)
                    if member.isreg() and not member.issparse():
                        members.append((member.name, member.offset_data, member.size))
        except ConnectionError:
            raise
        except (tarfile.TarError, OSError) as error:
            return members, f"{file} is not a readable uncompressed tar; damaged after {last}: {error}"
        stream.seek(end)  # tarfile takes a damaged header for the end of the archive
        if any(stream.read(512)):
            return members, f"{file} is damaged after {last}: what follows is no tar header"
    return members, ""


# ---- shared ---------------------------------------------------------------------------------------------------------


def find_files(path: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The file at ``path``, or those with one of the suffixes in that folder or in that pattern, sorted.

    A pattern has ``*`` in its last part, or braces anywhere (``{0000..0099}``, ``{a,b}``), whose order is kept. Raises
    ``ValueError`` when there is none, and for a local file of braces that does not exist.
    """
    remote, text = addresses.is_remote(path), str(path)
    if "{" in text and (remote or not path.exists()):
        try:
            every = [addresses.address(name) for name in braceexpand(text)]
        except ValueError as error:  # a brace that is not closed
            raise ValueError(f"{text!r}: {error}") from error
        if lacking := [file for file in every if not remote and not file.is_file()]:
            raise ValueError(f"{text!r}: {len(lacking)} of {len(every)} files do not exist, first {str(lacking[0])!r}")
        return tuple(every)
    if "*" in path.name:
        files = list(addresses.retried(lambda: list(path.parent.glob(path.name)), path))
    elif remote and path.name.lower().endswith(suffixes):
        return (path,)
    elif path.is_file():
        return (path,)
    elif path.is_dir():
        files = [p for p in path.iterdir() if p.name.lower().endswith(suffixes) and not p.name.startswith(".")]
    else:
        raise ValueError(f"{text!r} does not exist")
    if not files:
        plain = " or ".join(suffix for suffix in suffixes if not suffix.endswith(addresses.COMPRESSED))
        raise ValueError(f"{text!r} holds no {plain} file")
    return tuple(sorted(files, key=str))


def unread_files(path: Path, suffixes: tuple[str, ...]) -> dict[str, int]:
    """How many files of a local folder ``find_files`` leaves out, by suffix; hidden ones do not count. Empty for a path
    that is no folder."""
    if addresses.is_remote(path) or not path.is_dir():
        return {}
    others = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    return dict(Counter(p.suffix.lower() or NO_SUFFIX for p in others if not p.name.lower().endswith(suffixes)))


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """``2 .heic, 1 .svg``: the most frequent first."""
    return ", ".join(f"{n} {suffix}" for suffix, n in sorted(left_out.items(), key=lambda item: (-item[1], item[0])))


def inside(root: Path, reference: str) -> Path:
    """The file that ``reference``, a relative path, names in the folder ``root``: the rule of catalogs and question
    files. Raises ``ValueError`` for a URL, an absolute path, and a path that leaves ``root`` by ``..`` or a link."""
    if "\0" in reference:
        raise ValueError(f"picture {reference!r} is no path")
    outside = bool(re.match(r"[a-z]+://", reference)) or Path(reference).is_absolute()
    if addresses.is_remote(root):
        outside = outside or ".." in Path(reference).parts
        file = root if outside else root / reference
    else:
        base = root.resolve()
        file = (base / reference).resolve()
        outside = outside or not file.is_relative_to(base)
    if outside:
        raise ValueError(f"picture {reference!r} lies outside the image folder {str(root)!r}")
    return file


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows of a data set that ``diptych data filter`` keeps."""

    base: RowSource
    rows: np.ndarray = field(repr=False)  # their numbers, ascending

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.base.name

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files are not read, by suffix."""
        return self.base.left_out

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of kept rows up to the end of each shard that keeps some."""
        ends = np.unique(np.searchsorted(self.rows, self.base.shard_ends))
        return ends[ends > 0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

    def where(self, index: int) -> str:
        """Where the row is."""
        return self.base.where(int(self.rows[index]))

    def row(self, index: int) -> Sample:
        """The sample, pictures by reference."""
        return self.base.row(int(self.rows[index]))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """A picture of the row."""
        return self.base.picture(int(self.rows[index]), reference)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's file as it is."""
        return self.base.data(int(self.rows[index]), reference)


class RowSource(Protocol):
    """What a source of rows in files offers."""

    @property
    def name(self) -> str:
        """The name of the data set."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many rows or files are not part of the data set, by reason."""

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of rows up to the end of each shard."""

    def __len__(self) -> int: ...
    def where(self, index: int) -> str:
        """The file and the line or row of a sample, for messages."""

    def row(self, index: int) -> Sample:
        """The sample with pictures as references, which ``picture`` resolves. Raises ``ValueError``."""

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """The decoded picture of a reference. Raises ``ValueError`` where it is missing or damaged."""

    def data(self, index: int, reference: str) -> bytes:
        """The bytes of the file that a reference names. Raises ``ValueError`` where it is missing."""


def open_row(source: RowSource, index: int) -> Sample:
    """The sample of a row with its pictures decoded. Raises ``ValueError`` that begins with ``where``."""
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


def caption_messages(read: Read, picture: str, text: str = "", where: str = "") -> tuple[Message, ...]:
    """The messages of a picture and its caption. Raises ``ValueError`` for a caption that cannot be encoded."""
    target = assistant(Image(picture, "target"))
    if read == "pictures":
        return (target,)
    check_text(text, f"{where}: the caption")
    return (user(text), target) if read == "draw" else (user(Image(picture)), assistant(text))


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from error


def parse_row(text: bytes | str | None, where: str, default_id: str, given: Any = None) -> Sample:
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
