"""Annotation files as sources of SGT's tasks (arXiv 2605.18714): COCO, COCO panoptic, SA-1B, folders of label pictures.

A reader lists rows; a row's ``read`` gives ``tasks.Annotated``. ``Proxies`` makes samples of them: the random
draws of a row are seeded with (seed, row's id, task). Errors begin with the file and name the annotation, the key and
the value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import skia

from diptych.core.sample import Sample
from diptych.data.canvas import canvas
from diptych.data.decoding import MAX_PIXELS, open_labels, open_picture
from diptych.data.sources import find_files, inside
from diptych.data.sources import images as list_images
from diptych.data.tasks import ladder
from diptych.data.tasks.ladder import Annotated, Paper, Task

LONGEST = 1024  # pixels on the long side that annotated pictures are shrunk to


# --- run lengths ------------------------------------------------------------------------------------------------------


def rle_encode(mask: np.ndarray) -> list[int]:
    """The run lengths of an (h, w) bool mask down its columns, the first of zeros (perhaps 0): COCO's plain counts."""
    flat = mask.ravel(order="F")
    turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], turns, [flat.size]])).tolist()
    return [0, *counts] if flat.size and flat[0] else counts


def rle_decode(counts: list[int] | str | bytes, size: tuple[int, int]) -> np.ndarray:
    """The (h, w) bool mask of run lengths, a list or COCO's compressed string, for ``size`` (height, width).

    Raises ``ValueError`` for a broken string, for lengths that are no whole numbers and for a wrong total.
    """
    runs = rle_expand(counts) if isinstance(counts, (str, bytes)) else counts
    if not (isinstance(runs, list) and all(type(n) is int and n >= 0 for n in runs)):
        raise ValueError("run lengths must be whole numbers from 0")
    if sum(runs) != size[0] * size[1]:
        raise ValueError(f"run lengths add up to {sum(runs)}, but {size[0]} x {size[1]} pixels are {size[0] * size[1]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def rle_compress(counts: list[int]) -> str:
    """COCO's string of run lengths: from the fourth on the difference to the last but one; then groups of five bits,
    lowest first, each a character from "0" on, with 32 added while more follow; the last group's top bit is the sign.
    """
    text = ""
    for i, count in enumerate(counts):
        x, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            group, x = x & 31, x >> 5
            more = x != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
    return text


def rle_expand(text: str | bytes) -> list[int]:
    """The run lengths in COCO's string. Raises ``ValueError`` for characters out of range and a string cut off."""
    codes = np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8).astype(int) - 48
    if wrong := sorted({chr(c + 48) for c in codes if not 0 <= c < 64}):
        raise ValueError(f"a compressed run length holds {wrong}; characters go from '0' to 'o'")
    counts: list[int] = []
    x = shift = 0
    for code in codes.tolist():
        x, shift = x | (code & 31) << shift, shift + 5
        if not code & 32:
            x -= (code & 16) << (shift - 4)
            counts.append(x + (counts[-2] if len(counts) > 2 else 0))
            x = shift = 0
    if shift:
        raise ValueError("a compressed run length is cut off")
    return counts


def polygons(rings: Any, size: tuple[int, int]) -> np.ndarray:
    """The (h, w) bool mask of polygons [[x, y, x, y, ...], ...] in pixels: a pixel is in when its centre is in one.

    Raises ``ValueError`` for what is no list of three points or more.
    """
    pixels, paper = canvas(size[1], (0, 0, 0, 255), size[0])
    for ring in rings:
        numbers = isinstance(ring, list) and all(isinstance(v, (int, float)) for v in ring)
        if not numbers or len(ring) < 6 or len(ring) % 2:
            raise ValueError(f"a polygon must be at least three pairs of numbers, not {str(ring)[:80]}")
        path = skia.Path()
        path.addPoly([skia.Point(x, y) for x, y in zip(ring[::2], ring[1::2], strict=True)], True)
        paper.drawPath(path, skia.Paint(AntiAlias=False, Color=skia.ColorWHITE))
    return pixels[..., 0] > 0


def segmentation(value: Any, size: tuple[int, int]) -> np.ndarray:
    """The (h, w) bool mask of a COCO ``segmentation``: polygons, or {"size": [h, w], "counts": list or string}."""
    if isinstance(value, list):
        return polygons(value, size)
    if not (isinstance(value, dict) and {"size", "counts"} <= value.keys()):
        raise ValueError(f"'segmentation' must be polygons or {{'size', 'counts'}}, not {str(value)[:80]}")
    if value["size"] != list(size):
        raise ValueError(f"'segmentation' is of {value['size']} pixels, the picture of {list(size)}")
    return rle_decode(value["counts"], size)


