"""The task ladder of SGT (arXiv 2605.18714): one table of targets, instructions and decoders for annotated pictures.

Low: restore a photo, or draw its edges. Mid: depth and the other stereo view. High: boxes and five kinds of
segmentation. A sample is the picture *to understand* and an instruction, then the target: the picture enters through
the understanding encoder alone, so its pixels cannot be copied.

Label pictures are flat colours of a palette. ``Task.decode`` maps each pixel to the nearest colour, which recovers
the ids of a target exactly. Label pictures are resized with nearest-neighbour interpolation, photos bicubically.

Masks are painted from the largest to the smallest, so the smaller one is on top, and 0 (black) means no mask.

=========  ========================  ===============================================================================
palette    of                        colour of id
=========  ========================  ===============================================================================
tab20      segment                   matplotlib's tab20[i mod 20] for the i-th largest mask; more than 20 share colours
bits       semantic                  the class; its bits spread over red, green and blue, highest first, so that the
                                     first 7 differ by 128 levels, the first 63 by 64
           instance                  the i-th largest countable mask
           panoptic                  class + (classes + 1) x its rank by area in its class (0 for what is not countable)
binary     referring                 white where the phrase points
inferno    depth                     255 (bright) is near, 0 far
grey       edges                     strength of the Sobel gradient (``degrade.edges``)
boxes      detect                    24 strong colours, from the largest box to the smallest, drawn on the photo
=========  ========================  ===============================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any, Literal

import numpy as np
import PIL.Image

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Made, pick, picture, rgb
from diptych.data.tasks import degrade
from diptych.data.tasks import instructions as words

Level = Literal["low", "mid", "high"]
Palette = Literal["tab20", "bits", "binary", "inferno", "grey", "boxes"]
Paper = Literal["dark", "light"]  # what is around the regions of a label picture: black, or white
BASELINE = 1 / 16  # how far the nearest thing of a drawn scene moves from the left view to the right, of the canvas


# --- what is known of a picture ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Annotated:
    """A picture and its annotations; a task names those that it needs. Raises ``ValueError`` where shapes disagree.

    ``masks``      (n, h, w) bool, none of them empty; they may overlap
    ``labels``     the class of each mask (or box), an index of ``classes``
    ``classes``    the names of the data set's classes, the same for all its pictures
    ``countable``  of each mask, whether it is one thing (not stuff, not a crowd); default: all are
    ``boxes``      (n, 4) left, top, right, bottom in pixels, right and bottom exclusive; default: those of the masks
    ``phrases``    of each mask, words that single it out, or ""
    ``depth``      (h, w) in [0, 1], 0 near and 1 far
    ``view``       the right picture of the stereo pair
    """

    image: PIL.Image.Image
    masks: np.ndarray | None = None
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    countable: tuple[bool, ...] | None = None
    boxes: np.ndarray | None = None
    phrases: tuple[str, ...] | None = None
    depth: np.ndarray | None = None
    view: PIL.Image.Image | None = None

    def __post_init__(self) -> None:
        h, w = self.image.height, self.image.width
        for name, image in (("image", self.image), ("view", self.view)):
            if image is not None and (image.mode, image.size) != ("RGB", (w, h)):
                raise ValueError(f"{name} is {image.mode} {image.size}; it must be RGB {(w, h)}")
        if self.masks is not None:
            _shape("masks", self.masks, (len(self.masks), h, w))
            if self.masks.dtype != bool:
                raise ValueError(f"masks are {self.masks.dtype}; they must be bool")
            if empty := np.flatnonzero(~self.masks.any((1, 2))).tolist():
                raise ValueError(f"masks {empty} of {len(self.masks)} are empty")
        if self.boxes is not None:
            _shape("boxes", self.boxes, (len(self.boxes), 4))
            if wrong := [i for i, (x0, y0, x1, y1) in enumerate(self.boxes) if not (x0 < x1 and y0 < y1)]:
                raise ValueError(f"boxes {wrong} of {len(self.boxes)} have no area: left, top, right, bottom")
        n = next((len(v) for v in (self.masks, self.boxes) if v is not None), 0)
        for name in ("boxes", "labels", "countable", "phrases"):
            if (value := getattr(self, name)) is not None and len(value) != n:
                raise ValueError(f"{len(value)} {name} for {n} masks or boxes")
        if wrong := [label for label in self.labels or () if not 0 <= label < len(self.classes)]:
            raise ValueError(f"labels {wrong} are no index of the {len(self.classes)} classes")
        if self.depth is not None:
            _shape("depth", self.depth, (h, w))
            if not (np.isfinite(self.depth).all() and 0 <= self.depth.min() and self.depth.max() <= 1):
                raise ValueError(f"depth must lie in [0, 1]; it spans {self.depth.min()} to {self.depth.max()}")

    @property
    def things(self) -> list[int]:
        """The countable masks or boxes."""
        n = next((len(v) for v in (self.masks, self.boxes) if v is not None), 0)
        return [i for i in range(n) if self.countable is None or self.countable[i]]

    def has(self) -> list[str]:
        """What a task may need and this picture has."""
        names = [n for n in ("masks", "labels", "depth", "view") if _some(getattr(self, n))]
        names += ["things"] if self.masks is not None and self.things else []
        names += ["boxes"] if (self.masks is not None or self.boxes is not None) and self.things else []
        return names + (["phrases"] if self.masks is not None and any(self.phrases or ()) else [])


def _some(value: object) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} have shape {array.shape}; they must have {shape}")


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """(n, 4) int left, top, right, bottom (exclusive) of (n, h, w) masks."""
    ends = []
    for across in (np.asarray(masks.any(axis)) for axis in (1, 2)):
        ends += [across.argmax(1), across.shape[1] - across[:, ::-1].argmax(1)]
    return np.stack([ends[0], ends[2], ends[1], ends[3]], 1)


def phrases_of(names: list[str], boxes: np.ndarray, countable: list[bool] | None = None) -> tuple[str, ...]:
    """A referring expression for each thing: "the dog" where it is the only one, else "the leftmost dog" and the like
    where its centre is a quarter of its box away from the others'; "" for the rest and for what is not countable."""
    counts = Counter(names)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    crowded = {n for n, one in zip(names, countable or [True] * len(names), strict=True) if not one}

    def phrase(i: int) -> str:
        if names[i] in crowded:
            return ""
        if counts[names[i]] == 1:
            return f"the {names[i]}"
        gaps = np.array([centres[i] - centres[j] for j in range(len(names)) if j != i and names[j] == names[i]])
        room = sides[i] / 4
        for word, clear in zip(
            ("leftmost", "rightmost", "topmost", "lowest"),
            ((-gaps > room).all(0)[0], (gaps > room).all(0)[0], (-gaps > room).all(0)[1], (gaps > room).all(0)[1]),
            strict=True,
        ):
            if clear:
                return f"the {word} {names[i]}"
        return ""

    return tuple(phrase(i) for i in range(len(names)))


