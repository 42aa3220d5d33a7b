"""The shapes world: drawn scenes whose every caption, answer and edit can be checked exactly.

One to four objects (five shapes, six colours) lie in a jittered 3x3 lattice on white paper. From a scene come prompts
in GenEval's six tags (arXiv 2310.11513), questions, captions and edits; ``check``, ``caption_ok`` and ``check_edit``
score the model's pictures and captions. ``check`` uses a rule-based detector; a test measures its accuracy on clean
and degraded scenes.

Held out: about one unordered pair in ten of two different (colour, shape) kinds never occurs together in a scene of any
source, in no split. ``prompts(..., held_out=True)`` asks for exactly these.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import skia

from diptych.data.canvas import canvas, pick, picture
from diptych.data.worlds.grounds import Ground

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
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects that do not touch each other, on a white square."""

    things: tuple[Thing, ...]

    def to_json(self) -> dict:
        """The scene as a JSON object, which ``from_json`` reads."""
        return {"things": [dict(vars(t)) for t in self.things]}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Scene:
        """The scene of a JSON object."""
        return Scene(tuple(Thing(**t) for t in row["things"]))


def render(scene: Scene, size: int) -> PIL.Image.Image:
    """The antialiased RGB picture of a scene on white paper, ``size`` pixels square."""
    pixels, paper = canvas(size)
    paint(paper, scene, (size, size))
    return picture(pixels)


def render_on(rng: np.random.Generator, ground: Ground, scene: Scene, size: tuple[int, int]) -> PIL.Image.Image:
    """The antialiased RGB picture of a scene on a ground, (width, height) pixels large."""
    pixels, paper = ground.canvas(rng, size)
    paint(paper, scene, size)
    return picture(pixels)


def paint(paper: skia.Canvas, scene: Scene, size: tuple[int, int]) -> None:
    """Draws a scene on a canvas of (width, height) pixels: places spread over it, extents are of the shorter side."""
    for thing in scene.things:
        _draw(paper, thing, size, COLOURS[thing.colour])


def coverage(scene: Scene, size: int | tuple[int, int]) -> np.ndarray:
    """How much of each pixel each object covers: (objects, h, w) float32 in [0, 1]; above 0 is all it touches.
    ``size`` is (width, height), or the side of a square."""
    width, height = (size, size) if isinstance(size, int) else size
    cover = np.zeros((len(scene.things), height, width), np.float32)
    for i, thing in enumerate(scene.things):
        cover[i] = _cover(thing, (width, height))
    return cover


def masks(scene: Scene, size: int | tuple[int, int]) -> np.ndarray:
    """Instance masks: (objects, h, w) bool, true where an object covers at least half of the pixel."""
    return coverage(scene, size) >= 0.5


def box(thing: Thing) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of an object, in fractions of the canvas."""
    half_height = thing.extent * _outline(thing.shape)[1] / 2
    return thing.x - thing.extent / 2, thing.y - half_height, thing.x + thing.extent / 2, thing.y + half_height


@cache
def _outline(shape: str) -> tuple[skia.Path, float, float, tuple[float, float]]:
    """A path in a box one wide centred on 0, its height, its area, and its centroid."""
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


def _draw(paper: skia.Canvas, thing: Thing, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    paper.save()
    paper.translate(thing.x * size[0], thing.y * size[1])
    paper.scale(thing.extent * min(size), thing.extent * min(size))
    paper.drawPath(_outline(thing.shape)[0], _paint(colour))
    paper.restore()


@cache
def _paint(colour: tuple[int, int, int]) -> skia.Paint:
    return skia.Paint(AntiAlias=True, Color=skia.Color(*colour))


def _cover(thing: Thing, size: tuple[int, int]) -> np.ndarray:
    pixels, paper = canvas(size[0], (0, 0, 0, 255), height=size[1])
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


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """``count`` objects of this shape and this colour; ``None`` leaves one of them free."""

    shape: str | None
    colour: str | None
    count: int = 1

    def text(self) -> str:
        """The noun phrase in a prompt: "a red circle", "three squares"."""
        noun = self.shape or "object"
        number, noun = ("a", noun) if self.count == 1 else (NUMBERS[self.count], plural(noun))
        return " ".join(w for w in (number, self.colour, noun) if w)


@dataclass(frozen=True)
class Prompt:
    """A drawing prompt and its exact meaning. ``relation`` is that of the first need to the second."""

    tag: str
    text: str
    needs: tuple[Need, ...]
    relation: str | None = None

    def to_json(self) -> dict:
        """The prompt as a JSON object, which ``from_json`` reads."""
        return vars(self) | {"needs": [dict(vars(n)) for n in self.needs]}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Prompt:
        """The prompt of a JSON object."""
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
    drawn: list[Prompt] = []
    while len(drawn) < n:
        drawn += [every[i] for i in rng.permutation(len(every))]
    return drawn[:n]


WORDINGS = ("draw {}", "a picture of {}", "please draw {}", "show me {}", "an image of {}")
EVALUATED = 24  # prompts of each tag that geneval-mini asks, and as many others for geneval-dev


def dev_prompts(tag: str, n: int, seed: int = 0, taken: int = EVALUATED) -> list[Prompt]:
    """``n`` prompts of a tag to choose settings with. No text is among the first ``taken`` of ``prompts`` of this seed.
    Where a tag has too few texts, "counting" names a colour, too, and the others take another wording.

    Raises ``ValueError`` for an unknown tag."""
    every = prompts(tag, taken + n, seed)
    banned = {p.text for p in every[:taken]}
    rng = np.random.default_rng((seed, TAGS.index(tag), 2))
    coloured = [_prompt(tag, [Need(s, c, k)]) for s in SHAPES for c in COLOURS for k in range(2, MOST + 1)]
    worded = [replace(p, text=w.format(p.text)) for w in WORDINGS for p in _all_prompts(tag, False)]
    more = coloured if tag == "counting" else worded
    candidates = every[taken:] + [more[i] for i in rng.permutation(len(more))]
    chosen = {p.text: p for p in candidates if p.text not in banned}
    if len(chosen) < n:
        raise ValueError(f"tag {tag!r} has {len(chosen)} texts beyond the first {taken}, not {n}")
    return list(chosen.values())[:n]


@cache
def evaluated_texts() -> frozenset[str]:
    """The texts that geneval-mini and geneval-dev ask with their default seed: what training from rewards must not."""
    seen_texts = {p.text for tag in TAGS for f in (prompts, dev_prompts) for p in f(tag, EVALUATED)}
    unseen = {p.text for tag in ("position", "color_attr") for p in prompts(tag, EVALUATED, held_out=True)}
    return frozenset(seen_texts | unseen)


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
class DetectedObject:
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
        """(colour, shape)."""
        return self.colour, self.shape


def relations(a: DetectedObject | Thing, b: DetectedObject | Thing) -> set[str]:
    """The relations of a to b, by GenEval's rule (arXiv 2310.11513): box centres, offsets beyond a tenth of both sizes.

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


def _extent(a: DetectedObject | Thing) -> tuple[float, float]:
    if isinstance(a, DetectedObject):
        return a.width, a.height
    left, top, right, bottom = box(a)
    return right - left, bottom - top
