"""The shapes world: drawn scenes whose every caption, answer and edit can be checked exactly.

One to four objects (five shapes, six colours) lie in a jittered 3x3 lattice on white paper. From a scene come prompts
in GenEval's six tags (arXiv 2310.11513), questions, captions and edits; ``check``, ``caption_ok`` and ``check_edit``
score what a model made of them. The detector behind ``check`` is written by rules; its accuracy on drawn scenes, clean
and degraded, is a test.

Held out: about one unordered pair in ten of two different (colour, shape) kinds never occurs together in a scene of any
source, in no split. ``prompts(..., held_out=True)`` asks for exactly these.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import permutations
from typing import Any

import numpy as np
import PIL.Image
import skia

from diptych.core.sample import Image, assistant, user
from diptych.data import tasks
from diptych.data.render import Generated, Made, canvas, components, pick, picture, rgb

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 205, 30),
    "purple": (150, 50, 175),
    "black": (20, 20, 20),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")
SIDES = ("left", "right", "top", "bottom")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MOST = 4  # objects in a scene

Kind = tuple[str, str]  # (colour, shape)


# --- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One object: the centre and the width of its box, in fractions of the canvas, y downwards."""

    shape: str
    colour: str
    x: float
    y: float
    extent: float

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects that do not touch each other, on a white square."""

    things: tuple[Thing, ...]

    def to_json(self) -> dict:
        return {"things": [dict(vars(t)) for t in self.things]}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Scene:
        return Scene(tuple(Thing(**t) for t in row["things"]))


def render(scene: Scene, size: int) -> PIL.Image.Image:
    """The antialiased RGB picture of a scene, ``size`` pixels square."""
    pixels, paper = canvas(size)
    for thing in scene.things:
        _draw(paper, thing, size, COLOURS[thing.colour])
    return picture(pixels)


def coverage(scene: Scene, size: int) -> np.ndarray:
    """How much of each pixel each object covers: (objects, size, size) float32 in [0, 1]; above 0 is all it touches."""
    cover = np.zeros((len(scene.things), size, size), np.float32)
    for i, thing in enumerate(scene.things):
        cover[i] = _cover(thing, size)
    return cover


def masks(scene: Scene, size: int) -> np.ndarray:
    """Instance masks: (objects, size, size) bool, true where an object covers at least half of the pixel."""
    return coverage(scene, size) >= 0.5


def box(thing: Thing) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of an object, in fractions of the canvas."""
    half_height = thing.extent * _outline(thing.shape)[1] / 2
    return thing.x - thing.extent / 2, thing.y - half_height, thing.x + thing.extent / 2, thing.y + half_height


@cache
def _outline(shape: str) -> tuple[skia.Path, float, float, tuple[float, float]]:
    """A path in a box one wide centred on 0, its height, its area, and where its centroid lies."""
    if shape == "circle":
        path = skia.Path()
        path.addCircle(0, 0, 0.5)
        return path, 1.0, np.pi / 4, (0.0, 0.0)
    if shape == "square":
        points = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    elif shape == "triangle":
        points = [(0, -0.46), (0.5, 0.46), (-0.5, 0.46)]
    elif shape == "star":
        turns = -np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1, 0.45)
        star = np.stack([radius * np.cos(turns), radius * np.sin(turns)], 1)
        low, high = star.min(0), star.max(0)
        points = [(float(x), float(y)) for x, y in (star - (low + high) / 2) / (high - low)[0]]
    else:
        a, b = 0.19, 0.5
        corner = [(a, -b), (a, -a), (b, -a)]
        points = corner + [(-y, x) for x, y in corner] + [(-x, -y) for x, y in corner] + [(y, -x) for x, y in corner]
    path = skia.Path()
    path.addPoly([skia.Point(*p) for p in points], True)
    x, y = np.array(points).T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    centroid = ((x + np.roll(x, -1)) @ cross / (6 * area), (y + np.roll(y, -1)) @ cross / (6 * area))
    return path, float(y.max() - y.min()), abs(float(area)), (float(centroid[0]), float(centroid[1]))


def _draw(paper: skia.Canvas, thing: Thing, size: int, colour: tuple[int, int, int]) -> None:
    paper.save()
    paper.translate(thing.x * size, thing.y * size)
    paper.scale(thing.extent * size, thing.extent * size)
    paper.drawPath(_outline(thing.shape)[0], _paint(colour))
    paper.restore()


@cache
def _paint(colour: tuple[int, int, int]) -> skia.Paint:
    return skia.Paint(AntiAlias=True, Color=skia.Color(*colour))


def _cover(thing: Thing, size: int) -> np.ndarray:
    pixels, paper = canvas(size, (0, 0, 0, 255))
    _draw(paper, thing, size, (255, 255, 255))
    return pixels[..., 0].astype(np.float32) / 255


# --- which kinds may meet ---------------------------------------------------------------------------------------------