def farness(extent: float, largest: float, paper: float) -> float:
    """The depth in [0, 1] of a thing drawn ``extent`` wide, if a pinhole camera saw things of one size: the distance
    is proportional to 1 / extent, 0 at ``largest``, and 1 for the paper, where things would be ``paper`` wide."""
    return min(1.0, max(0.0, (1 / extent - 1 / largest) / (1 / paper - 1 / largest)))


# --- palettes ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def palette(name: Palette, count: int = 0, paper: Paper = "dark") -> np.ndarray:
    """(n, 3) uint8: the colour of each id, 0 to n - 1; ``count`` is how many ids "bits" is to have.

    On light paper id 0 of "tab20" and "bits" is white, and "binary" is black on white."""
    if paper == "light":
        dark = palette(name, count)
        return dark[::-1] if name == "binary" else np.concatenate([[[255] * 3], dark[1:]]).astype(np.uint8)
    if name == "bits":
        bits, ids = np.arange(8), np.arange(count)[:, None].astype(np.int64)
        channels = [((ids >> (3 * bits + c) & 1) << (7 - bits)).sum(1) for c in range(3)]
        return np.stack(channels, 1).astype(np.uint8)
    if name == "grey":
        return np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    if name == "binary":
        return np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    if name == "boxes":
        strong = [c for c in product((255, 128, 0), repeat=3) if len(set(c)) > 1]
        return np.array(sorted(strong, key=lambda c: (min(c) - max(c), abs(sum(c) - 383))), np.uint8)
    import matplotlib

    table = np.array(matplotlib.colormaps[name].colors)  # type: ignore[attr-defined]
    table = (table * 255).round().astype(np.uint8)
    return np.concatenate([np.zeros((1, 3), np.uint8), table]) if name == "tab20" else table


