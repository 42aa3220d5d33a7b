"""The user's catalog: a YAML file that names data sets and says where they are and how to read them.

::

    cats:     {format: jsonl, path: cats.jsonl, images: photos}
    scraped:  {format: webdataset, path: shards/*.tar, read: draw}
    pairs:    {format: parquet, path: pairs.parquet, read: caption}
    textures: {format: images, path: textures}
    things:   {format: coco, path: instances.json, images: photos, read: sgt/instance}

Paths are relative to the catalog file, or addresses (s3://, gs://, https://, hf://). docs/data.md says what each
format holds. A file NAME.index beside the catalog, or ``index: FILE``, is what ``diptych data index`` wrote.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from diptych.data import sources as readers
from diptych.data.decoding import MAX_PIXELS, picture_suffixes
from diptych.data.filter import kept_rows
from diptych.data.index import SUFFIX, Index, Scan, load, write
from diptych.data.mixture import First, Source
from diptych.data.parquet import Parquet, parquet, scan_groups
from diptych.data.reading import read
from diptych.data.self_condition import PICTURES, UnlabelledPictures
from diptych.data.tasks import annotations as annotated
from diptych.data.tasks import ladder
from diptych.machine.addresses import address, is_remote, join

STRICT = ConfigDict(extra="forbid", frozen=True)
Path_ = Annotated[str, Field(min_length=1)]
Pixels = Annotated[int, Field(gt=0, strict=True)]
SGT = "sgt/"


def _task(read: str) -> str:
    if not (read.startswith(SGT) and read.removeprefix(SGT) in ladder.TASKS):
        raise ValueError(f"choose from {', '.join(SGT + name for name in ladder.TASKS)}")
    return read


ReadTask = Annotated[str, AfterValidator(_task)]


class Jsonl(BaseModel):
    """jsonl rows and an image folder."""

    model_config = STRICT
    format: Literal["jsonl"]
    path: Path_
    images: Path_ | None = None
    index: Path_ | None = None
    keep: Path_ | None = None
    max_pixels: Pixels = MAX_PIXELS


class Images(BaseModel):
    """A folder of pictures. A task of SGT (``read``) may also need folders of label pictures."""

    model_config = STRICT
    format: Literal["images"]
    path: Path_
    read: ReadTask | None = None
    masks: Path_ | None = None
    labels: Path_ | None = None
    classes: Path_ | None = None
    depth: Path_ | None = None
    view: Path_ | None = None
    longest: Pixels = annotated.LONGEST
    seed: int = 0
    paper: ladder.Paper = "dark"
    index: Path_ | None = None
    keep: Path_ | None = None
    max_pixels: Pixels = MAX_PIXELS


class Annotation(BaseModel):
    """An annotation file (or many), read as a task of SGT."""

    model_config = STRICT
    format: Literal["coco", "coco-panoptic", "sa1b"]
    path: Path_
    read: ReadTask
    images: Path_ | None = None
    masks: Path_ | None = None
    longest: Pixels = annotated.LONGEST
    seed: int = 0
    paper: ladder.Paper = "dark"
    max_pixels: Pixels = MAX_PIXELS


class PackedEntry(BaseModel):
    """Parquet files or webdataset shards: the pictures are inside."""

    model_config = STRICT
    format: Literal["parquet", "webdataset"]
    path: Path_
    read: readers.Read = "rows"
    index: Path_ | None = None
    keep: Path_ | None = None
    max_pixels: Pixels = MAX_PIXELS


Opened = readers.JsonLines | readers.ImageFolder | Parquet | readers.Tar | readers.Kept | annotated.Proxies
Settings = Jsonl | Images | Annotation | PackedEntry
FORMATS: dict[str, type[Jsonl] | type[Images] | type[Annotation] | type[PackedEntry]] = {
    "jsonl": Jsonl,
    "images": Images,
    "parquet": PackedEntry,
    "webdataset": PackedEntry,
    "coco": Annotation,
    "coco-panoptic": Annotation,
    "sa1b": Annotation,
}


@dataclass(frozen=True)
class CatalogEntry:
    """One data set of a catalog: its name, its settings, the catalog's folder, and its ``file:line``."""

    name: str
    settings: Settings
    folder: Path
    where: str

    def open(self) -> Opened:
        """The source. Raises ``ValueError`` that begins with the catalog's file and line."""
        source, keep = self.open_whole(), getattr(self.settings, "keep", None)
        if not keep:
            return source
        try:
            assert not isinstance(source, annotated.Proxies)
            return readers.Kept(source, kept_rows(join(self.folder, keep), len(source)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where}: data set {self.name!r}: {error}") from error

    def open_whole(self) -> Opened:
        """The source with all its rows. Raises ``ValueError`` that begins with the catalog's file and line."""
        s = self.settings
        try:
            path, index = join(self.folder, s.path), self._index()
            if isinstance(s, Jsonl):
                pictures = join(self.folder, s.images) if s.images else None
                return readers.jsonl(self.name, path, pictures, s.max_pixels, index)
            if isinstance(s, Images) and not s.read:
                if given := sorted(s.model_fields_set - {"format", "path", "index", "keep", "max_pixels"}):
                    raise ValueError(f"{given} go with read: {SGT}...")
                return readers.images(self.name, path, s.max_pixels, index)
            if isinstance(s, Images | Annotation):
                task = ladder.TASKS[str(s.read).removeprefix(SGT)]
                folder = isinstance(s, Images)
                left_out = readers.images("", path).left_out if folder else readers.unread_files(path, (".json",))
                return annotated.Proxies(self.name, task, self._rows(s, task), s.longest, s.seed, left_out, s.paper)
            make = parquet if s.format == "parquet" else readers.webdataset
            return make(self.name, path, s.read, s.max_pixels, index)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where}: data set {self.name!r}: {error}") from error

    @property
    def index_file(self) -> Path:
        """Where the index of the data set is, or would be: ``index``, or NAME.index beside the catalog."""
        return join(self.folder, getattr(self.settings, "index", None) or f"{self.name}{SUFFIX}")

    @property
    def takes_index(self) -> bool:
        """Whether the data set can have an index: all but those that are read as a task of SGT."""
        return not isinstance(self.settings, Annotation) and not (
            isinstance(self.settings, Images) and self.settings.read
        )

    def _index(self) -> Index | None:
        """The index that ``write_index`` wrote. Raises ``ValueError`` where it describes other data, and where the one
        that the catalog names is missing."""
        s = self.settings
        if isinstance(s, Annotation) or not self.takes_index:
            return None
        if not self.index_file.is_file():
            if s.index:
                raise ValueError(f"index {str(self.index_file)!r} does not exist; write it with `diptych data index`")
            return None
        files, settings, *_ = self._scan()
        return load(self.index_file, files, settings)

    def _scan(self) -> tuple[tuple[Path, ...], dict[str, Any], Scan, Mapping[str, int]]:
        """(files, the settings that decide their rows, the scan of one file, the files left out)."""
        s = self.settings
        path, settings = join(self.folder, s.path), dict[str, Any](format=s.format)
        if isinstance(s, Jsonl):
            suffixes: tuple[str, ...] = readers.JSONL
            scan: Scan = readers.scan_lines
        elif isinstance(s, Images) and not s.read:
            return (path,), settings, readers.scan_folder, {}
        elif not isinstance(s, PackedEntry):
            raise ValueError("it is read as a task of SGT; such a data set takes no index")
        elif s.format == "parquet":
            settings["read"] = s.read
            suffixes, scan = (".parquet",), partial(scan_groups, read=s.read)
        else:
            suffixes, scan = (".tar",), readers.scan_tar
        return readers.find_files(path, suffixes), settings, scan, readers.unread_files(path, suffixes)

    def write_index(self, processes: int = 1, progress: Callable[[int, int], None] = lambda done, files: None) -> int:
        """Scans the files of the data set and writes their index; returns its number of rows. ``progress`` is called
        with (files scanned, files in all). Raises ``ValueError`` that begins with the catalog's file and line."""
        done = 0

        def count(files: int) -> None:
            nonlocal done
            done += files
            progress(done, len(paths))

        try:
            paths, settings, scan, left_out = self._scan()
            return write(self.index_file, paths, scan, settings, left_out=left_out, processes=processes, progress=count)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where}: data set {self.name!r}: {error}") from error

    def _rows(self, s: Images | Annotation, task: ladder.Task) -> tuple[annotated.AnnotatedRow, ...]:
        def folder_of(key: str) -> Path | None:
            value = getattr(s, key)
            return join(self.folder, value) if value else None

        path, masks = join(self.folder, s.path), folder_of("masks")
        if isinstance(s, Images):
            others = {key: folder_of(key) for key in ("labels", "classes", "depth", "view")}
            return annotated.folder(path, task, masks, **others, max_pixels=s.max_pixels)
        images = folder_of("images")
        if masks and s.format != "coco-panoptic":
            raise ValueError(f"{s.format} takes no 'masks': they are in {s.path}")
        if s.format == "sa1b":
            return annotated.sa1b(path, images, task, s.max_pixels)
        if not images:
            raise ValueError("'images' is missing: the folder of the pictures")
        if s.format == "coco":
            return annotated.coco(path, images, task, s.max_pixels)
        if not masks:
            raise ValueError("'masks' is missing: the folder of the panoptic PNGs")
        return annotated.coco_panoptic(path, images, masks, task, s.max_pixels)


