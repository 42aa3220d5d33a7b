"""1,594 flat emoji as pictures, words in ten languages, colour parts and composed scenes.

The pictures are Fluent Emoji Flat, the words Emojibase and Unicode CLDR (see NOTICE beside this file); they are vector
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from importlib.resources import files
from typing import Any

import numpy as np
import PIL.Image
import skia

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Generated, Made, canvas, mask_picture, pick, picture
from diptych.data.tasks import ladder

LANGUAGES = {
    "en": "English", "zh": "Chinese", "es": "Spanish", "fr": "French", "de": "German", "ja": "Japanese", "hi": "Hindi",
    "ru": "Russian", "pt": "Portuguese", "ko": "Korean",
}  # fmt: skip

# What the scenes show (id: noun), and the start of the iconic 64.
NOUNS = {
    "red-apple": "apple", "dog-face": "dog", "cat-face": "cat", "automobile": "car", "house": "house", "sun": "sun",
    "star": "star", "red-heart": "heart", "deciduous-tree": "tree", "tulip": "tulip", "banana": "banana",
    "strawberry": "strawberry", "lemon": "lemon", "carrot": "carrot", "pizza": "pizza", "hamburger": "hamburger",
    "doughnut": "doughnut", "mushroom": "mushroom", "cactus": "cactus", "sunflower": "sunflower", "frog": "frog",
    "pig-face": "pig", "panda": "panda", "lion": "lion", "bear": "bear", "penguin": "penguin", "owl": "owl",
    "octopus": "octopus", "turtle": "turtle", "butterfly": "butterfly", "bus": "bus", "bicycle": "bicycle",
    "rocket": "rocket", "sailboat": "sailboat", "cloud": "cloud", "umbrella": "umbrella", "snowman": "snowman",
    "soccer-ball": "ball", "guitar": "guitar", "balloon": "balloon",
}  # fmt: skip
ICONIC = (
    *NOUNS, "grinning-face", "monkey-face", "rabbit-face", "tiger-face", "cow-face", "elephant", "fish", "honeybee",
    "snail", "watermelon", "grapes", "bread", "egg", "ice-cream", "birthday-cake", "airplane", "crescent-moon",
    "rainbow", "fire", "key", "bell", "crown", "alarm-clock", "wrapped-gift",
)  # fmt: skip


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
    _draw(paper, svg, left, top, side)
    return pixels


def _draw(paper: skia.Canvas, svg: str, left: float, top: float, size: float) -> None:
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
    "red": (235, 40, 45), "orange": (255, 125, 35), "yellow": (250, 205, 50), "green": (0, 170, 85),
    "blue": (20, 120, 220), "purple": (140, 90, 200), "pink": (255, 140, 190), "brown": (130, 80, 55),
    "black": (33, 33, 33), "gray": (150, 150, 150), "white": (250, 250, 250),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """One visible shape of an emoji: its fill, the plain name of that colour, and its (size, size) bool mask."""

    fill: tuple[int, int, int]
    colour: str
    mask: np.ndarray


def part_masks(emoji: Emoji, size: int) -> tuple[Part, ...]:
    """The visible shapes, back to front; a pixel is in a part that covers at least half of it.

    Shapes have colours but no names. Empty for the few emoji that are drawn with gradients or references.
    """
    cover = _coverage(emoji.svg, size)
    shapes = [(fill, c >= 0.5) for fill, c in zip(_fills(emoji.svg), cover, strict=True)]
    return tuple(Part(fill, colour_name(fill), mask) for fill, mask in shapes if mask.any())


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
    for fill, cover in zip(_fills(svg), _coverage(svg, 32), strict=True):
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
    cover = zip(_fills(emoji.svg), _coverage(emoji.svg, 32), strict=True)
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
    found = [fill for _, fill in _leaves(_tree(svg))]
    return () if None in found else tuple(fill for fill in found if fill)


@lru_cache(maxsize=256)
def _coverage(svg: str, size: int, place: Place = (0.0, 0.0, 1.0)) -> np.ndarray:
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
    cover = _coverage(emoji.svg, size)
    chosen = [c for fill, c in zip(_fills(emoji.svg), cover, strict=True) if colour_name(fill) == colour]
    if not chosen:
        raise ValueError(f"emoji {emoji.id!r} has no {colour} part; it has {', '.join(colours(emoji)) or 'no parts'}")
    return np.sum(chosen, 0)


# --- one emoji at a time ----------------------------------------------------------------------------------------------

_KINDS = {
    "animal-": "animal", "plant-": "plant", "food-": "food", "drink": "drink", "transport-ground": "vehicle",
    "transport-air": "vehicle", "transport-water": "vehicle", "place-": "place", "sky-weather": "sky",
    "person": "person", "hand": "body part", "body-parts": "body part",
    "face-": "face", "cat-face": "face", "monkey-face": "face",
    "heart": "heart", "clothing": "clothing", "musical-instrument": "instrument", "tool": "tool", "sport": "sport",
    "flag": "flag",
}  # fmt: skip


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


def _placed(rng: np.random.Generator, emoji: Emoji, size: int) -> PIL.Image.Image:
    """The emoji a little smaller and off centre, so that reading it is more than recalling one picture."""
    side = rng.uniform(0.75, 1.0) * size
    left, top = rng.uniform(0, 1, 2) * (size - side)
    pixels, paper = canvas(size)
    _draw(paper, emoji.svg, left, top, side)
    return picture(pixels)


def make_draw(
    rng: np.random.Generator, split: str, size: int, limit: int | None = None, languages: tuple[str, ...] = ("en",)
) -> Made:
    """A name, and the picture. With several languages the first is used for two captions in three."""
    emoji = pick(rng, concepts(split, limit))
    language = languages[0] if len(languages) == 1 or rng.random() < 2 / 3 else pick(rng, languages[1:])
    text = emoji.labels[language]
    if language == "en" and rng.random() < 0.3:
        text = pick(rng, ("an emoji of {}", "draw {}", "a picture of {}")).format(name(emoji))
    messages = user(text), assistant(Image(render(emoji, size), "target"))
    return messages, {"type": "draw", "emoji": emoji.id, "language": language}


def make_caption(
    rng: np.random.Generator, split: str, size: int, limit: int | None = None, languages: tuple[str, ...] = ("en",)
) -> Made:
    """A picture, and its name, sometimes in another language on request; info: answer."""
    emoji = pick(rng, concepts(split, limit))
    language = languages[0] if len(languages) == 1 or rng.random() < 2 / 3 else pick(rng, languages[1:])
    question = "what is this?" if language == "en" else f"what is this in {LANGUAGES[language]}?"
    answer = emoji.labels[language]
    messages = user(Image(_placed(rng, emoji, size)), question), assistant(answer)
    return messages, {"type": "caption", "answer": answer, "emoji": emoji.id, "language": language}


def make_ask(rng: np.random.Generator, split: str, size: int, limit: int | None = None) -> Made:
    """A picture and a question, and the answer: kind (all alike often), name (yes or no) or keyword (one of two)."""
    choices = concepts(split, limit)
    type_ = pick(rng, ("kind", "name", "keyword"))
    emoji = pick(rng, _similar(split, limit, pick(rng, _kinds(split, limit))) if type_ == "kind" else choices)
    other = pick(rng, [e for e in _similar(split, limit, kind(emoji)) if e != emoji] or choices)
    if type_ == "keyword":
        other = pick(rng, choices)
        fits, fails = (sorted(set(a.tags) - set(b.tags)) for a, b in ((emoji, other), (other, emoji)))
        if fits and fails:
            answer, wrong = pick(rng, fits), pick(rng, fails)
            first, second = (answer, wrong) if rng.random() < 0.5 else (wrong, answer)
            question = f"which word fits, {first} or {second}?"
        else:
            type_ = "kind"
    if type_ == "kind":
        question, answer = "what kind of thing is this?", kind(emoji)
    elif type_ == "name":
        other = other if rng.random() < 0.5 else pick(rng, choices)
        yes = rng.random() < 0.5 or other == emoji
        question, answer = f"is this {name(emoji if yes else other)}?", "yes" if yes else "no"
    messages = user(Image(_placed(rng, emoji, size)), question), assistant(answer)
    return messages, {"type": type_, "answer": answer, "emoji": emoji.id}


@cache
def _kinds(split: str, limit: int | None) -> tuple[str, ...]:
    return tuple(sorted({kind(e) for e in concepts(split, limit)}))


@cache
def _similar(split: str, limit: int | None, word: str) -> tuple[Emoji, ...]:
    return tuple(e for e in concepts(split, limit) if kind(e) == word)


def _with_colours(rng: np.random.Generator, split: str, limit: int | None) -> tuple[Emoji, str]:
    """An emoji of several colours, and one of them that is not the paper's."""
    while True:
        emoji = pick(rng, concepts(split, limit))
        names = [name for name in colours(emoji) if name != "white"]
        if len(colours(emoji)) >= 2 and names and kind(emoji) not in ("person", "face", "body part"):
            return emoji, pick(rng, names)


