"""1,594 flat emoji as pictures, words in ten languages and colour parts (emoji_scenes.py composes scenes of them,
emoji_sources.py makes samples).

The pictures are Fluent Emoji Flat, the words Emojibase and Unicode CLDR (see NOTICE in this folder); they are vector
drawings in the package and are rendered at any size when asked for.

The split is by concept: about one concept in twenty, by a hash of its id, is in "test" and never in "train". The 64 of
``ICONIC`` are always in "train"; a source limited to them shows the same concepts in both splits, drawn differently.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import lzma
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
import PIL.Image
import skia

from diptych.data.canvas import canvas, picture

LANGUAGES = {
    "en": "English",
    "zh": "Chinese",
    "es": "Spanish",
    "fr": "French",
    "de": "German",
    "ja": "Japanese",
    "hi": "Hindi",
    "ru": "Russian",
    "pt": "Portuguese",
    "ko": "Korean",
}

# What the scenes show (id: noun), and the start of the iconic 64.
NOUNS = {
    "red-apple": "apple",
    "dog-face": "dog",
    "cat-face": "cat",
    "automobile": "car",
    "house": "house",
    "sun": "sun",
    "star": "star",
    "red-heart": "heart",
    "deciduous-tree": "tree",
    "tulip": "tulip",
    "banana": "banana",
    "strawberry": "strawberry",
    "lemon": "lemon",
    "carrot": "carrot",
    "pizza": "pizza",
    "hamburger": "hamburger",
    "doughnut": "doughnut",
    "mushroom": "mushroom",
    "cactus": "cactus",
    "sunflower": "sunflower",
    "frog": "frog",
    "pig-face": "pig",
    "panda": "panda",
    "lion": "lion",
    "bear": "bear",
    "penguin": "penguin",
    "owl": "owl",
    "octopus": "octopus",
    "turtle": "turtle",
    "butterfly": "butterfly",
    "bus": "bus",
    "bicycle": "bicycle",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "cloud": "cloud",
    "umbrella": "umbrella",
    "snowman": "snowman",
    "soccer-ball": "ball",
    "guitar": "guitar",
    "balloon": "balloon",
}
ICONIC = (
    *NOUNS,
    "grinning-face",
    "monkey-face",
    "rabbit-face",
    "tiger-face",
    "cow-face",
    "elephant",
    "fish",
    "honeybee",
    "snail",
    "watermelon",
    "grapes",
    "bread",
    "egg",
    "ice-cream",
    "birthday-cake",
    "airplane",
    "crescent-moon",
    "rainbow",
    "fire",
    "key",
    "bell",
    "crown",
    "alarm-clock",
    "wrapped-gift",
)


@dataclass(frozen=True)
class Emoji:
    """One concept: names by language code, English keywords, Unicode group and subgroup, and an SVG document."""

    id: str
    labels: dict[str, str]
    tags: tuple[str, ...]
    group: str
    subgroup: str
    svg: str


@cache
def records() -> tuple[Emoji, ...]:
    """Every emoji, in Unicode order."""
    rows = json.loads(lzma.decompress((files("diptych.data.worlds") / "emoji.json.xz").read_bytes()))
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">'
    return tuple(
        Emoji(r["id"], r["labels"], tuple(r["tags"]), r["group"], r["subgroup"], f"{head}{r['body']}</svg>")
        for r in rows
    )


@cache
def _by_id() -> dict[str, Emoji]:
    return {emoji.id: emoji for emoji in records()}


def find(id: str) -> Emoji:
    """The emoji of that id ("red-apple"). Raises ``ValueError`` for an unknown one."""
    if id not in _by_id():
        near = [other for other in _by_id() if set(id.split("-")) & set(other.split("-"))][:8]
        raise ValueError(f"unknown emoji {id!r}" + (f"; similar: {', '.join(near)}" if near else ""))
    return _by_id()[id]


def split_of(emoji: Emoji) -> str:
    """The split of a concept: "test" for about one in twenty, by a hash of its id; the iconic 64 are "train"."""
    if emoji.id in ICONIC:
        return "train"
    return "train" if int.from_bytes(hashlib.sha256(emoji.id.encode()).digest()[:4], "big") % 20 else "test"


@cache
def concepts(split: str, limit: int | None = None) -> tuple[Emoji, ...]:
    """The concepts of a split, or the first ``limit`` iconic ones (at most 64, the same in both splits)."""
    if limit is None:
        return tuple(e for e in records() if split_of(e) == split)
    if not 2 <= limit <= len(ICONIC):
        raise ValueError(f"limit is {limit}; there are {len(ICONIC)} iconic emoji, and questions need two")
    return tuple(find(id) for id in ICONIC[:limit])


# --- pictures ---------------------------------------------------------------------------------------------------------

Place = tuple[float, float, float]  # left, top and side of an emoji's square, in fractions of the canvas


def render(emoji: Emoji, size: int, background: tuple[int, int, int] = (255, 255, 255)) -> PIL.Image.Image:
    """The RGB picture of an emoji on a plain background, ``size`` pixels square."""
    return picture(_pixels(emoji.svg, size, (*background, 255)))


def cutout(emoji: Emoji, size: int) -> PIL.Image.Image:
    """The RGBA picture of an emoji on nothing (straight alpha), for composing."""
    pixels = _pixels(emoji.svg, size, (0, 0, 0, 0)).astype(np.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    straight = (colour * 255 / np.maximum(alpha, 1)).round().clip(0, 255)
    return PIL.Image.fromarray(np.concatenate([straight, alpha], -1).astype(np.uint8))


def _pixels(svg: str, size: int, background: tuple[int, ...], place: Place = (0.0, 0.0, 1.0)) -> np.ndarray:
    pixels, paper = canvas(size, background)
    left, top, side = (v * size for v in place)
    draw(paper, svg, left, top, side)
    return pixels


def draw(paper: skia.Canvas, svg: str, left: float, top: float, size: float) -> None:
    """Draws an emoji's SVG on a canvas; ``left``, ``top`` and ``size`` (the side) are in pixels."""
    paper.save()
    paper.translate(left, top)
    paper.scale(size / 32, size / 32)
    _document(svg).render(paper)
    paper.restore()