@cache
def held_out(a: Kind, b: Kind) -> bool:
    """Whether these two (colour, shape) kinds never meet in a scene of the sources: one pair in ten, by a hash."""
    if a == b:
        return False
    text = " + ".join(" ".join(kind) for kind in sorted((a, b)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def seen(kinds: Iterable[Kind]) -> bool:
    """Whether no two of these kinds are held out from each other."""
    kinds = list(kinds)
    return not any(held_out(a, b) for i, a in enumerate(kinds) for b in kinds[:i])


# --- words ------------------------------------------------------------------------------------------------------------


def plural(noun: str) -> str:
    """The plural of a shape's name, or of "object"."""
    return noun + ("es" if noun.endswith("s") else "s")


def describe(scene: Scene) -> str:
    """The canonical caption, sorted by shape and colour: "a red circle, two blue stars and a black cross"."""
    counts = Counter(t.kind for t in scene.things)
    order = sorted(counts, key=lambda kind: (SHAPES.index(kind[1]), list(COLOURS).index(kind[0])))
    return _listing([Need(shape, colour, counts[colour, shape]) for colour, shape in order])


def caption_ok(text: str, scene: Scene) -> bool:
    """Whether a caption names exactly the objects of the scene, in any order: every count, colour and shape."""
    words = "|".join([*NUMBERS[1:], "an", "a"])
    shapes = "|".join([plural(s) for s in SHAPES] + list(SHAPES))
    pattern = rf"({words}) ({'|'.join(COLOURS)}) ({shapes})"
    text = text.lower().strip().rstrip(".")
    parts = re.split(r",? and |, ", text)
    counts: Counter[Kind] = Counter()
    for part in parts:
        match = re.fullmatch(pattern, part.strip())
        if not match:
            return False
        number, colour, noun = match.groups()
        shape = noun if noun in SHAPES else next(s for s in SHAPES if plural(s) == noun)
        counts[colour, shape] += 1 if number in ("a", "an") else NUMBERS.index(number)
    return counts == Counter(t.kind for t in scene.things)


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """``count`` objects of this shape and this colour; ``None`` leaves one of them free."""

    shape: str | None
    colour: str | None
    count: int = 1

    def text(self) -> str:
        noun = self.shape or "object"
        number, noun = ("a", noun) if self.count == 1 else (NUMBERS[self.count], plural(noun))
        return " ".join(w for w in (number, self.colour, noun) if w)


@dataclass(frozen=True)
class Prompt:
    """What to draw, in words and exactly. With a ``relation`` the first need stands in it to the second."""

    tag: str
    text: str
    needs: tuple[Need, ...]
    relation: str | None = None

    def to_json(self) -> dict:
        return vars(self) | {"needs": [dict(vars(n)) for n in self.needs]}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Prompt:
        return Prompt(row["tag"], row["text"], tuple(Need(**n) for n in row["needs"]), row["relation"])


def prompts(tag: str, n: int, seed: int = 0, held_out: bool = False) -> list[Prompt]:
    """``n`` evaluation prompts of one of GenEval's tags; a text repeats only when the tag has no more texts.

    ``held_out`` asks for pairs that no training scene shows ("position" then names colours too). Raises ``ValueError``
    for an unknown tag, and for a held-out tag that names no two coloured objects.
    """
    choices = ("position", "color_attr") if held_out else TAGS
    if tag not in choices:
        raise ValueError(f"tag is {tag!r}{' with held_out' if held_out else ''}; choose from {', '.join(choices)}")
    every = _all_prompts(tag, held_out)
    rng = np.random.default_rng((seed, TAGS.index(tag), held_out))
    found: list[Prompt] = []
    while len(found) < n:
        found += [every[i] for i in rng.permutation(len(every))]
    return found[:n]


def _listing(needs: list[Need]) -> str:
    return _join([need.text() for need in needs])


def _join(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def _prompt(tag: str, needs: Iterable[Need], relation: str | None = None) -> Prompt:
    needs = tuple(needs)
    text = f"{needs[0].text()} {relation} {needs[1].text()}" if relation else _listing(list(needs))
    return Prompt(tag, text, needs, relation)


@cache
def _all_prompts(tag: str, unseen: bool, coloured: bool = False) -> tuple[Prompt, ...]:
    """Every prompt of a tag; of coloured pairs only the seen or only the held-out ones."""
    kinds = [(c, s) for s in SHAPES for c in COLOURS]
    if tag == "single_object":
        return tuple(_prompt(tag, [Need(s, None)]) for s in SHAPES)
    if tag == "two_object":
        return tuple(_prompt(tag, [Need(a, None), Need(b, None)]) for a in SHAPES for b in SHAPES if a != b)
    if tag == "counting":
        return tuple(_prompt(tag, [Need(s, None, n)]) for s in SHAPES for n in range(2, MOST + 1))
    if tag == "colors":
        return tuple(_prompt(tag, [Need(s, c)]) for c, s in kinds)
    pairs = [(a, b) for a in kinds for b in kinds if a != b and held_out(a, b) == unseen]
    if tag == "color_attr":
        return tuple(_prompt(tag, [Need(a[1], a[0]), Need(b[1], b[0])]) for a, b in pairs)
    needs = [(Need(a[1], a[0]), Need(b[1], b[0])) for a, b in pairs]
    if not (unseen or coloured):
        needs = [(Need(a, None), Need(b, None)) for a in SHAPES for b in SHAPES if a != b]
    return tuple(_prompt(tag, pair, relation) for pair in needs for relation in RELATIONS)


# --- drawing scenes at random -----------------------------------------------------------------------------------------

Cell = tuple[int, int]  # (column, row) of the lattice
Spot = tuple[float, float, float]  # size and place within a cell, in [0, 1)
_LATTICE = [(c, r) for r in range(3) for c in range(3)]


def _thing(kind: Kind, cell: Cell, spot: Spot) -> Thing:
    a, b, c = spot
    extent, dx, dy = 15 + 4 * a, 2 * b - 1, 2 * c - 1
    room = (64 / 3 - extent) / 2 - 1  # at least two pixels of 64 stay free between two objects
    x, y = ((c + 0.5) / 3 + d * room / 64 for c, d in zip(cell, (dx, dy), strict=True))
    return Thing(kind[1], kind[0], round(x, 4), round(y, 4), round(extent / 64, 4))


def _cells(rng: np.random.Generator, n: int) -> list[Cell]:
    return [_LATTICE[i] for i in rng.permutation(9)[:n]]


def _spots(rng: np.random.Generator, n: int) -> list[Spot]:
    return rng.random((n, 3)).tolist()


def _named(cell: Cell) -> str:
    column, row = cell
    return f"{('top', 'middle', 'bottom')[row]} {('left', 'middle', 'right')[column]}"


def _where(rng: np.random.Generator, cell: Cell) -> str:
    """ "at the top left", or two times in five the side alone: "at the top", "on the left"."""
    sides = [("on the left", None, "on the right")[cell[0]], ("at the top", None, "at the bottom")[cell[1]]]
    rough = pick(rng, tuple(sides)) if rng.random() < 0.4 else None
    return rough or f"at the {_named(cell)}"


def _scene(kinds: list[Kind], cells: list[Cell], spots: list[Spot]) -> Scene:
    return Scene(tuple(map(_thing, kinds, cells, spots)))


def _place(rng: np.random.Generator, kinds: list[Kind], cells: list[Cell] | None = None) -> Scene:
    return _scene(kinds, cells or _cells(rng, len(kinds)), _spots(rng, len(kinds)))


def _kind(rng: np.random.Generator) -> Kind:
    return pick(rng, tuple(COLOURS)), pick(rng, SHAPES)


def _kinds(rng: np.random.Generator, n: int) -> list[Kind]:
    """Kinds that may meet; now and then one repeats, so that captions count."""
    while True:
        kinds = [_kind(rng) for _ in range(n)]
        for i in range(1, n):
            if rng.random() < 0.25:
                kinds[i] = kinds[i - 1]
        if seen(kinds):
            return kinds


def random_scene(rng: np.random.Generator) -> Scene:
    """One to four objects of kinds that may meet."""
    return _place(rng, _kinds(rng, int(rng.integers(1, MOST + 1))))


def random_prompt(rng: np.random.Generator, tag: str) -> Prompt:
    """A training prompt: one of GenEval's tags, or "description" (every object with its colour)."""
    if tag == "description":
        counts = Counter(_kinds(rng, int(rng.integers(1, MOST + 1))))
        return _prompt(tag, [Need(s, c, n) for (c, s), n in counts.items()])
    return pick(rng, _all_prompts(tag, False, tag == "position" and rng.random() < 0.5))


def scene_for(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """A scene that satisfies a prompt strictly; a relation is unmistakable in it. Free colours are drawn at random.

    The scene of a held-out prompt shows its held-out pair; every other scene is of kinds that may meet.
    """
    wanted = [need for need in prompt.needs for _ in range(need.count)]
    while True:
        same = pick(rng, tuple(COLOURS)) if rng.random() < 0.5 else None  # counted objects often share a colour
        kinds = []
        for need in wanted:
            free = same if prompt.tag == "counting" and same else pick(rng, tuple(COLOURS))
            kinds.append((need.colour or free, need.shape or pick(rng, SHAPES)))
        if seen(kinds) or all(need.colour and need.shape for need in wanted):
            break
    cells = _cells(rng, len(kinds))
    while prompt.relation and prompt.relation != _clear(*cells[:2]):
        cells = _cells(rng, len(kinds))
    return _place(rng, kinds, cells)


def _clear(a: Cell, b: Cell) -> str | None:
    """The relation of a to b where one axis dominates, else ``None``."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) == abs(dy):
        return None
    return RELATIONS[(dx > 0) if abs(dx) > abs(dy) else 2 + (dy > 0)]


# --- detecting and checking -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """An object in a picture: shape and colour ("unknown" where none fits), box centre and size in fractions.

    ``match`` in [0, 1] is the overlap with the ideal shape.
    """

    shape: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    match: float

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, why not, and what was seen in it."""

    ok: bool
    reason: str
    found: tuple[Found, ...]


SPECK = 0.004  # of the canvas: smaller spots are ignored (the smallest object covers 0.02)
_PALETTE = np.array(list(COLOURS.values()), np.float32)


def detect(image: PIL.Image.Image) -> list[Found]:
    """The objects in a picture of the shapes world, largest first; a spot below ``SPECK`` of the area is ignored.

    A pixel is unmixed into paper and the ink that explains it best; pixels that are mostly ink form connected objects;
    an object has the ink of its inner pixels, and the shape whose drawing of the same area and centroid overlaps most.
    """
    pixels = rgb(image).astype(np.float32)
    height, width = pixels.shape[:2]
    ink = _ink(pixels)
    solid = ink > 0.5
    parts = [p for p in components(solid) if len(p) >= max(3, SPECK * height * width)]
    return [_identify(pixels, solid, part) for part in sorted(parts, key=len, reverse=True)]


def _ink(pixels: np.ndarray) -> np.ndarray:
    """How much ink a pixel holds, (h, w): the share of the ink, in [0, 1.2], that explains the pixel best."""
    towards = 255 - _PALETTE  # from paper to ink
    dark = 255 - pixels
    share = np.clip(dark @ towards.T / (towards**2).sum(1), 0, 1.2)
    error = (dark**2).sum(-1, keepdims=True) - 2 * share * (dark @ towards.T) + share**2 * (towards**2).sum(1)
    return np.take_along_axis(share, error.argmin(-1)[..., None], -1)[..., 0]


def _identify(pixels: np.ndarray, solid: np.ndarray, part: np.ndarray) -> Found:
    height, width = solid.shape
    (top, left), (bottom, right) = part.min(0), part.max(0) + 1
    y0, x0, y1, x1 = max(top - 2, 0), max(left - 2, 0), min(bottom + 2, height), min(right + 2, width)
    own = np.zeros((y1 - y0 + 2, x1 - x0 + 2), bool)
    own[part[:, 0] - y0 + 1, part[:, 1] - x0 + 1] = True
    inner = own[1:-1, 1:-1] & own[:-2, 1:-1] & own[2:, 1:-1] & own[1:-1, :-2] & own[1:-1, 2:]
    near = own[1:-1, 1:-1] | own[:-2, 1:-1] | own[2:, 1:-1] | own[1:-1, :-2] | own[1:-1, 2:]
    own = own[1:-1, 1:-1]
    crop = pixels[y0:y1, x0:x1]

    core = crop[inner] if inner.sum() >= 3 else crop[own]
    nearest = ((core[:, None] - _PALETTE) ** 2).sum(-1).argmin(1)
    votes = np.bincount(nearest, minlength=len(_PALETTE))
    best = int(votes.argmax())
    typical = np.median(core, axis=0)
    pure = votes[best] >= 0.7 * len(core) and np.linalg.norm(typical - _PALETTE[best]) < 60
    colour = list(COLOURS)[best] if pure else "unknown"

    towards = 255 - typical  # the ink as it is, so that a pale object is measured right
    alpha = np.clip((255 - crop) @ towards / max(towards @ towards, 1), 0, 1)
    alpha = np.where(near & (own | ~solid[y0:y1, x0:x1]), alpha, 0)
    area = alpha.sum()
    cy, cx = (np.arange(y1 - y0) + 0.5) @ alpha.sum(1) / area, (np.arange(x1 - x0) + 0.5) @ alpha.sum(0) / area
    side = max(alpha.shape)
    square = np.zeros((side, side), np.float32)
    square[: alpha.shape[0], : alpha.shape[1]] = alpha
    ideals = _ideals(float(area), float(cx), float(cy), side)
    overlap = np.maximum(_overlap(ideals, square), _overlap(_soften(ideals), square))  # sharp or blurred, as it is
    matches = dict(zip(SHAPES, overlap.tolist(), strict=True))
    shape = max(matches, key=matches.__getitem__)
    return Found(
        shape if matches[shape] >= 0.7 else "unknown", colour,
        float(left + right) / 2 / width, float(top + bottom) / 2 / height,
        float(right - left) / width, float(bottom - top) / height, matches[shape],
    )  # fmt: skip


def _ideals(area: float, cx: float, cy: float, side: int) -> np.ndarray:
    """The coverage of every shape of that area and centroid, in pixels: (shapes, side, side) float32."""
    pixels, paper = canvas(side, (0, 0, 0, 255), height=side * len(SHAPES))
    for i, shape in enumerate(SHAPES):
        _, _, unit_area, (ox, oy) = _outline(shape)
        extent = (area / unit_area) ** 0.5
        paper.save()
        paper.clipRect(skia.Rect.MakeXYWH(0, i * side, side, side))
        thing = Thing(shape, "", (cx - ox * extent) / side, (cy - oy * extent) / side + i, extent / side)
        _draw(paper, thing, side, (255, 255, 255))
        paper.restore()
    return pixels[..., 0].reshape(len(SHAPES), side, side).astype(np.float32) / 255


def _overlap(ideals: np.ndarray, cover: np.ndarray) -> np.ndarray:
    shared = np.minimum(ideals, cover).sum((1, 2))
    return shared / (ideals.sum((1, 2)) + cover.sum() - shared)


def _soften(covers: np.ndarray) -> np.ndarray:
    """A blur by about a pixel."""
    wide = np.pad(covers, ((0, 0), (2, 2), (2, 2)))
    wide = wide[:, :-4] + wide[:, 4:] + 4 * (wide[:, 1:-3] + wide[:, 3:-1]) + 6 * wide[:, 2:-2]
    return (wide[..., :-4] + wide[..., 4:] + 4 * (wide[..., 1:-3] + wide[..., 3:-1]) + 6 * wide[..., 2:-2]) / 256


def relations(a: Found | Thing, b: Found | Thing) -> set[str]:
    """The relations in which a stands to b, by GenEval's rule: box centres, offsets beyond a tenth of both sizes.

    A diagonal neighbour can be both left of and above.
    """
    (aw, ah), (bw, bh) = _extent(a), _extent(b)
    offset = np.array([a.x - b.x, a.y - b.y])
    far = np.maximum(np.abs(offset) - 0.1 * np.array([aw + bw, ah + bh]), 0) * np.sign(offset)
    if np.abs(far).max() < 1e-3:
        return set()
    dx, dy = far / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def _extent(a: Found | Thing) -> tuple[float, float]:
    if isinstance(a, Found):
        return a.width, a.height
    left, top, right, bottom = box(a)
    return right - left, bottom - top


def check(image: PIL.Image.Image, prompt: Prompt) -> Verdict:
    """Whether a picture shows exactly what a prompt asks for and nothing else."""
    found = tuple(detect(image))
    wanted = [need for need in prompt.needs for _ in range(need.count)]
    if len(found) != len(wanted):
        return Verdict(False, f"{len(found)} objects instead of {len(wanted)}", found)
    related = False
    for order in permutations(found):
        if all(_meets(need, f) for need, f in zip(wanted, order, strict=True)):
            if prompt.relation is None or prompt.relation in relations(order[0], order[1]):
                return Verdict(True, "", found)
            related = True
    if related:
        return Verdict(False, f"the objects are right, but not {prompt.relation}", found)
    seen = ", ".join(f"{f.colour} {f.shape}" for f in found)
    return Verdict(False, f"found {seen} instead of {_listing(list(prompt.needs))}", found)


def _meets(need: Need, found: Found) -> bool:
    if "unknown" in found.kind:
        return False
    return need.shape in (None, found.shape) and need.colour in (None, found.colour)


def chance(n: int = 500, seed: int = 0, size: int = 64) -> dict[str, float]:
    """How often a picture drawn for another prompt of the same tag passes, for each of GenEval's tags."""
    rates = {}
    for tag in TAGS:
        rng = np.random.default_rng((seed, TAGS.index(tag)))
        asked = [random_prompt(rng, tag) for _ in range(n)]
        pictures = [render(scene_for(rng, prompt), size) for prompt in asked]
        order = rng.permutation(n)
        rates[tag] = sum(check(pictures[i], asked[j]).ok for i, j in zip(order, range(n), strict=True)) / n
    return rates


# --- sources ----------------------------------------------------------------------------------------------------------

_TAG_WEIGHTS = {
    "single_object": 0.04, "two_object": 0.18, "counting": 0.16, "colors": 0.06, "position": 0.16, "color_attr": 0.22,
    "description": 0.18,
}  # fmt: skip
_WORDINGS = ("draw {}", "a picture of {}", "please draw {}", "show me {}", "an image of {}")


def make_draw(rng: np.random.Generator, split: str, size: int, tag: str = "") -> Made:
    """A caption (of one tag, or any), and the picture that satisfies it strictly; info: prompt, scene."""
    prompt = random_prompt(rng, tag or pick(rng, tuple(_TAG_WEIGHTS), tuple(_TAG_WEIGHTS.values())))
    scene = scene_for(rng, prompt)
    text = pick(rng, _WORDINGS).format(prompt.text) if rng.random() < 0.15 else prompt.text
    messages = user(text), assistant(Image(render(scene, size), "target"))
    return messages, {"type": prompt.tag, "prompt": prompt.to_json(), "scene": scene.to_json()}


def make_draw_where(rng: np.random.Generator, split: str, size: int) -> Made:
    """A caption that tells where most objects are, exactly or roughly, and the picture. Taught and never scored: from
    it words are bound to things sooner; info: prompt (without the places), scene."""
    kinds = _kinds(rng, int(rng.integers(1, MOST + 1)))
    cells = _cells(rng, len(kinds))
    prompt, scene = _prompt("where", [Need(s, c) for c, s in kinds]), _place(rng, kinds, cells)
    texts = [need.text() for need in prompt.needs]
    for i, cell in enumerate(cells):
        if i == 0 or rng.random() < 0.7:
            texts[i] += f" {_where(rng, cell)}"
    messages = user(_join(texts)), assistant(Image(render(scene, size), "target"))
    return messages, {"type": "where", "prompt": prompt.to_json(), "scene": scene.to_json()}


def make_caption(rng: np.random.Generator, split: str, size: int) -> Made:
    """A picture, and its canonical description; info: answer, scene. Score with ``caption_ok``."""
    scene = random_scene(rng)
    answer = describe(scene)
    messages = user(Image(render(scene, size)), "describe the picture"), assistant(answer)
    return messages, {"type": "caption", "answer": answer, "scene": scene.to_json()}


@dataclass(frozen=True)
class Question:
    """A question about a scene. ``type`` is one of ``QUESTIONS``; the answer is short and lowercase."""

    type: str
    text: str
    answer: str
    scene: Scene


def random_question(rng: np.random.Generator, types: tuple[str, ...] = ()) -> Question:
    """A question of a random type (of ``types``, or any) about a scene made for it, so that answers are balanced."""
    return _ASKED[pick(rng, types or tuple(QUESTIONS))](rng)


def _unlike(rng: np.random.Generator, n: int, avoid: Callable[[Kind], bool]) -> list[Kind]:
    """``n`` kinds none of which is to be avoided."""
    kinds: list[Kind] = []
    while len(kinds) < n:
        kind = _kind(rng)
        if not avoid(kind):
            kinds.append(kind)
    return kinds


def _ask_colour(rng: np.random.Generator) -> Question:
    while True:
        kinds = _kinds(rng, int(rng.integers(1, MOST + 1)))
        colour, shape = kinds[0]
        if all(s != shape for _, s in kinds[1:]):
            return Question("colour", f"what colour is the {shape}?", colour, _place(rng, kinds))


def _ask_shape(rng: np.random.Generator) -> Question:
    while True:
        kinds = _kinds(rng, int(rng.integers(1, MOST + 1)))
        colour, shape = kinds[0]
        if all(c != colour for c, _ in kinds[1:]):
            return Question("shape", f"what shape is the {colour} object?", shape, _place(rng, kinds))


def _ask_count(rng: np.random.Generator) -> Question:
    what = pick(rng, ("objects", "shape", "colour"), (1, 2, 1))
    count = int(rng.integers(1 if what == "objects" else 0, MOST + 1))
    colour, shape = _kind(rng)
    others = 0 if what == "objects" else int(rng.integers(count == 0, MOST - count + 1))
    while True:
        if what == "objects":
            kinds, noun = _kinds(rng, count), "objects"
        elif what == "shape":
            kinds = [(pick(rng, tuple(COLOURS)), shape) for _ in range(count)]
            kinds, noun = kinds + _unlike(rng, others, lambda k: k[1] == shape), plural(shape)
        else:
            kinds = [(colour, pick(rng, SHAPES)) for _ in range(count)]
            kinds, noun = kinds + _unlike(rng, others, lambda k: k[0] == colour), f"{colour} objects"
        if seen(kinds):
            return Question("count", f"how many {noun} are there?", NUMBERS[count], _place(rng, kinds))


def _ask_exists(rng: np.random.Generator) -> Question:
    """Balanced; most absent kinds share their colour with one object and their shape with another."""
    yes, hard = rng.random() < 0.5, rng.random() < 0.75
    while True:
        colour, shape = wanted = _kind(rng)
        n = int(rng.integers(1, MOST + 1))
        if yes:
            kinds = [wanted, *_unlike(rng, n - 1, wanted.__eq__)]
        elif hard:
            near = _unlike(rng, 2, wanted.__eq__)
            near = [(colour, near[0][1]), (near[1][0], shape)]
            if wanted in near:
                continue
            kinds = near + _unlike(rng, max(n - 2, 0), wanted.__eq__)
        else:
            kinds = _unlike(rng, n, wanted.__eq__)
        if seen(kinds):
            text = f"is there a {colour} {shape}?"
            return Question("exists", text, "yes" if yes else "no", _place(rng, kinds))


def _distinct(rng: np.random.Generator, n: int) -> list[Kind]:
    """``n`` kinds of ``n`` different shapes that may meet."""
    while True:
        kinds = [(pick(rng, tuple(COLOURS)), SHAPES[i]) for i in rng.permutation(len(SHAPES))[:n]]
        if seen(kinds):
            return kinds


def _ask_position(rng: np.random.Generator) -> Question:
    """Balanced; a false relation is the opposite one or one of the other axis, and never arguable."""
    yes, relation = rng.random() < 0.5, pick(rng, RELATIONS)
    n = int(rng.integers(2, MOST + 1))
    kinds = _distinct(rng, n)
    while True:
        cells, spots = _cells(rng, n), _spots(rng, n)
        true = _clear(*cells[:2])
        if not true or (true == relation) != yes:
            continue
        scene = _scene(kinds, cells, spots)
        if yes or relation not in relations(*scene.things[:2]):
            text = f"is the {kinds[0][1]} {relation} the {kinds[1][1]}?"
            return Question("position", text, "yes" if yes else "no", scene)


def _ask_which(rng: np.random.Generator) -> Question:
    """The one object that stands in a relation to another; no second object arguably does."""
    relation = pick(rng, RELATIONS)
    n = int(rng.integers(2, MOST + 1))
    kinds = _distinct(rng, n)
    while True:
        cells, spots = _cells(rng, n), _spots(rng, n)
        if _clear(*cells[:2]) != relation:
            continue
        scene = _scene(kinds, cells, spots)
        if not any(relation in relations(other, scene.things[1]) for other in scene.things[2:]):
            return Question("which", f"what is {relation} the {kinds[1][1]}?", kinds[0][1], scene)


def _ask_where(rng: np.random.Generator) -> Question:
    """The row and the column of an object: taught, because relations are hard to learn without it, and never scored."""
    n = int(rng.integers(1, MOST + 1))
    kinds, cells = _distinct(rng, n), _cells(rng, n)
    return Question("where", f"where is the {kinds[0][1]}?", _named(cells[0]), _place(rng, kinds, cells))


QUESTIONS: dict[str, Callable[[np.random.Generator], Question]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "position": _ask_position,
    "which": _ask_which,
}
_ASKED = {**QUESTIONS, "where": _ask_where}  # what is asked only where it is asked for by name


def make_ask(rng: np.random.Generator, split: str, size: int, types: tuple[str, ...] = ()) -> Made:
    """A picture and a question (of ``types``, or any), and the answer; info: type, answer, scene."""
    question = random_question(rng, types)
    messages = user(Image(render(question.scene, size)), question.text), assistant(question.answer)
    return messages, {"type": question.type, "answer": question.answer, "scene": question.scene.to_json()}


def make_read(rng: np.random.Generator, split: str, size: int) -> Made:
    """Words alone: a description, a question about it, and the answer; info: type, answer, prompt."""
    tag = pick(rng, ("description", "position", "color_attr", "counting"), (3, 3, 2, 1))
    prompt = random_prompt(rng, tag)
    type_, question, answer = pick(rng, _told(rng, prompt))
    messages = user(f"{prompt.text}. {question}"), assistant(answer)
    return messages, {"type": type_, "answer": answer, "prompt": prompt.to_json()}


def _told(rng: np.random.Generator, prompt: Prompt) -> list[tuple[str, str, str]]:
    """What can be asked about a prompt whose needs all have a shape: (type, question, answer)."""
    needs, found = prompt.needs, []
    shapes, colours = Counter(n.shape for n in needs), Counter(n.colour for n in needs)
    for need in needs:
        noun, verb = (need.shape, "is") if need.count == 1 else (plural(need.shape), "are")
        if need.colour and shapes[need.shape] == 1:
            found.append(("colour", f"what colour {verb} the {noun}?", need.colour))
        if need.colour and colours[need.colour] == 1:
            found.append(("shape", f"what shape {verb} the {need.colour} object{'s' * (need.count > 1)}?", need.shape))
        number = sum(n.count for n in needs if n.shape == need.shape)
        found.append(("count", f"how many {plural(need.shape)} are there?", NUMBERS[number]))
    if all(n.colour for n in needs):
        held = {(n.colour, n.shape) for n in needs}
        one, other = pick(rng, needs), pick(rng, needs)
        kind = one.colour, other.shape  # there as one, or only in parts
        found.append(("exists", f"is there a {kind[0]} {kind[1]}?", "yes" if kind in held else "no"))
    if prompt.relation and shapes[needs[0].shape] == 1:
        (a, b), relation = [n.shape for n in needs], prompt.relation
        found += [("which", f"what is {relation} the {b}?", a), ("which", f"what is {_opposite(relation)} the {a}?", b)]
        asked = pick(rng, (relation, _opposite(relation)))
        found.append(("position", f"is the {a} {asked} the {b}?", "yes" if asked == relation else "no"))
    return found


def _opposite(relation: str) -> str:
    return RELATIONS[RELATIONS.index(relation) ^ 1]


def majority(n: int = 3000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What blind guessing scores, per question type: {type: {"answer", "accuracy", "blind"}}.

    ``accuracy`` is that of the most frequent answer; ``blind`` is that of the most frequent answer to the same question
    text, learnt from ``n`` questions and scored on ``n`` others.
    """
    report = {}
    for kind, ask in QUESTIONS.items():
        rng = np.random.default_rng((seed, list(QUESTIONS).index(kind)))
        known, fresh = ([ask(rng) for _ in range(n)] for _ in range(2))
        best = Counter(q.answer for q in known).most_common(1)[0][0]
        by_text: dict[str, Counter[str]] = {}
        for q in known:
            by_text.setdefault(q.text, Counter())[q.answer] += 1
        blind = [by_text[q.text].most_common(1)[0][0] if q.text in by_text else best for q in fresh]
        report[kind] = {
            "answer": best,
            "accuracy": sum(q.answer == best for q in fresh) / n,
            "blind": sum(q.answer == b for q, b in zip(fresh, blind, strict=True)) / n,
        }
    return report


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """An instruction and the scenes before and after it. ``side`` is where an added object belongs, if it says so."""

    type: str
    text: str
    before: Scene
    after: Scene
    side: str | None = None

    def to_json(self) -> dict:
        scenes = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {"type": self.type, "text": self.text, "side": self.side} | scenes

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Edit:
        before, after = Scene.from_json(row["before"]), Scene.from_json(row["after"])
        return Edit(row["type"], row["text"], before, after, row["side"])


EDITS = ("recolour", "replace", "remove", "add")


def random_edit(rng: np.random.Generator) -> Edit:
    """A recolouring, replacement, removal or addition; untouched objects stay exactly as they are."""
    while True:
        edit = _edit(rng, pick(rng, EDITS))
        if edit and seen(t.kind for t in edit.after.things):
            return edit


def _edit(rng: np.random.Generator, kind: str) -> Edit | None:
    n = int(rng.integers(2 if kind == "remove" else 1, MOST + (kind != "add")))
    kinds = _kinds(rng, n)
    cells = _cells(rng, n + 1)
    before = _place(rng, kinds, cells[:n])
    if kind == "add":
        colour, shape = _kind(rng)
        new = _thing((colour, shape), cells[n], *_spots(rng, 1))
        possible = [side for side in SIDES if _on_side(new, side)]
        side = pick(rng, possible) if possible and rng.random() < 0.7 else None
        where = f" {'at' if side in ('top', 'bottom') else 'on'} the {side}" if side else ""
        return Edit(kind, f"add a {colour} {shape}{where}", before, Scene((*before.things, new)), side)
    colour, shape = kinds[0]
    if kinds.count(kinds[0]) > 1:
        return None
    unique = sum(s == shape for _, s in kinds) == 1
    name = shape if unique and rng.random() < 0.6 else f"{colour} {shape}"
    thing, rest = before.things[0], before.things[1:]
    if kind == "remove":
        return Edit(kind, f"remove the {name}", before, Scene(rest))
    if kind == "recolour":
        new = pick(rng, [c for c in COLOURS if c != colour])
        changed, text = Thing(shape, new, thing.x, thing.y, thing.extent), f"make the {name} {new}"
    else:
        new = pick(rng, [s for s in SHAPES if s != shape])
        changed = Thing(new, colour, thing.x, thing.y, thing.extent)
        text = pick(rng, ("replace the {} with a {}", "turn the {} into a {}")).format(name, new)
    return Edit(kind, text, before, Scene((changed, *rest)))


def make_edit(rng: np.random.Generator, split: str, size: int) -> Made:
    """A picture and an instruction, and the picture after it; info: the ``Edit``."""
    edit = random_edit(rng)
    source = Image(render(edit.before, size), "condition")
    return (user(source, edit.text), assistant(Image(render(edit.after, size), "target"))), edit.to_json()


@dataclass(frozen=True)
class EditVerdict:
    """Whether an instruction was followed (``done``), whether the rest stayed (``kept``), and both (``ok``).

    ``difference`` is the mean absolute pixel difference, of 255, outside the changed objects.
    """

    ok: bool
    done: bool
    kept: bool
    difference: float
    reason: str
    found: tuple[Found, ...]


def check_edit(image: PIL.Image.Image, before: Scene, after: Scene, side: str | None = None) -> EditVerdict:
    """Whether a picture is ``before`` changed into ``after``.

    An untouched object must be found with its colour and shape within a twelfth of the canvas of its place, and so must
    a recoloured or replaced one. A purely added object may lie anywhere, or anywhere on its ``side``; a removed one
    must be gone; nothing else may appear. Raises ``ValueError`` for a picture that is not square.
    """
    if side is not None and side not in SIDES:
        raise ValueError(f"side is {side!r}; choose from {', '.join(SIDES)}")
    found = detect(image)
    left = list(found)
    untouched = [t for t in after.things if t in before.things]
    new = [t for t in after.things if t not in before.things]
    gone = [t for t in before.things if t not in after.things]

    def take(thing: Thing, anywhere: bool = False) -> bool:
        fits = (f for f in left if f.kind == thing.kind and (_on_side(f, side) if anywhere else _near(f, thing)))
        match = next(fits, None)
        if match:
            left.remove(match)
        return match is not None

    lost = [t for t in untouched if not take(t)]
    missing = [t for t in new if not take(t, anywhere=not gone)]
    still = [f for f in left if any(_near(f, t) for t in gone)]
    extra = [f for f in left if f not in still]
    done, kept = not missing and not still, not lost and not extra
    reasons = [f"no {' '.join(t.kind)}" for t in missing] + [f"still a {' '.join(f.kind)}" for f in still]
    reasons += [f"lost the {' '.join(t.kind)}" for t in lost] + [f"an extra {' '.join(f.kind)}" for f in extra]
    difference = _difference(image, gone, new, after)
    return EditVerdict(done and kept, done, kept, difference, "; ".join(reasons), tuple(found))


def _near(found: Found, thing: Thing) -> bool:
    return max(abs(found.x - thing.x), abs(found.y - thing.y)) < 1 / 12


def _on_side(a: Found | Thing, side: str | None) -> bool:
    return {None: True, "left": a.x < 0.4, "right": a.x > 0.6, "top": a.y < 0.4, "bottom": a.y > 0.6}[side]


def _difference(image: PIL.Image.Image, gone: list[Thing], new: list[Thing], after: Scene) -> float:
    pixels = rgb(image).astype(np.float32)
    size = max(image.size)
    if image.size != (size, size):
        raise ValueError(f"the picture is {image.size}; pictures of the shapes world are square")
    changed = coverage(Scene((*gone, *new)), size).max(0, initial=0) > 0
    return float(np.abs(pixels - rgb(render(after, size)).astype(np.float32))[~changed].mean())


# --- the task ladder --------------------------------------------------------------------------------------------------

LARGEST, PAPER = 0.3, 0.2  # for tasks.farness: objects are 0.234 to 0.297 of the canvas wide


def annotated(scene: Scene, size: int) -> tasks.Annotated:
    """The picture of a scene and all that is known of it: classes are shapes, phrases name kinds ("the red circle").

    Depth takes objects to be of one size, so that the wider is the nearer, in front of the paper; the right view moves
    each by ``tasks.BASELINE`` times its nearness. Objects that cover no pixel by half are left out.
    """
    every = masks(scene, size)
    seen = [i for i, mask in enumerate(every) if mask.any()]
    things, every = [scene.things[i] for i in seen], every[seen]
    far = [tasks.farness(t.extent, LARGEST, PAPER) for t in things]
    depth = np.ones((size, size))
    for mask, distance in zip(every, far, strict=True):
        depth[mask] = distance
    moved = [replace(t, x=t.x - tasks.BASELINE * (1 - d)) for t, d in zip(things, far, strict=True)]
    behind_first = sorted(moved, key=lambda t: t.extent)
    return tasks.Annotated(
        render(scene, size),
        every,
        tuple(SHAPES.index(t.shape) for t in things),
        SHAPES,
        phrases=tasks.phrases_of([" ".join(t.kind) for t in things], tasks.boxes_of(every)),
        depth=depth,
        view=render(Scene(tuple(behind_first)), size),
    )


def _annotated(rng: np.random.Generator, size: int, task: str) -> tasks.Annotated:
    return annotated(random_scene(rng), size)


SOURCES: dict[str, Callable[..., Made]] = {
    "shapes/draw": make_draw,
    "shapes/draw-where": make_draw_where,
    "shapes/draw-position": partial(make_draw, tag="position"),
    "shapes/ask": make_ask,
    "shapes/ask-where": partial(make_ask, types=("position", "which", "where")),
    "shapes/read": make_read,
    "shapes/caption": make_caption,
    "shapes/edit": make_edit,
    **tasks.sources("shapes", _annotated),
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source of the shapes world. Raises ``ValueError`` for a name that is not in ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; the shapes world has {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