def make_edit(rng: np.random.Generator, split: str, size: int, limit: int | None = None) -> Made:
    """A picture and "make the red part blue", and the picture after it. It changes only inside ``touched``.

    People and faces are not recoloured.
    """
    emoji, old = _with_colours(rng, split, limit)
    new = pick(rng, [c for c in PAINTS if c not in colours(emoji) and c != "white"])
    after = render(recolour(emoji, old, new), size)
    messages = (
        user(Image(render(emoji, size), "condition"), f"make the {old} part {new}"),
        assistant(Image(after, "target")),
    )
    return messages, {"type": "recolour", "emoji": emoji.id, "colour": old, "to": new}


def make_parts(rng: np.random.Generator, split: str, size: int, limit: int | None = None) -> Made:
    """A picture and "segment the red part", and the mask as a picture, white on black: that of ``colour_mask``."""
    emoji, colour = _with_colours(rng, split, limit)
    mask = mask_picture(colour_mask(emoji, colour, size))
    messages = user(Image(render(emoji, size)), f"segment the {colour} part"), assistant(Image(mask, "target"))
    return messages, {"type": "parts", "emoji": emoji.id, "colour": colour}


# --- scenes of several emoji ------------------------------------------------------------------------------------------

NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Placed:
    """An emoji in a scene: the left, top and side of its square, in fractions of the canvas."""

    emoji: str
    left: float
    top: float
    side: float