@lru_cache(maxsize=256)
def _document(svg: str) -> skia.SVGDOM:
    return skia.SVGDOM.MakeFromStream(skia.MemoryStream.MakeCopy(svg.encode()))


# --- parts and colours ------------------------------------------------------------------------------------------------

PAINTS = {
    "red": (235, 40, 45),
    "orange": (255, 125, 35),
    "yellow": (250, 205, 50),
    "green": (0, 170, 85),
    "blue": (20, 120, 220),
    "purple": (140, 90, 200),
    "pink": (255, 140, 190),
    "brown": (130, 80, 55),
    "black": (33, 33, 33),
    "gray": (150, 150, 150),
    "white": (250, 250, 250),
}


@dataclass(frozen=True, eq=False)
class ColourPart:
    """One visible shape of an emoji: its fill, the plain name of that colour, and its (size, size) bool mask."""

    fill: tuple[int, int, int]
    colour: str
    mask: np.ndarray


def part_masks(emoji: Emoji, size: int) -> tuple[ColourPart, ...]:
    """The visible shapes, back to front; a pixel is in a part that covers at least half of it.

    Shapes have colours but no names. Empty for the few emoji that are drawn with gradients or references.
    """
    cover = coverage(emoji.svg, size)
    shapes = [(fill, c >= 0.5) for fill, c in zip(_fills(emoji.svg), cover, strict=True)]
    return tuple(ColourPart(fill, colour_name(fill), mask) for fill, mask in shapes if mask.any())


def colour_mask(emoji: Emoji, colour: str, size: int) -> np.ndarray:
    """The (size, size) bool mask of everything of one named colour."""
    return _colour_cover(emoji, colour, size) >= 0.5


def touched(emoji: Emoji, colour: str, size: int) -> np.ndarray:
    """The (size, size) bool mask of every pixel that one named colour reaches at all: where a recolouring may show."""
    return _colour_cover(emoji, colour, size) > 0


def colours(emoji: Emoji) -> dict[str, float]:
    """The share of the picture that each named colour covers, largest first; colours below 4 % are left out."""
    return dict(_colours(emoji.svg))


@lru_cache(maxsize=4096)
def _colours(svg: str) -> tuple[tuple[str, float], ...]:
    shares: dict[str, float] = {}
    for fill, cover in zip(_fills(svg), coverage(svg, 32), strict=True):
        shares[colour_name(fill)] = shares.get(colour_name(fill), 0.0) + float(cover.mean())
    return tuple((name, share) for name, share in sorted(shares.items(), key=lambda s: -s[1]) if share >= 0.04)


def recolour(emoji: Emoji, old: str, new: str) -> Emoji:
    """The emoji with every shade of the colour ``old`` turned into that shade of ``new``; both are names in ``PAINTS``.

    Raises ``ValueError`` for an unknown colour, or one that the emoji lacks.
    """
    for name in (old, new):
        if name not in PAINTS:
            raise ValueError(f"unknown colour {name!r}; choose from {', '.join(PAINTS)}")
    if old not in colours(emoji):
        raise ValueError(f"emoji {emoji.id!r} has no {old} part; it has {', '.join(colours(emoji)) or 'no parts'}")
    cover = zip(_fills(emoji.svg), coverage(emoji.svg, 32), strict=True)
    main = max(((float(c.sum()), fill) for fill, c in cover if colour_name(fill) == old))[1]
    root = _tree(emoji.svg)
    for leaf, fill in _leaves(root):
        if fill and colour_name(fill) == old:
            r, g, b = _shade(PAINTS[new], fill, main)
            leaf.set("stroke" if leaf.get("fill") == "none" else "fill", f"#{r:02x}{g:02x}{b:02x}")
    return replace(emoji, svg=_write(root))