def read_catalog(path: str | Path) -> dict[str, CatalogEntry]:
    """The entries of a catalog file, in order; opens none of them.

    Raises ``ValueError`` naming the file, the line, the entry, the key and the choices.
    """
    path = address(path)
    try:
        node = yaml.compose(read(path).decode("utf-8"), yaml.SafeLoader)
    except FileNotFoundError as error:
        raise ValueError(f"catalog {str(path)!r} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"catalog {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{at}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise ValueError(f"{path}: a catalog is a mapping of data set names to settings")
    entries: dict[str, CatalogEntry] = {}
    for key, value in node.value:
        where, name = f"{path}:{key.start_mark.line + 1}", str(key.value)
        if not (isinstance(key, yaml.ScalarNode) and re.fullmatch(r"[\w.-]+", name)):
            raise ValueError(f"{where}: {name!r} is no name for a data set; use letters, digits, '_', '-' and '.'")
        if name in entries:
            raise ValueError(f"{where}: data set {name!r} comes twice; first in {entries[name].where}")
        entries[name] = CatalogEntry(name, _settings(value, f"{where}: data set {name!r}"), path.parent, where)
    return entries


def load_catalog(path: str | Path) -> dict[str, Source]:
    """Every data set of a catalog file, opened. Raises the errors of ``read_catalog`` and ``CatalogEntry.open``."""
    return {name: entry.open() for name, entry in read_catalog(path).items()}


def sources(
    names: Iterable[str],
    catalog: str | Path | None = None,
    size: int = 64,
    split: str = "train",
    encoded: str | Path | None = None,
    folders: Mapping[str, str] | None = None,
) -> dict[str, Source]:
    """The named data sets: those of the catalog, else the embedded ones (with pictures of ``size`` and of ``split``).

    The user's own data have no split and keep their sizes. ``name#n`` selects the first n samples of a data set, and
    ``name/pictures`` its target pictures without text. ``folders`` maps names to plain folders of pictures that replace
    those data sets. ``encoded`` is a folder of ``diptych data precompute``; data sets that it holds are read from
    there. Raises ``ValueError`` for an unknown name, and for encoded data of other pictures. Warns of pictures that a
    folder holds in a format that is not read.
    """
    from diptych.data import encoded as precomputed
    from diptych.data.worlds import embedded

    entries, folders = read_catalog(catalog) if catalog is not None else {}, folders or {}
    folder = None if encoded is None else address(encoded)
    opened: dict[str, Source] = {}
    for wanted in names:
        name, cut, n = wanted.rpartition("#") if wanted not in entries else (wanted, "", "")
        name = name or wanted
        kept = next((k for k in (wanted, name) if folder is not None and precomputed.there(folder / k)), None)
        whole = name.removesuffix(PICTURES) if name not in entries else name
        if kept is not None:
            opened[wanted] = precomputed.encoded(kept, (folder or Path()) / kept, origin(name, entries, size, folders))
            cut = cut if kept == name else ""
        elif whole in folders:
            opened[wanted] = _warned(readers.images(whole, address(folders[whole])))
        elif whole in entries:
            opened[wanted] = _warned(entries[whole].open())
        elif whole in embedded.names():
            opened[wanted] = embedded.source(whole, split, size)
        else:
            of_catalog = f"{catalog}: {', '.join(entries)}; " if catalog is not None else "no catalog was given; "
            raise ValueError(f"unknown data set {whole!r}; {of_catalog}embedded: {', '.join(embedded.names())}")
        if whole != name and kept is None:
            opened[wanted] = UnlabelledPictures(opened[wanted])
        if cut:
            if not n.isdigit():
                raise ValueError(f"data set {wanted!r}: # must be followed by a number of samples")
            opened[wanted] = First(opened[wanted], int(n))
    return opened


def files_left_out(source: Source) -> Mapping[str, int]:
    """How many files of a data set's folder are not read, by suffix; empty for what is not read from files."""
    while isinstance(source, First | UnlabelledPictures):
        source = source.source
    return source.left_out if isinstance(source, Opened) else {}


def _warned(source: Opened) -> Opened:
    """The source; a warning names the pictures that its folder holds and that it does not read, by suffix."""
    pictures = {suffix: n for suffix, n in source.left_out.items() if suffix in picture_suffixes()}
    if pictures:
        warnings.warn(
            f"data set {source.name!r} leaves out {readers.describe_left_out(pictures)}: these formats are not read; "
            "convert the files to PNG or JPEG",
            stacklevel=3,
        )
    return source


def origin(name: str, entries: Mapping[str, CatalogEntry], size: int, folders: Mapping[str, str] | None = None) -> dict:
    """The settings that determine a data set's pictures, JSON-able: compared when encoded data are read."""
    whole = name.partition("#")[0].removesuffix(PICTURES)
    if whole in (folders or {}):
        return {"folder": _absolute(address((folders or {})[whole]))}
    if whole in entries:
        settings = entries[whole].settings
        unset = {"index"} if getattr(settings, "keep", None) else {"index", "keep"}
        return settings.model_dump(exclude=unset) | {"folder": _absolute(entries[whole].folder)}
    return {"embedded": name.partition("#")[0], "size": size}


def _absolute(folder: Path) -> str:
    return str(folder if is_remote(folder) else folder.absolute())


def _settings(node: yaml.Node, where: str) -> Settings:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{where} must be a mapping with 'format' and 'path'")
    keys = [key.value for key, _ in node.value]
    if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
        raise ValueError(f"{where}: keys {twice} come twice")
    try:
        row: dict[str, Any] = yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {getattr(error, 'problem', None) or error}") from error
    if str(row.get("format")) not in FORMATS:
        raise ValueError(f"{where}: format is {row.get('format')!r}; choose from {', '.join(FORMATS)}")
    model = FORMATS[row["format"]]
    if unknown := sorted(str(k) for k in row if k not in model.model_fields):
        raise ValueError(f"{where}: unknown keys {unknown}; {row['format']} takes {', '.join(model.model_fields)}")
    try:
        return model.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key, given = ".".join(map(str, first["loc"])), first["input"]
        reason = first["msg"].removeprefix("Value error, ")
        problem = f"{key!r} is missing" if first["type"] == "missing" else f"{key} is {given!r}: {reason}"
        raise ValueError(f"{where}: {problem}") from error
