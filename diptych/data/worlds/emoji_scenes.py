"""Scenes of several emoji on white paper: composing, questions, drawing prompts, and what is known of each scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Made, canvas, pick, picture
from diptych.data.tasks import ladder
from diptych.data.worlds.emoji import NOUNS, coverage, draw, find

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class PlacedEmoji:
    """An emoji in a scene: the left, top and side of its square, in fractions of the canvas."""

    emoji: str
    left: float
    top: float
    side: float


def render_scene(things: tuple[PlacedEmoji, ...], size: int) -> PIL.Image.Image:
    """The RGB picture of emoji on white paper."""
    pixels, paper = canvas(size)
    for thing in things:
        draw(paper, find(thing.emoji).svg, thing.left * size, thing.top * size, thing.side * size)
    return picture(pixels)


def scene_masks(things: tuple[PlacedEmoji, ...], size: int) -> np.ndarray:
    """Instance masks: (things, size, size) bool, true where an emoji covers at least half of the pixel."""
    masks = np.zeros((len(things), size, size), bool)
    for i, thing in enumerate(things):
        pixels, paper = canvas(size, (0, 0, 0, 0))
        draw(paper, find(thing.emoji).svg, thing.left * size, thing.top * size, thing.side * size)
        masks[i] = pixels[..., 3] >= 128
    return masks


def _place(rng: np.random.Generator, ids: list[str], cells: list[int]) -> tuple[PlacedEmoji, ...]:
    """Emoji in the cells (0 1 over 2 3) of a jittered 2x2 lattice."""
    things = []
    for id, cell in zip(ids, cells, strict=True):
        side = rng.uniform(0.4, 0.48)
        dx, dy = rng.uniform(0, 0.5 - side, 2)
        things.append(PlacedEmoji(id, round(cell % 2 / 2 + dx, 4), round(cell // 2 / 2 + dy, 4), round(side, 4)))
    return tuple(things)


def _relation(a: int, b: int) -> str | None:
    """The relation of cell a to cell b, ``None`` on the diagonal."""
    if a // 2 == b // 2:
        return RELATIONS[a > b]
    return RELATIONS[2 + (a > b)] if a % 2 == b % 2 else None


def article(noun: str) -> str:
    """A noun with its indefinite article: "an owl"."""
    return ("an " if noun[0] in "aeiou" and noun != "unicorn" else "a ") + noun


def plural(noun: str) -> str:
    """The plural of a noun."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def listing(ids: list[str]) -> str:
    """ "a dog, two cars and an owl", in the order of the ids."""
    texts = [article(NOUNS[id]) if n == 1 else f"{NUMBERS[n]} {plural(NOUNS[id])}" for id, n in Counter(ids).items()]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def _ids(rng: np.random.Generator, n: int) -> list[str]:
    return [list(NOUNS)[i] for i in rng.permutation(len(NOUNS))[:n]]


def _info(things: tuple[PlacedEmoji, ...]) -> dict[str, Any]:
    return {"scene": [asdict(t) for t in things]}


def scene_from_json(rows: list[dict[str, Any]]) -> tuple[PlacedEmoji, ...]:
    """The scene in a sample's info."""
    return tuple(PlacedEmoji(**row) for row in rows)


def make_scene(rng: np.random.Generator, split: str, size: int) -> Made:
    """A caption (one, several, a number or two in a relation), and the scene; info: scene, ``PlacedEmoji`` as JSON."""
    type_ = pick(rng, ("single", "several", "counting", "position"), (1, 3, 2, 3))
    cells = [int(c) for c in rng.permutation(4)]
    if type_ == "position":
        ids = _ids(rng, 2)
        while not (relation := _relation(*cells[:2])):
            cells = [int(c) for c in rng.permutation(4)]
        text = f"{article(NOUNS[ids[0]])} {relation} {article(NOUNS[ids[1]])}"
    else:
        if type_ == "counting":
            ids = _ids(rng, 1) * int(rng.integers(2, 5))
        else:
            ids = _ids(rng, 1 if type_ == "single" else int(rng.integers(2, 5)))
            ids = [ids[0] if i == 1 and len(ids) > 2 and rng.random() < 0.4 else id for i, id in enumerate(ids)]
        text = listing(ids)
    things = _place(rng, ids, cells[: len(ids)])
    messages = user(text), assistant(Image(render_scene(things, size), "target"))
    return messages, {"type": type_, "text": text} | _info(things)


def make_scene_ask(rng: np.random.Generator, split: str, size: int) -> Made:
    """A scene and a question (count, exists, position, which), and the answer; yes and no are balanced."""
    type_ = pick(rng, tuple(_SCENE_QUESTIONS))
    question, answer, things = _SCENE_QUESTIONS[type_](rng)
    messages = user(Image(render_scene(things, size)), question), assistant(answer)
    return messages, {"type": type_, "answer": answer} | _info(things)


def _ask_count(rng: np.random.Generator) -> tuple[str, str, tuple[PlacedEmoji, ...]]:
    n = int(rng.integers(0, 5))
    this, *others = _ids(rng, 4)
    ids = [this] * n + others[: int(rng.integers(n == 0, min(5 - n, 4)))]
    things = _place(rng, ids, [int(c) for c in rng.permutation(4)[: len(ids)]])
    return f"how many {plural(NOUNS[this])} are there?", NUMBERS[n], things