def render_scene(things: tuple[Placed, ...], size: int) -> PIL.Image.Image:
    """The RGB picture of emoji on white paper."""
    pixels, paper = canvas(size)
    for thing in things:
        _draw(paper, find(thing.emoji).svg, thing.left * size, thing.top * size, thing.side * size)
    return picture(pixels)


def scene_masks(things: tuple[Placed, ...], size: int) -> np.ndarray:
    """Instance masks: (things, size, size) bool, true where an emoji covers at least half of the pixel."""
    found = np.zeros((len(things), size, size), bool)
    for i, thing in enumerate(things):
        pixels, paper = canvas(size, (0, 0, 0, 0))
        _draw(paper, find(thing.emoji).svg, thing.left * size, thing.top * size, thing.side * size)
        found[i] = pixels[..., 3] >= 128
    return found


def _place(rng: np.random.Generator, ids: list[str], cells: list[int]) -> tuple[Placed, ...]:
    """Emoji in the cells (0 1 over 2 3) of a jittered 2x2 lattice."""
    things = []
    for id, cell in zip(ids, cells, strict=True):
        side = rng.uniform(0.4, 0.48)
        dx, dy = rng.uniform(0, 0.5 - side, 2)
        things.append(Placed(id, round(cell % 2 / 2 + dx, 4), round(cell // 2 / 2 + dy, 4), round(side, 4)))
    return tuple(things)


def _relation(a: int, b: int) -> str | None:
    """The relation of cell a to cell b, ``None`` on the diagonal."""
    if a // 2 == b // 2:
        return RELATIONS[a > b]
    return RELATIONS[2 + (a > b)] if a % 2 == b % 2 else None


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" and noun != "unicorn" else "a ") + noun


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def _phrase(ids: list[str]) -> str:
    """ "a dog, two cars and an owl", in the order of the ids."""
    texts = [_article(NOUNS[id]) if n == 1 else f"{NUMBERS[n]} {_plural(NOUNS[id])}" for id, n in Counter(ids).items()]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def _ids(rng: np.random.Generator, n: int) -> list[str]:
    return [list(NOUNS)[i] for i in rng.permutation(len(NOUNS))[:n]]


def _info(things: tuple[Placed, ...]) -> dict[str, Any]:
    return {"scene": [asdict(t) for t in things]}


def scene_from_json(rows: list[dict[str, Any]]) -> tuple[Placed, ...]:
    """The scene in a sample's info."""
    return tuple(Placed(**row) for row in rows)


def make_scene(rng: np.random.Generator, split: str, size: int) -> Made:
    """A caption (one, several, a number or two in a relation), and the scene; info: scene, a list of ``Placed``."""
    type_ = pick(rng, ("single", "several", "counting", "position"), (1, 3, 2, 3))
    cells = [int(c) for c in rng.permutation(4)]
    if type_ == "position":
        ids = _ids(rng, 2)
        while not (relation := _relation(*cells[:2])):
            cells = [int(c) for c in rng.permutation(4)]
        text = f"{_article(NOUNS[ids[0]])} {relation} {_article(NOUNS[ids[1]])}"
    else:
        if type_ == "counting":
            ids = _ids(rng, 1) * int(rng.integers(2, 5))
        else:
            ids = _ids(rng, 1 if type_ == "single" else int(rng.integers(2, 5)))
            ids = [ids[0] if i == 1 and len(ids) > 2 and rng.random() < 0.4 else id for i, id in enumerate(ids)]
        text = _phrase(ids)
    things = _place(rng, ids, cells[: len(ids)])
    messages = user(text), assistant(Image(render_scene(things, size), "target"))
    return messages, {"type": type_, "text": text} | _info(things)


def make_scene_ask(rng: np.random.Generator, split: str, size: int) -> Made:
    """A scene and a question (count, exists, position, which), and the answer; yes and no are balanced."""
    type_ = pick(rng, tuple(_SCENE_QUESTIONS))
    question, answer, things = _SCENE_QUESTIONS[type_](rng)
    messages = user(Image(render_scene(things, size)), question), assistant(answer)
    return messages, {"type": type_, "answer": answer} | _info(things)


def _ask_count(rng: np.random.Generator) -> tuple[str, str, tuple[Placed, ...]]:
    n = int(rng.integers(0, 5))
    this, *others = _ids(rng, 4)
    ids = [this] * n + others[: int(rng.integers(n == 0, min(5 - n, 4)))]
    things = _place(rng, ids, [int(c) for c in rng.permutation(4)[: len(ids)]])
    return f"how many {_plural(NOUNS[this])} are there?", NUMBERS[n], things


def _ask_exists(rng: np.random.Generator) -> tuple[str, str, tuple[Placed, ...]]:
    yes = rng.random() < 0.5
    n = int(rng.integers(1, 5))
    ids = _ids(rng, n + 1)
    things = _place(rng, ids[:n], [int(c) for c in rng.permutation(4)[:n]])
    return f"is there {_article(NOUNS[ids[0 if yes else n]])}?", "yes" if yes else "no", things


def _ask_position(rng: np.random.Generator) -> tuple[str, str, tuple[Placed, ...]]:
    yes, relation, n = rng.random() < 0.5, pick(rng, RELATIONS), int(rng.integers(2, 5))
    ids = _ids(rng, n)
    while True:
        cells = [int(c) for c in rng.permutation(4)[:n]]
        true = _relation(*cells[:2])
        if true and (true == relation) == yes:
            question = f"is the {NOUNS[ids[0]]} {relation} the {NOUNS[ids[1]]}?"
            return question, "yes" if yes else "no", _place(rng, ids, cells)


def _ask_which(rng: np.random.Generator) -> tuple[str, str, tuple[Placed, ...]]:
    relation, n = pick(rng, RELATIONS), int(rng.integers(2, 4))
    ids = _ids(rng, n)
    while True:
        cells = [int(c) for c in rng.permutation(4)[:n]]
        # the third emoji must not lie diagonally on the same side
        side = (lambda c: c % 2) if relation in RELATIONS[:2] else (lambda c: c // 2)
        if _relation(*cells[:2]) == relation and all(side(c) == side(cells[1]) for c in cells[2:]):
            return f"what is {relation} the {NOUNS[ids[1]]}?", NOUNS[ids[0]], _place(rng, ids, cells)


_SCENE_QUESTIONS: dict[str, Callable[[np.random.Generator], tuple[str, str, tuple[Placed, ...]]]] = {
    "count": _ask_count,
    "exists": _ask_exists,
    "position": _ask_position,
    "which": _ask_which,
}


# --- prompts ----------------------------------------------------------------------------------------------------------

TAGS = ("single_object", "two_object", "counting", "position")


@dataclass(frozen=True)
class Prompt:
    """What to draw, in words and exactly: an emoji id for each thing, and with a ``relation`` how the first stands to
    the second."""

    tag: str
    text: str
    ids: tuple[str, ...]
    relation: str | None = None

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Prompt:
        return Prompt(row["tag"], row["text"], tuple(row["ids"]), row["relation"])


def prompts(tag: str, n: int, seed: int = 0) -> list[Prompt]:
    """``n`` evaluation prompts of one of ``TAGS``, all of different things as far as there are as many. Raises
    ``ValueError`` for an unknown tag."""
    if tag not in TAGS:
        raise ValueError(f"tag is {tag!r}; choose from {', '.join(TAGS)}")
    rng = np.random.default_rng((seed, TAGS.index(tag)))
    found: dict[tuple, Prompt] = {}
    while len(found) < n:
        first, second = _ids(rng, 2)
        relation = pick(rng, RELATIONS) if tag == "position" else None
        many = int(rng.integers(2, 5)) if tag == "counting" else 1
        ids = (first, second) if tag in ("two_object", "position") else (first,) * many
        text = f"{_phrase([first])} {relation} {_phrase([second])}" if relation else _phrase(list(ids))
        key = (ids, relation) if tag != "single_object" or len(found) < len(NOUNS) else (len(found),)
        found.setdefault(key, Prompt(tag, text, ids, relation))
    return list(found.values())


def scene_for(rng: np.random.Generator, prompt: Prompt) -> tuple[Placed, ...]:
    """A scene that satisfies a prompt strictly."""
    while True:
        cells = [int(c) for c in rng.permutation(4)[: len(prompt.ids)]]
        if not prompt.relation or _relation(*cells[:2]) == prompt.relation:
            return _place(rng, list(prompt.ids), cells)


# --- the task ladder --------------------------------------------------------------------------------------------------

LARGEST, PAPER = 0.5, 0.3  # for tasks.farness: emoji are 0.4 to 0.48 of the canvas wide


def annotated(things: tuple[Placed, ...], size: int) -> ladder.Annotated:
    """The picture of a scene and all that is known of it: classes are the nouns of ``NOUNS``.

    Depth takes emoji to be of one size, so that the wider is the nearer, in front of the paper; the right view moves
    each by ``tasks.BASELINE`` times its nearness. Emoji that cover no pixel by half are left out.
    """
    masks = scene_masks(things, size)
    seen = [i for i, mask in enumerate(masks) if mask.any()]
    things, masks = tuple(things[i] for i in seen), masks[seen]
    far = [ladder.farness(t.side, LARGEST, PAPER) for t in things]
    depth = np.ones((size, size))
    for mask, distance in zip(masks, far, strict=True):
        depth[mask] = distance
    moved = [replace(t, left=t.left - ladder.BASELINE * (1 - d)) for t, d in zip(things, far, strict=True)]
    names = [NOUNS[t.emoji] for t in things]
    classes = tuple(NOUNS.values())
    return ladder.Annotated(
        render_scene(things, size),
        masks,
        tuple(classes.index(name) for name in names),
        classes,
        phrases=ladder.phrases_of(names, ladder.boxes_of(masks)),
        depth=depth,
        view=render_scene(tuple(sorted(moved, key=lambda t: t.side)), size),
    )


def annotated_parts(things: tuple[Placed, ...], size: int) -> ladder.Annotated:
    """The picture of a scene with the visible coloured shapes of each emoji as masks, those of four pixels or more
    (where there is none, all)."""
    places = [(find(t.emoji).svg, (t.left, t.top, t.side)) for t in things]
    masks = [cover >= 0.5 for svg, place in places for cover in _coverage(svg, size, place)]
    large = [m for m in masks if m.sum() >= 4] or [m for m in masks if m.any()]
    return ladder.Annotated(render_scene(things, size), np.stack(large) if large else None)


def _annotated(rng: np.random.Generator, size: int, task: str) -> ladder.Annotated:
    """A scene for a task: one to four emoji, now and then one twice; one or two, in their parts, for "segment"."""
    n = int(rng.integers(1, 3 if task == "segment" else 5))
    ids = _ids(rng, n)
    ids = [ids[0] if i == 1 and rng.random() < 0.4 else id for i, id in enumerate(ids)]
    things = _place(rng, ids, [int(c) for c in rng.permutation(4)[:n]])
    return annotated_parts(things, size) if task == "segment" else annotated(things, size)


# --- sources ----------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[np.random.Generator, str, int], Made]] = {
    "emoji/draw": partial(make_draw, languages=tuple(LANGUAGES)),
    "emoji/caption": partial(make_caption, languages=tuple(LANGUAGES)),
    "emoji/ask": make_ask,
    "emoji/edit": make_edit,
    "emoji/parts": make_parts,
    "emoji/scenes": make_scene,
    "emoji/scenes-ask": make_scene_ask,
    "emoji64/draw": partial(make_draw, limit=64),
    "emoji64/caption": partial(make_caption, limit=64),
    "emoji64/ask": partial(make_ask, limit=64),
    "emoji64/edit": partial(make_edit, limit=64),
    "emoji64/parts": partial(make_parts, limit=64),
    **ladder.sources("emoji", _annotated),
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source of emoji. Raises ``ValueError`` for a name that is not in ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; emoji has {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