def nearest(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(h, w) int: for each of the (h, w, 3) pixels, the index of the colour it is nearest to, the first of equals."""
    codes, where = np.unique(pixels.astype(np.int64) @ np.array([65536, 256, 1]), return_inverse=True)
    seen = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1)
    step, table = max(1, 2**21 // len(colours)), colours.astype(np.int64)
    indices = [
        ((part[:, None] - table) ** 2).sum(-1).argmin(1) for part in np.split(seen, range(step, len(seen), step))
    ]
    return np.concatenate(indices)[where].reshape(pixels.shape[:2])


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TaskPair:
    """Input and target picture; ``count`` is the number of ids of the palette, ``phrase`` the referring expression."""

    input: PIL.Image.Image
    target: PIL.Image.Image
    count: int = 0
    phrase: str = ""


Known = Any  # an ``Annotated`` that has what the task needs: ``Task.pair`` made sure
Maker = Callable[[Known, np.random.Generator], TaskPair]


def paint(masks: np.ndarray, ids: list[int]) -> np.ndarray:
    """(h, w) int: the id of each of the (n, h, w) masks, painted in their order; 0 without a mask."""
    canvas = np.zeros(masks.shape[1:], np.int64)
    for mask, id in zip(masks, ids, strict=True):
        canvas[mask] = id
    return canvas


def _by_area(masks: np.ndarray) -> np.ndarray:
    """Indices from the largest to the smallest, equals in their order."""
    return np.argsort(-masks.sum((1, 2)), kind="stable")


def _drawn(a: Known, ids: np.ndarray, name: Palette, count: int = 0, phrase: str = "") -> TaskPair:
    return TaskPair(a.image, picture(palette(name, count)[ids]), count, phrase)


def _restore(
    a: Known, rng: np.random.Generator, spoil: Callable[[np.ndarray, np.random.Generator], np.ndarray]
) -> TaskPair:
    return TaskPair(picture(spoil(rgb(a.image), rng)), a.image)


def _reconstruct(a: Known, rng: np.random.Generator) -> TaskPair:
    return TaskPair(a.image, a.image)


def _edges(a: Known, rng: np.random.Generator) -> TaskPair:
    return _drawn(a, degrade.edges(rgb(a.image)), "grey")


def _depth(a: Known, rng: np.random.Generator) -> TaskPair:
    return _drawn(a, (255 * (1 - a.depth)).round().astype(int), "inferno")


def _view(a: Known, rng: np.random.Generator) -> TaskPair:
    return TaskPair(a.image, a.view)


def _segment(a: Known, rng: np.random.Generator) -> TaskPair:
    masks = a.masks[_by_area(a.masks)]
    return _drawn(a, paint(masks, [i % 20 + 1 for i in range(len(masks))]), "tab20")


def _semantic(a: Known, rng: np.random.Generator) -> TaskPair:
    order = _by_area(a.masks)
    return _drawn(a, paint(a.masks[order], [a.labels[i] + 1 for i in order]), "bits", len(a.classes) + 1)


def _instance(a: Known, rng: np.random.Generator) -> TaskPair:
    masks = a.masks[a.things]
    ids = list(range(1, len(masks) + 1))
    return _drawn(a, paint(masks[_by_area(masks)], ids), "bits", max(64, len(ids) + 1))


def _panoptic(a: Known, rng: np.random.Generator) -> TaskPair:
    order, base = _by_area(a.masks), len(a.classes) + 1
    ranks: Counter[int] = Counter()
    ids, things = [], set(a.things)
    for i in order.tolist():
        ids.append(a.labels[i] + 1 + (base * ranks[a.labels[i]] if i in things else 0))
        ranks[a.labels[i]] += i in things
    return _drawn(a, paint(a.masks[order], ids), "bits", base * max(8, *ranks.values()))


def _referring(a: Known, rng: np.random.Generator) -> TaskPair:
    i = pick(rng, [i for i, phrase in enumerate(a.phrases) if phrase])
    return _drawn(a, a.masks[i].astype(int), "binary", phrase=a.phrases[i])


def _detect(a: Known, rng: np.random.Generator) -> TaskPair:
    canvas, colours = rgb(a.image).copy(), palette("boxes")
    for i, (x0, y0, x1, y1) in enumerate(box_list(a).tolist()):
        w = _line(a.image.size)
        ring = np.ones((y1 - y0, x1 - x0), bool)
        ring[w:-w, w:-w] = False
        canvas[y0:y1, x0:x1][ring] = colours[i % len(colours)]
    return TaskPair(a.image, picture(canvas))


def box_list(a: Known) -> np.ndarray:
    """(n, 4) int: the boxes of the countable things, from the largest to the smallest, whole pixels in the picture."""
    boxes = (boxes_of(a.masks) if a.boxes is None else a.boxes)[a.things]
    low = np.floor(boxes[:, :2]).clip(0, np.array(a.image.size) - 1)
    high = np.ceil(boxes[:, 2:]).clip(low + 1, a.image.size)
    boxes = np.concatenate([low, high], 1).astype(int)
    return boxes[np.argsort(-(high - low).prod(1), kind="stable")]


def _line(size: tuple[int, int]) -> int:
    """The width of a box's line in pixels."""
    return max(1, round(min(size) / 100))


# --- reading targets back ---------------------------------------------------------------------------------------------


def read_boxes(drawn: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """(n, 4) int: the boxes in a drawing of (h, w, 3) pixels on a photo, one a colour, in the order of the colours.

    A pixel belongs to a line when it is within 24 levels of a colour of the palette and the photo's pixel is not. A
    side is a column (or row) with at least half as many line pixels as the fullest one. More than 24 boxes share
    colours and cannot be distinguished. A box is not read where smaller boxes hide half of a side.
    """
    boxes = []
    for colour in palette("boxes").astype(int):
        near, same = (np.abs(p.astype(int) - colour).max(-1) <= 24 for p in (drawn, photo))
        sides = []
        for count in ((near & ~same).sum(0), (near & ~same).sum(1)):
            (full,) = np.nonzero((2 * count >= count.max()) & (count > 0))
            sides.append((full[0], full[-1] + 1) if len(full) else None)
        if sides[0] and sides[1]:
            boxes.append((sides[0][0], sides[1][0], sides[0][1], sides[1][1]))
    return np.array(boxes, int).reshape(-1, 4)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One task: what it needs of a picture, how its target is made, asked for and read back."""

    name: str
    level: Level
    make: Maker
    instructions: tuple[str, ...]
    needs: tuple[str, ...] = ()
    palette: Palette | None = None

    @property
    def nearest(self) -> bool:
        """Whether the target is a label picture, resized to the nearest pixel."""
        return self.palette not in (None, "grey", "boxes")

    def pair(self, annotated: Annotated, rng: np.random.Generator) -> TaskPair:
        """The input and the target. Raises ``ValueError`` when the picture lacks what the task needs."""
        has = annotated.has()
        if missing := [need for need in self.needs if need not in has]:
            raise ValueError(f"task {self.name!r} needs {' and '.join(missing)}; the picture has {has or 'none'}")
        return self.make(annotated, rng)

    @property
    def papers(self) -> tuple[Paper, ...]:
        """The papers that the target exists on: both for pictures of regions, which have a colour for "nothing"."""
        return ("dark", "light") if self.palette in ("tab20", "bits", "binary") else ("dark",)

    def decode(
        self, drawn: PIL.Image.Image, count: int = 0, photo: PIL.Image.Image | None = None, paper: Paper = "dark"
    ) -> np.ndarray:
        """The labels in a picture: (h, w) int ids of the palette, or for "detect" (n, 4) boxes.

        ``count`` is that of the target (in the sample's info), ``photo`` the input, needed by "detect",
        ``paper`` the one of the target. Raises ``ValueError`` for a task that draws a photo.
        """
        if self.palette is None:
            coded = ", ".join(name for name, task in TASKS.items() if task.palette)
            raise ValueError(f"task {self.name!r} draws a photo; these can be read back: {coded}")
        if self.palette == "boxes":
            if photo is None:
                raise ValueError("reading boxes needs the photo they are drawn on")
            return read_boxes(rgb(drawn), rgb(photo.resize(drawn.size)))
        if self.palette == "bits" and count < 2:
            raise ValueError(f"count is {count}; reading {self.name!r} needs how many ids there are, at least 2")
        return nearest(rgb(drawn), palette(self.palette, count, paper))


TASKS = {
    task.name: task
    for task in (
        Task("reconstruct", "low", _reconstruct, words.RECONSTRUCT),
        Task("denoise", "low", partial(_restore, spoil=degrade.noisy), words.DENOISE),
        Task("deblur", "low", partial(_restore, spoil=degrade.blurred), words.DEBLUR),
        Task("derain", "low", partial(_restore, spoil=degrade.rainy), words.DERAIN),
        Task("enhance", "low", partial(_restore, spoil=degrade.dark), words.ENHANCE),
        Task("super_resolve", "low", partial(_restore, spoil=degrade.coarse), words.SUPER_RESOLVE),
        Task("inpaint", "low", partial(_restore, spoil=degrade.covered), words.INPAINT),
        Task("edges", "low", _edges, words.EDGES, (), "grey"),
        Task("depth", "mid", _depth, words.DEPTH, ("depth",), "inferno"),
        Task("view", "mid", _view, words.VIEW, ("view",)),
        Task("detect", "high", _detect, words.DETECT, ("boxes",), "boxes"),
        Task("semantic", "high", _semantic, words.SEMANTIC, ("masks", "labels"), "bits"),
        Task("instance", "high", _instance, words.INSTANCE, ("things",), "bits"),
        Task("panoptic", "high", _panoptic, words.PANOPTIC, ("masks", "labels"), "bits"),
        Task("referring", "high", _referring, words.REFERRING, ("phrases",), "binary"),
        Task("segment", "high", _segment, words.SEGMENT, ("masks",), "tab20"),
    )
}


def find(name: str) -> Task:
    """The task of that name. Raises ``ValueError`` with the choices."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def generator(seed: int, sample: str, task: str) -> np.random.Generator:
    """The generator that belongs to this address alone."""
    key = f"{seed}\0{sample}\0{task}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))


_INVERSE = {"black": "white", "white": "black", "dark": "white"}
ON_LIGHT = ", on a white background"


def make(task: Task, annotated: Annotated, rng: np.random.Generator, paper: Paper = "dark") -> Made:
    """The messages of a sample, and its info: type (the task), count (of ids), classes (how many), phrase.

    The picture is to understand, so its latents are withheld; the target alone is supervised. On light paper the
    instruction says white for black and black for white, and ends with ``ON_LIGHT``; the info names the paper. Raises
    ``ValueError`` for a paper that the task does not have.
    """
    if paper not in task.papers:
        raise ValueError(f"paper is {paper!r}; task {task.name!r} has {', '.join(task.papers)}")
    pair = task.pair(annotated, rng)
    text = pick(rng, task.instructions)
    if paper == "light":
        assert task.palette is not None
        ids = task.decode(pair.target, pair.count)
        pair = replace(pair, target=picture(palette(task.palette, pair.count, "light")[ids]))
        text = re.sub(r"\b(black|white|dark)\b", lambda match: _INVERSE[match[1]], text) + ON_LIGHT
    text = text.replace("{phrase}", pair.phrase)
    messages = (
        user(Image(pair.input, "understand"), text),
        assistant(Image(pair.target, "target", nearest=task.nearest)),
    )
    info = {"type": task.name, "count": pair.count, "classes": len(annotated.classes), "phrase": pair.phrase}
    info |= {"paper": paper} if paper == "light" else {}
    return messages, {key: value for key, value in info.items() if value != ""}


Annotate = Callable[[np.random.Generator, int, str], Annotated]


def sources(world: str, annotate: Annotate) -> dict[str, Callable[[np.random.Generator, str, int], Made]]:
    """``{world}/sgt/{task}`` (and ``{world}/sgt-light/{task}`` for label pictures) -> the maker of its samples;
    ``annotate(rng, size, task)`` draws an annotated picture."""
    folders: dict[Paper, str] = {"dark": "sgt", "light": "sgt-light"}
    return {
        f"{world}/{folder}/{name}": partial(_generated, annotate=annotate, task=name, paper=paper)
        for paper, folder in folders.items()
        for name, task in TASKS.items()
        if paper in task.papers
    }


def _generated(rng: np.random.Generator, split: str, size: int, annotate: Annotate, task: str, paper: Paper) -> Made:
    return make(TASKS[task], annotate(rng, size, task), rng, paper)