def colour_name(fill: tuple[int, int, int]) -> str:
    """The plain name of a colour, by hue, saturation and value."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in fill))
    hue *= 360
    if value < 0.3:
        return "black"
    if max(fill) - min(fill) < 32:
        return "gray" if value < 0.88 else "white"
    if hue < 14 or hue >= 330:
        if value < 0.6:
            return "brown"
        return "pink" if saturation < 0.62 and value > 0.7 else "red"
    if hue < 45 and value < 0.86:
        return "brown"
    for name, limit in (("orange", 34), ("yellow", 66), ("green", 172), ("blue", 250), ("purple", 300)):
        if hue < limit:
            return name
    return "pink"


def _shade(paint: tuple[int, int, int], fill: tuple[int, int, int], main: tuple[int, int, int]) -> tuple[int, int, int]:
    """``paint`` as much lighter or darker as ``fill`` is than ``main``."""
    ratio = (sum(fill) + 1) / (sum(main) + 1)
    r, g, b = (round(c * ratio) if ratio <= 1 else round(c + (255 - c) * min(ratio - 1, 0.6)) for c in paint)
    return r, g, b


def _tree(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))


def _write(root: ET.Element) -> str:
    return ET.tostring(root, encoding="unicode").replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def _leaves(
    element: ET.Element, inherited: str | None = None
) -> Iterator[tuple[ET.Element, tuple[int, int, int] | None]]:
    """Every drawn shape with its plain colour (``None`` for a gradient), back to front."""
    for child in element:
        fill = child.get("fill", inherited)
        if child.tag == "g":
            yield from _leaves(child, fill)
        else:
            yield child, _colour(child.get("stroke") if fill in (None, "none") and child.get("stroke") else fill)


def _colour(text: str | None) -> tuple[int, int, int] | None:
    if not text or not re.fullmatch("#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})", text):
        return None
    digits = text[1:] if len(text) == 7 else "".join(c * 2 for c in text[1:])
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


@lru_cache(maxsize=4096)
def _fills(svg: str) -> tuple[tuple[int, int, int], ...]:
    """The colour of each shape, back to front; empty where not every shape has a plain one."""
    if re.search("<(defs|use|clipPath|filter)", svg):
        return ()
    fills = [fill for _, fill in _leaves(_tree(svg))]
    return () if None in fills else tuple(fill for fill in fills if fill)


@lru_cache(maxsize=256)
def coverage(svg: str, size: int, place: Place = (0.0, 0.0, 1.0)) -> np.ndarray:
    """How much of each pixel each shape visibly covers: (shapes, size, size) in [0, 1]. Three shapes a rendering."""
    n = len(_fills(svg))
    cover = np.zeros((n, size, size), np.float32)
    for first in range(0, n, 3):
        root = _tree(svg)
        for i, (leaf, _) in enumerate(_leaves(root)):
            paint = ("#f00", "#0f0", "#00f")[i - first] if first <= i < first + 3 else "#000"
            line_only = leaf.get("stroke") and leaf.get("fill") in (None, "none")
            for name in ("fill", "stroke"):
                if (name == "stroke") if line_only else (name == "fill" or leaf.get(name)):
                    leaf.set(name, paint)
        for element in root.iter():
            element.attrib.pop("opacity", None)
        pixels = _pixels(_write(root), size, (0, 0, 0, 255), place)[..., :3]
        count = min(3, n - first)
        cover[first : first + count] = pixels[..., :count].transpose(2, 0, 1) / 255
    return cover


def _colour_cover(emoji: Emoji, colour: str, size: int) -> np.ndarray:
    cover = coverage(emoji.svg, size)
    chosen = [c for fill, c in zip(_fills(emoji.svg), cover, strict=True) if colour_name(fill) == colour]
    if not chosen:
        raise ValueError(f"emoji {emoji.id!r} has no {colour} part; it has {', '.join(colours(emoji)) or 'no parts'}")
    return np.sum(chosen, 0)


# --- words ------------------------------------------------------------------------------------------------------------

_KINDS = {
    "animal-": "animal",
    "plant-": "plant",
    "food-": "food",
    "drink": "drink",
    "transport-ground": "vehicle",
    "transport-air": "vehicle",
    "transport-water": "vehicle",
    "place-": "place",
    "sky-weather": "sky",
    "person": "person",
    "hand": "body part",
    "body-parts": "body part",
    "face-": "face",
    "cat-face": "face",
    "monkey-face": "face",
    "heart": "heart",
    "clothing": "clothing",
    "musical-instrument": "instrument",
    "tool": "tool",
    "sport": "sport",
    "flag": "flag",
}


def kind(emoji: Emoji) -> str:
    """What kind of thing an emoji is, in a word or two: "animal", "food", "vehicle", ..., "symbol", "object"."""
    for prefix, word in _KINDS.items():
        if emoji.subgroup.startswith(prefix):
            return word
    return "symbol" if emoji.group == "symbols" else "object"


def name(emoji: Emoji) -> str:
    """The English name with an article where it needs one: "a red apple", "an owl", "the sun"."""
    label = emoji.labels["en"]
    if label in ("sun", "fire") or label.endswith("s"):
        return {"sun": "the sun"}.get(label, label)
    return ("an " if label[0].lower() in "aeiou" and not label.startswith(("uni", "one")) else "a ") + label
