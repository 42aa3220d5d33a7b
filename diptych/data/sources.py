"""Readers of the user's own files: jsonl with an image folder, a plain image folder, webdataset tar. Parquet is in
data/parquet.py.

For each row, ``where(index)`` is its file and line, ``row(index)`` the sample with pictures by reference, and
``source[index]`` the sample with decoded pictures. These are functions of the index alone. They close the files that
they open, so sources can be forked and pickled. ``left_out`` counts, by
suffix, the files of the given folder that are not read.

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

from diptych.core.sample import Image, Message, Sample, assistant, check_text, sample_from_json, user
from diptych.data.decoding import MAX_PIXELS, open_picture, picture_suffixes, read_bytes, suffixes

Read = Literal["rows", "draw", "caption", "pictures"]
NO_SUFFIX = "(no suffix)"


# ---- jsonl ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class JsonLines:
    """Rows of ``core.sample``'s schema, one a line; pictures are paths inside ``images``."""

    name: str
    files: tuple[Path, ...]
    images: Path
    max_pixels: int
    places: np.ndarray = field(repr=False)  # (rows, 3): file, byte offset, line number
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

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
        return parse_row(text, self.where(index), default)

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
    left_out = {s: n for s, n in unread_files(path, (".jsonl",)).items() if s not in picture_suffixes()}
    return JsonLines(name, files, root, max_pixels, np.array(places, np.int64), left_out)


# ---- plain image folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Unlabelled pictures: a sample is one target picture and no words. Its id is the path inside the folder."""

    name: str
    folder: Path
    paths: tuple[str, ...] = field(repr=False)
    max_pixels: int = MAX_PIXELS
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

    def where(self, index: int) -> str:
        """The picture's path."""
        return str(self.folder / self.paths[index])

    def row(self, index: int) -> Sample:
        """The sample, its picture by path."""
        return Sample(self.paths[index], caption_messages("pictures", self.paths[index]))

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
    known, paths, left_out = suffixes(), list[str](), Counter[str]()
    for file in path.rglob("*"):
        inner = file.relative_to(path)
        if any(part.startswith(".") for part in inner.parts) or file.is_dir():
            continue
        if file.suffix.lower() in known:
            paths.append(inner.as_posix())
        else:
            left_out[file.suffix.lower() or NO_SUFFIX] += 1
    if not paths:
        others = f"; it holds {describe_left_out(left_out)}" if left_out else ""
        raise ValueError(f"image folder {str(path)!r} holds no {', '.join(known)} file{others}")
    return ImageFolder(name, path, tuple(sorted(paths)), max_pixels, dict(left_out))


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
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sample:
        return open_row(self, index)

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
        return open_picture(self.data(index, reference), f"{self.members[index][1]}.{reference}", self.max_pixels)

    def data(self, index: int, reference: str) -> bytes:
        """The picture's member as it is."""
        _, key, places = self.members[index]
        if reference not in places:
            raise ValueError(f"picture {reference!r} is not a member; {key} has {', '.join(places)}")
        return self.member(index, reference)


def webdataset(name: str, path: Path, read: Read = "rows", max_pixels: int = MAX_PIXELS) -> Tar:
    """The samples of an uncompressed tar shard, or of all ``*.tar`` in a folder or a pattern.

    Members with one key (the name up to its first dot) are one sample. ``read`` chooses the conversation. With
    ``rows`` the member ``.json`` is a row of the schema and names its pictures by extension ("jpg", "source.png").
    The others read one picture and a ``.txt``: with ``draw`` the text asks for the picture, with ``caption`` the
    picture asks for the text. ``pictures`` needs no text.

    Reads every header once. The rest of a damaged shard (compressed, overwritten, cut off) counts as one sample that
    cannot be read. Raises ``ValueError`` where nothing can be read.
    """
    files = find_files(path, (".tar",))
    damaged: dict[int, str] = {}
    members: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
    left_out = Counter(unread_files(path, (".tar",)))
    for number, file in enumerate(files):
        groups: dict[str, dict[str, tuple[int, int]]] = {}
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
        members += [(number, key, group) for key, group in groups.items()]
        if damage:
            damaged[len(members)] = damage
            members.append((number, "damaged", {}))
    if len(members) == len(damaged):
        raise ValueError("; ".join(damaged.values()) or f"{path} holds no samples")
    return Tar(name, files, read, max_pixels, tuple(members), damaged, dict(left_out))


def _tar_members(file: Path) -> tuple[list[tuple[str, int, int]], str]:
    """(name, offset of the data, bytes) of every readable member of a tar, and how the rest is damaged, or ""."""
    end, last, members = 0, "its start", []
    try:
        with tarfile.open(file, "r:") as opened:
            for member in opened:
                end, last = member.offset_data + -(-member.size // 512) * 512, repr(member.name)
                if member.isreg() and not member.issparse():
                    members.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        return members, f"{file} is not a readable uncompressed tar; damaged after {last}: {error}"
    with file.open("rb") as stream:  # tarfile takes a damaged header for the end of the archive
        stream.seek(end)
        if any(stream.read(512)):
            return members, f"{file} is damaged after {last}: what follows is no tar header"
    return members, ""


# ---- shared ---------------------------------------------------------------------------------------------------------


def find_files(path: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The file at ``path``, or those with one of the suffixes in that folder or in that pattern (``*``), sorted.

    Raises ``ValueError`` when there is none.
    """
    if path.is_file():
        return (path,)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    elif "*" in path.name:
        files = list(path.parent.glob(path.name))
    else:
        raise ValueError(f"{str(path)!r} does not exist")
    if not files:
        raise ValueError(f"{str(path)!r} holds no {' or '.join(suffixes)} file")
    return tuple(sorted(files))


def unread_files(path: Path, suffixes: tuple[str, ...]) -> dict[str, int]:
    """How many files of a folder ``find_files`` leaves out, by suffix; hidden ones do not count. Empty for a path that
    is no folder."""
    others = (p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")) if path.is_dir() else ()
    return dict(Counter(p.suffix.lower() or NO_SUFFIX for p in others if p.suffix.lower() not in suffixes))


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """``2 .heic, 1 .svg``: the most frequent first."""
    return ", ".join(f"{n} {suffix}" for suffix, n in sorted(left_out.items(), key=lambda item: (-item[1], item[0])))


def inside(root: Path, reference: str) -> Path:
    """The file that ``reference``, a relative path, names in the folder ``root``: the rule of catalogs and question
    files. Raises ``ValueError`` for a URL, an absolute path, and a path that leaves ``root`` by ``..`` or a link."""
    base = root.resolve()
    if "\0" in reference:
        raise ValueError(f"picture {reference!r} is no path")
    found = (base / reference).resolve()
    if re.match(r"[a-z]+://", reference) or Path(reference).is_absolute() or not found.is_relative_to(base):
        raise ValueError(f"picture {reference!r} lies outside the image folder {str(root)!r}")
    return found


class RowSource(Protocol):
    """What every source of this room offers."""

    @property
    def name(self) -> str: ...
    @property
    def left_out(self) -> Mapping[str, int]: ...
    def __len__(self) -> int: ...
    def where(self, index: int) -> str: ...
    def row(self, index: int) -> Sample: ...
    def picture(self, index: int, reference: str) -> PIL.Image.Image: ...
    def data(self, index: int, reference: str) -> bytes: ...


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