def _ask_exists(rng: np.random.Generator) -> tuple[str, str, tuple[PlacedEmoji, ...]]:
    yes = rng.random() < 0.5
    n = int(rng.integers(1, 5))
    ids = _ids(rng, n + 1)
    things = _place(rng, ids[:n], [int(c) for c in rng.permutation(4)[:n]])
    return f"is there {article(NOUNS[ids[0 if yes else n]])}?", "yes" if yes else "no", things


def _ask_position(rng: np.random.Generator) -> tuple[str, str, tuple[PlacedEmoji, ...]]:
    yes, relation, n = rng.random() < 0.5, pick(rng, RELATIONS), int(rng.integers(2, 5))
    ids = _ids(rng, n)
    while True:
        cells = [int(c) for c in rng.permutation(4)[:n]]
        true = _relation(*cells[:2])
        if true and (true == relation) == yes:
            question = f"is the {NOUNS[ids[0]]} {relation} the {NOUNS[ids[1]]}?"
            return question, "yes" if yes else "no", _place(rng, ids, cells)


def _ask_which(rng: np.random.Generator) -> tuple[str, str, tuple[PlacedEmoji, ...]]:
    relation, n = pick(rng, RELATIONS), int(rng.integers(2, 4))
    ids = _ids(rng, n)
    while True:
        cells = [int(c) for c in rng.permutation(4)[:n]]
        # the third emoji must not lie diagonally on the same side
        side = (lambda c: c % 2) if relation in RELATIONS[:2] else (lambda c: c // 2)
        if _relation(*cells[:2]) == relation and all(side(c) == side(cells[1]) for c in cells[2:]):
            return f"what is {relation} the {NOUNS[ids[1]]}?", NOUNS[ids[0]], _place(rng, ids, cells)


_SCENE_QUESTIONS: dict[str, Callable[[np.random.Generator], tuple[str, str, tuple[PlacedEmoji, ...]]]] = {
    "count": _ask_count,
    "exists": _ask_exists,
    "position": _ask_position,
    "which": _ask_which,
}


# --- prompts ----------------------------------------------------------------------------------------------------------

TAGS = ("single_object", "two_object", "counting", "position")


@dataclass(frozen=True)
class EmojiPrompt:
    """A drawing prompt and its exact meaning: an emoji id for each thing, and the ``relation`` of the first to the
    second."""

    tag: str
    text: str
    ids: tuple[str, ...]
    relation: str | None = None

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> EmojiPrompt:
        """The prompt of a JSON object, the fields by name."""
        return EmojiPrompt(row["tag"], row["text"], tuple(row["ids"]), row["relation"])


def prompts(tag: str, n: int, seed: int = 0) -> list[EmojiPrompt]:
    """``n`` evaluation prompts of one of ``TAGS``, all of different things as far as there are as many. Raises
    ``ValueError`` for an unknown tag."""
    if tag not in TAGS:
        raise ValueError(f"tag is {tag!r}; choose from {', '.join(TAGS)}")
    rng = np.random.default_rng((seed, TAGS.index(tag)))
    drawn: dict[tuple, EmojiPrompt] = {}
    while len(drawn) < n:
        first, second = _ids(rng, 2)
        relation = pick(rng, RELATIONS) if tag == "position" else None
        many = int(rng.integers(2, 5)) if tag == "counting" else 1
        ids = (first, second) if tag in ("two_object", "position") else (first,) * many
        text = f"{listing([first])} {relation} {listing([second])}" if relation else listing(list(ids))
        key = (ids, relation) if tag != "single_object" or len(drawn) < len(NOUNS) else (len(drawn),)
        drawn.setdefault(key, EmojiPrompt(tag, text, ids, relation))
    return list(drawn.values())


def scene_for(rng: np.random.Generator, prompt: EmojiPrompt) -> tuple[PlacedEmoji, ...]:
    """A scene that satisfies a prompt strictly."""
    while True:
        cells = [int(c) for c in rng.permutation(4)[: len(prompt.ids)]]
        if not prompt.relation or _relation(*cells[:2]) == prompt.relation:
            return _place(rng, list(prompt.ids), cells)


# --- the task ladder --------------------------------------------------------------------------------------------------

LARGEST, PAPER = 0.5, 0.3  # for tasks.farness: emoji are 0.4 to 0.48 of the canvas wide


def annotated(things: tuple[PlacedEmoji, ...], size: int) -> ladder.Annotated:
    """The picture of a scene and all its annotations; classes are the nouns of ``NOUNS``.

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


def annotated_parts(things: tuple[PlacedEmoji, ...], size: int) -> ladder.Annotated:
    """The picture of a scene with the visible coloured shapes of each emoji as masks, those of four pixels or more
    (where there is none, all)."""
    places = [(find(t.emoji).svg, (t.left, t.top, t.side)) for t in things]
    masks = [cover >= 0.5 for svg, place in places for cover in coverage(svg, size, place)]
    large = [m for m in masks if m.sum() >= 4] or [m for m in masks if m.any()]
    return ladder.Annotated(render_scene(things, size), np.stack(large) if large else None)


def annotated_for(rng: np.random.Generator, size: int, task: str) -> ladder.Annotated:
    """A scene for a task: one to four emoji, now and then one twice; one or two, in their parts, for "segment"."""
    n = int(rng.integers(1, 3 if task == "segment" else 5))
    ids = _ids(rng, n)
    ids = [ids[0] if i == 1 and rng.random() < 0.4 else id for i, id in enumerate(ids)]
    things = _place(rng, ids, [int(c) for c in rng.permutation(4)[:n]])
    return annotated_parts(things, size) if task == "segment" else annotated(things, size)