# --- rows and the source ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotatedRow:
    """One annotated picture: its id, where it comes from, and how it is read."""

    id: str
    where: str
    read: Callable[[], Annotated]


@dataclass(frozen=True, eq=False)
class Proxies:
    """Samples of one task over annotated pictures."""

    name: str
    task: Task
    rows: tuple[AnnotatedRow, ...] = field(repr=False)
    longest: int = LONGEST
    seed: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    paper: Paper = "dark"

    def __post_init__(self) -> None:
        if self.paper not in self.task.papers:
            raise ValueError(f"paper is {self.paper!r}; task {self.task.name!r} has {', '.join(self.task.papers)}")
        if not self.rows:
            needs = ", ".join(self.task.needs) or "pictures"
            raise ValueError(f"no picture has what task {self.task.name!r} needs: {needs}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no row {index}; it has {len(self)}")
        return _made(self, index)

    def where(self, index: int) -> str:
        """The file, and what in it."""
        return self.rows[index].where

    def row(self, index: int) -> Sample:
        """The sample, its pictures by role."""
        return _made(self, index).map_images(lambda image: replace(image, image=image.role))

    def picture(self, index: int, reference: str) -> PIL.Image.Image:
        """The picture of that role."""
        return next(image.pixels for image in _made(self, index).images() if image.role == reference)


@lru_cache(maxsize=1)
def _made(source: Proxies, index: int) -> Sample:
    row = source.rows[index]
    try:
        annotated = shrunk(row.read(), source.longest)
        rng = ladder.generator(source.seed, row.id, source.task.name)
        messages_and_info = ladder.make(source.task, annotated, rng, source.paper)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
    return Sample(row.id, *messages_and_info)


def shrunk(a: Annotated, longest: int) -> Annotated:
    """The annotated picture with its long side at most ``longest``: photos bicubic, masks and depth to the nearest
    pixel. Masks that vanish are left out."""
    scale = longest / max(a.image.size)
    if scale >= 1:
        return a
    w, h = (max(1, round(side * scale)) for side in a.image.size)
    ys, xs = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in ((h, a.image.height), (w, a.image.width)))
    masks = None if a.masks is None else a.masks[:, ys[:, None], xs]
    kept = list(range(len(a.labels or ()))) if masks is None else np.flatnonzero(masks.any((1, 2))).tolist()

    def kept_of(values: tuple | None) -> tuple | None:
        return None if values is None else tuple(values[i] for i in kept)

    def photo(image: PIL.Image.Image | None) -> PIL.Image.Image | None:
        return None if image is None else image.resize((w, h), PIL.Image.Resampling.BICUBIC)

    return Annotated(
        a.image.resize((w, h), PIL.Image.Resampling.BICUBIC),
        None if masks is None else masks[kept],
        kept_of(a.labels),
        a.classes,
        kept_of(a.countable),
        None if a.boxes is None or masks is not None else a.boxes * np.array([w, h, w, h]) / np.tile(a.image.size, 2),
        kept_of(a.phrases),
        None if a.depth is None else a.depth[ys[:, None], xs],
        photo(a.view),
    )


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco(path: Path, images: Path, task: Task, max_pixels: int = MAX_PIXELS) -> tuple[AnnotatedRow, ...]:
    """The pictures of a COCO instances file that have what the task needs; crowds are not countable.

    Raises ``ValueError`` when the file is not such a file.
    """
    data, by_image, categories = _coco(path, "category_id", "id")
    rows = []
    for image in data["images"]:
        annotations = by_image.get(image["id"], [])
        things = [a for a in annotations if not a.get("iscrowd")]
        if not task.needs or (annotations if task.name in ("segment", "semantic", "panoptic") else things):
            entries = annotations if task.needs else []
            read = partial(_read_coco, images, image["file_name"], entries, categories, max_pixels)
            rows.append(AnnotatedRow(str(image["id"]), f"{path}: image {image['id']}", read))
    return tuple(rows)


def coco_panoptic(
    path: Path, images: Path, masks: Path, task: Task, max_pixels: int = MAX_PIXELS
) -> tuple[AnnotatedRow, ...]:
    """The pictures of a COCO panoptic file and its folder of PNGs (a segment's id is R + 256 G + 65536 B).

    Categories with ``isthing`` are countable, crowds are not. Raises ``ValueError`` when the file is not such a file.
    """
    data, by_image, categories = _coco(path, "segments_info", "file_name")
    rows = []
    for image in data["images"]:
        for annotation in by_image.get(image["id"], []):
            things = [s for s in annotation["segments_info"] if _thing(s, categories)]
            if things or task.name not in ("instance", "detect", "referring"):
                read = partial(_read_panoptic, images, masks, image["file_name"], annotation, categories, max_pixels)
                rows.append(AnnotatedRow(str(image["id"]), f"{path}: image {image['id']}", read))
    return tuple(rows)


def _coco(path: Path, *keys: str) -> tuple[dict, dict[Any, list[dict]], dict[int, tuple[int, str, bool]]]:
    """The file, its annotations by image, and {category id: (class, name, is a thing)}."""
    data = read_json(path)
    for key, needed in (
        ("images", ("id", "file_name")),
        ("annotations", ("image_id", *keys)),
        ("categories", ("id", "name")),
    ):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f"{path}: has no list {key!r}")
        for i, entry in enumerate(data[key]):
            _needs(entry, needed, f"{path}: {key}[{i}]")
    by_image: dict[Any, list[dict]] = {}
    for annotation in data["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    order = sorted(data["categories"], key=lambda c: c["id"])
    return data, by_image, {c["id"]: (i, c["name"], bool(c.get("isthing", 1))) for i, c in enumerate(order)}


def _thing(entry: dict, categories: Mapping[int, tuple[int, str, bool]]) -> bool:
    known = categories.get(entry.get("category_id"))  # type: ignore[arg-type]
    return known is not None and known[2] and not entry.get("iscrowd")


def _read_coco(images: Path, name: str, annotations: list[dict], categories: dict, max_pixels: int) -> Annotated:
    image = open_picture(inside(images, name), name, max_pixels)
    masks = [_mask(a, f"annotation {a['id']}", image.size) for a in annotations]
    return _labelled(image, masks, annotations, categories)


def _read_panoptic(
    images: Path, masks: Path, name: str, annotation: dict, categories: dict, max_pixels: int
) -> Annotated:
    image = open_picture(inside(images, name), name, max_pixels)
    drawn = open_labels(inside(masks, annotation["file_name"]), annotation["file_name"], max_pixels)
    if drawn.shape != (image.height, image.width):
        raise ValueError(f"{annotation['file_name']!r} is {drawn.shape[::-1]}, the picture {image.size}")
    for i, segment in enumerate(annotation["segments_info"]):
        _needs(segment, ("id", "category_id"), f"segments_info[{i}]")
    if lost := [s["id"] for s in annotation["segments_info"] if not (drawn == s["id"]).any()]:
        raise ValueError(f"segments {lost} are not drawn in {annotation['file_name']!r}")
    return _labelled(
        image, [drawn == s["id"] for s in annotation["segments_info"]], annotation["segments_info"], categories
    )


def _labelled(image: PIL.Image.Image, masks: list[np.ndarray], entries: list[dict], categories: dict) -> Annotated:
    if unknown := sorted({a["category_id"] for a in entries} - categories.keys()):
        raise ValueError(f"category ids {unknown} are not in 'categories'")
    if not masks:
        return Annotated(image)
    stacked, known = np.stack(masks), [categories[a["category_id"]] for a in entries]
    countable = [_thing(a, categories) for a in entries]
    phrases = ladder.phrases_of([name for _, name, _ in known], ladder.boxes_of(stacked), countable)
    classes = tuple(name for _, name, _ in categories.values())
    return Annotated(image, stacked, tuple(i for i, _, _ in known), classes, tuple(countable), phrases=phrases)


def _mask(entry: dict, what: str, size: tuple[int, int]) -> np.ndarray:
    _needs(entry, ("segmentation",), what)
    try:
        mask = segmentation(entry["segmentation"], (size[1], size[0]))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if not mask.any():
        raise ValueError(f"{what}: its mask is empty")
    return mask


# --- SA-1B ------------------------------------------------------------------------------------------------------------


def sa1b(path: Path, images: Path | None, task: Task, max_pixels: int = MAX_PIXELS) -> tuple[AnnotatedRow, ...]:
    """One row for each json file of SA-1B (a file, a folder or a pattern); its masks have no classes.

    Pictures are in the folder of the json files or in ``images``. Files are opened when a row is read.
    """
    files = find_files(path, (".json",))
    return tuple(AnnotatedRow(f.stem, str(f), partial(_read_sa1b, f, images or f.parent, max_pixels)) for f in files)


def _read_sa1b(path: Path, images: Path, max_pixels: int) -> Annotated:
    data = read_json(path)
    _needs(data, ("image", "annotations"), "the file")
    _needs(data["image"], ("file_name",), "'image'")
    name = data["image"]["file_name"]
    image = open_picture(inside(images, name), name, max_pixels)
    masks = [_mask(a, f"annotations[{i}]", image.size) for i, a in enumerate(data["annotations"])]
    return Annotated(image, np.stack(masks) if masks else None)


# --- folders ----------------------------------------------------------------------------------------------------------


def folder(
    path: Path,
    task: Task,
    masks: Path | None = None,
    labels: Path | None = None,
    classes: Path | None = None,
    depth: Path | None = None,
    view: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[AnnotatedRow, ...]:
    """Pictures with label pictures of the same relative path (and the suffix .png) in other folders.

    ``masks``    a picture whose every value (or colour) but 0 (or black) is a mask, or a folder of that name with one
                 picture a mask, white or not black inside
    ``labels``   COCO-stuff's pixel maps: the value is the class, 255 is nothing
    ``classes``  a text file, one class a line ("7: road" or "road"), the first of value 0
    ``depth``    greys of 8 or 16 bits, black is near and white far
    ``view``     the right pictures, of the same name and suffix

    Raises ``ValueError`` when a folder is missing or the task needs another, and for ``labels`` without ``classes``.
    """
    given = {"path": path, "masks": masks, "labels": labels, "depth": depth, "view": view}
    for key, place in given.items():
        if place is not None and not place.is_dir():
            raise ValueError(f"{key}: folder {str(place)!r} does not exist")
    if masks and labels:
        raise ValueError("masks and labels exclude each other: give one of them")
    if bool(labels) != bool(classes):
        raise ValueError("labels and classes go together: a folder of pixel maps and a text file of class names")
    able = {"masks": masks or labels, "labels": labels, "things": masks, "boxes": masks, "depth": depth, "view": view}
    if missing := [need for need in task.needs if not able.get(need)]:
        has = ", ".join(k for k, v in able.items() if v) or "pictures alone"
        raise ValueError(f"task {task.name!r} needs {' and '.join(missing)}; the folders give {has}")
    names = _class_names(classes) if classes else ()
    read = partial(_read_folder, path, masks, labels, names, depth, view, max_pixels)
    pictures = list_images("", path)
    names_in_folder = (pictures.path(row) for row in range(len(pictures)))
    return tuple(AnnotatedRow(name, str(path / name), partial(read, name)) for name in names_in_folder)


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"classes: {str(path)!r} cannot be read: {error}") from error
    numbered = [line.partition(":") for line in lines]
    for i, (number, colon, _) in enumerate(numbered):
        if colon and number.strip() != str(i):
            raise ValueError(f"{path}:{i + 1}: class {number!r} should be {i}; values count from 0")
    return tuple(name.strip() if colon else number for number, colon, name in numbered)


def _read_folder(
    path: Path,
    masks: Path | None,
    labels: Path | None,
    classes: tuple[str, ...],
    depth: Path | None,
    view: Path | None,
    max_pixels: int,
    name: str,
) -> Annotated:
    image = open_picture(inside(path, name), name, max_pixels)
    png = str(Path(name).with_suffix(".png"))

    def values(root: Path, key: str, name: str = png) -> np.ndarray:
        pixels = open_labels(inside(root, name), f"{key}: {name}", max_pixels)
        if pixels.shape != (image.height, image.width):
            raise ValueError(f"{key}: {name!r} is {pixels.shape[::-1]}, the picture {image.size}")
        return pixels

    annotated = Annotated(
        image,
        depth=_unit(values(depth, "depth"), png) if depth else None,
        view=open_picture(inside(view, name), f"view: {name}", max_pixels) if view else None,
    )
    if masks and (each := inside(masks, str(Path(name).with_suffix("")))).is_dir():
        drawn = [values(each, "masks", p.name) > 0 for p in sorted(each.glob("*.png"))]
        return replace(annotated, masks=np.stack(drawn) if drawn else None)
    if masks:
        pixels = values(masks, "masks")
        ids = [v for v in np.unique(pixels).tolist() if v]
        return replace(annotated, masks=np.stack([pixels == v for v in ids]) if ids else None)
    if labels:
        pixels = values(labels, "labels")
        ids = [v for v in np.unique(pixels).tolist() if v != 255]
        if unknown := [v for v in ids if v >= len(classes)]:
            raise ValueError(f"labels: {png!r} has values {unknown}; there are {len(classes)} classes")
        stacked = np.stack([pixels == v for v in ids]) if ids else None
        return replace(annotated, masks=stacked, labels=tuple(ids), classes=classes, countable=(False,) * len(ids))
    return annotated


def _unit(values: np.ndarray, name: str) -> np.ndarray:
    """Greys as numbers in [0, 1], by the bits they have."""
    if values.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"depth: {name!r} is coloured; it must be grey")
    return values / np.iinfo(values.dtype).max


# --- shared -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ``ValueError`` naming the file, the line and the column."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} does not exist") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def _needs(entry: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, not {str(entry)[:80]}")
    if missing := [key for key in keys if key not in entry]:
        raise ValueError(f"{where} lacks {missing}; it has {', '.join(map(str, entry)) or 'nothing'}")
