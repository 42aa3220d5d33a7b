"""Samples of shapes and emoji on every ground and canvas size of ``grounds``.

``canvas/*`` are the shapes world, ``things/*`` are emoji by name and keyword, alone and in scenes of one to six.
A prompt to draw names every ground but white; the size is that of the target picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import PIL.Image

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Generated, Made, pick, picture
from diptych.data.worlds import grounds, shapes, shapes_questions
from diptych.data.worlds.emoji import NOUNS, Emoji, concepts, draw, find
from diptych.data.worlds.emoji_scenes import RELATIONS, article, listing, plural
from diptych.data.worlds.grounds import WHITE, Ground, Size, random_ground, random_size
from diptych.data.worlds.shapes_sources import random_draw, random_edit

NUMBERS = shapes.NUMBERS
MOST = 6  # emoji in a scene

# --- shapes -----------------------------------------------------------------------------------------------------------


def inks(scene: shapes.Scene) -> list[tuple[int, int, int]]:
    """The colours of a scene's objects."""
    return [shapes.COLOURS[thing.colour] for thing in scene.things]


def on(text: str, ground: Ground) -> str:
    """A prompt with its ground, which is not named where it is white."""
    return text if ground == WHITE else f"{text} on {ground.text}"


def canvas_info(ground: Ground, size: Size) -> dict:
    """What a scorer knows of a canvas: its ground, its size, and whether training never shows the two together."""
    return {"ground": ground.to_json(), "size": list(size), "held_out": grounds.held_out(ground, size)}


def make_draw(rng: np.random.Generator, split: str, size: int) -> Made:
    """A caption, mostly with its ground, and the picture that satisfies it strictly; info: prompt, scene, ground."""
    text, prompt, scene = random_draw(rng)
    side = random_size(rng)
    ground = random_ground(rng, split, side, inks(scene), white=0.3)
    image = shapes.render_on(rng, ground, scene, side)
    info = {"type": prompt.tag, "prompt": prompt.to_json(), "scene": scene.to_json()} | canvas_info(ground, side)
    return (user(on(text, ground)), assistant(Image(image, "target"))), info


def make_ask(rng: np.random.Generator, split: str, size: int, types: tuple[str, ...] = ()) -> Made:
    """A picture of any ground and size and a question about its shapes, and the answer; info: answer, scene, ground."""
    question = shapes_questions.random_question(rng, types)
    side = random_size(rng, small=True)
    ground = random_ground(rng, split, side, inks(question.scene))
    image = shapes.render_on(rng, ground, question.scene, side)
    info = {"type": question.type, "answer": question.answer, "scene": question.scene.to_json()}
    return (user(Image(image), question.text), assistant(question.answer)), info | canvas_info(ground, side)


def make_ask_where(rng: np.random.Generator, split: str, size: int) -> Made:
    """``make_ask`` of places and relations alone, which are learned last."""
    return make_ask(rng, split, size, ("position", "which", "where"))


def make_caption(rng: np.random.Generator, split: str, size: int) -> Made:
    """A picture of any ground and size, and its canonical description, short (objects) or long (with the ground)."""
    scene, side = shapes.random_scene(rng), random_size(rng, small=True)
    ground, long = random_ground(rng, split, side, inks(scene)), bool(rng.random() < 0.5)
    answer = f"{shapes.describe(scene)} on {ground.text}" if long else shapes.describe(scene)
    question = "describe the picture and its background" if long else "describe the picture"
    info = {"type": "long" if long else "caption", "answer": answer, "scene": scene.to_json()}
    image = shapes.render_on(rng, ground, scene, side)
    return (user(Image(image), question), assistant(answer)), info | canvas_info(ground, side)


def make_edit(rng: np.random.Generator, split: str, size: int) -> Made:
    """A picture of any ground and size and an instruction, and the picture after it; info: the ``Edit``, ground."""
    edit, side = random_edit(rng), random_size(rng)
    ground = random_ground(rng, split, side, inks(edit.before) + inks(edit.after))
    seed = int(rng.integers(1 << 32))  # the same noise before and after
    pictures = [
        shapes.render_on(np.random.default_rng(seed), ground, scene, side) for scene in (edit.before, edit.after)
    ]
    before, after = Image(pictures[0], "condition"), Image(pictures[1], "target")
    return (user(before, edit.text), assistant(after)), edit.to_json() | canvas_info(ground, side)


# --- emoji ------------------------------------------------------------------------------------------------------------

Cell = tuple[int, int]  # (column, row)
Placed = tuple[str, float, float, float]  # id, left and top in fractions of width and height, side of the shorter side


def lattice(n: int, size: Size) -> tuple[int, int]:
    """(columns, rows) of the lattice that ``n`` emoji lie in: 2 x 2, or with three cells along the longer side."""
    return (2, 2) if n <= 4 else (3, 2) if size[0] >= size[1] else (2, 3)


def place(rng: np.random.Generator, ids: list[str], cells: list[Cell], size: Size) -> tuple[Placed, ...]:
    """Emoji in cells of the jittered ``lattice``; they do not overlap."""
    columns, rows = lattice(len(ids), size)
    shorter = min(size)
    things = []
    for id, (column, row) in zip(ids, cells, strict=True):
        width, height = size[0] / columns, size[1] / rows
        side = min(width, height) * rng.uniform(0.8, 0.96)
        left, top = (c * room + rng.uniform(0, room - side) for c, room in ((column, width), (row, height)))
        things.append((id, round(left / size[0], 4), round(top / size[1], 4), round(side / shorter, 4)))
    return tuple(things)


def render(rng: np.random.Generator, ground: Ground, things: tuple[Placed, ...], size: Size) -> PIL.Image.Image:
    """The RGB picture of emoji on a ground, (width, height) pixels large."""
    pixels, paper = ground.canvas(rng, size)
    for id, left, top, side in things:
        draw(paper, find(id).svg, left * size[0], top * size[1], side * min(size))
    return picture(pixels)


def cells(rng: np.random.Generator, n: int, size: Size) -> list[Cell]:
    """``n`` different cells of the ``lattice``."""
    columns, rows = lattice(n, size)
    return [(i % columns, i // columns) for i in rng.permutation(columns * rows)[:n].tolist()]


def relation(a: Cell, b: Cell) -> str | None:
    """The relation of cell a to cell b, ``None`` on a diagonal."""
    if a[1] == b[1]:
        return RELATIONS[a[0] > b[0]]
    return RELATIONS[2 + (a[1] > b[1])] if a[0] == b[0] else None


def nouns(rng: np.random.Generator, n: int) -> list[str]:
    """The ids of ``n`` different emoji of ``NOUNS``."""
    return [list(NOUNS)[i] for i in rng.permutation(len(NOUNS))[:n]]


def _scene(rng: np.random.Generator, size: Size) -> tuple[str, str, list[str], list[Cell]]:
    """A scene's type, words, ids and cells."""
    kind = pick(rng, ("single", "several", "counting", "position"), (1, 4, 2, 3))
    if kind == "position":
        ids, where = nouns(rng, 2), cells(rng, 2, size)
        while not (word := relation(*where)):
            where = cells(rng, 2, size)
        return kind, f"{article(NOUNS[ids[0]])} {word} {article(NOUNS[ids[1]])}", ids, where
    if kind == "counting":
        ids = nouns(rng, 1) * int(rng.integers(2, MOST + 1))
    else:
        ids = nouns(rng, 1 if kind == "single" else int(rng.integers(2, MOST + 1)))
        ids = [ids[0] if i in (1, 2) and len(ids) > 2 and rng.random() < 0.35 else id for i, id in enumerate(ids)]
    return kind, listing(ids), ids, cells(rng, len(ids), size)


def scene_info(things: tuple[Placed, ...], ground: Ground, size: Size) -> dict:
    """The placed emoji and the canvas."""
    return {"things": [list(thing) for thing in things]} | canvas_info(ground, size)


def make_scene(rng: np.random.Generator, split: str, size: int) -> Made:
    """A caption (one to six emoji, a number, or two in a relation), and the scene; info: things, ground, size."""
    side = random_size(rng)
    kind, text, ids, where = _scene(rng, side)
    ground = random_ground(rng, split, side)
    things = place(rng, ids, where, side)
    messages = user(on(text, ground)), assistant(Image(render(rng, ground, things, side), "target"))
    return messages, {"type": kind, "text": text, "ids": ids} | scene_info(things, ground, side)


@cache
def keywords(split: str) -> tuple[tuple[str, Emoji], ...]:
    """Every word that names one concept: CLDR names, nouns of ``NOUNS``, and keywords (a keyword of several concepts
    names the first of them in Unicode order whose own name ends with it, else none)."""
    words: dict[str, Emoji] = {}
    for emoji in concepts(split):
        for tag in emoji.tags:
            if tag.isascii() and emoji.labels["en"].lower().split()[-1:] == [tag]:
                words.setdefault(tag, emoji)
    shared = Counter(tag for emoji in concepts(split) for tag in emoji.tags)
    words |= {t: e for e in concepts(split) for t in e.tags if shared[t] == 1 and t.isascii()}
    words |= {emoji.labels["en"]: emoji for emoji in concepts(split)}
    words |= {noun: find(id) for id, noun in NOUNS.items()} if split == "train" else {}
    return tuple(sorted(words.items()))


def make_named(rng: np.random.Generator, split: str, size: int) -> Made:
    """A name or a keyword ("a dog"), and the emoji alone on its canvas; half of the words are of ``NOUNS``."""
    if split == "train" and rng.random() < 0.5:
        (id,) = nouns(rng, 1)
        word, emoji = NOUNS[id], find(id)
    else:
        word, emoji = pick(rng, keywords(split))
    bare = rng.random() < 0.3 or word[0].isupper() or word.endswith("s")
    text = word if bare else article(word)
    if rng.random() < 0.3:
        text = pick(rng, ("draw {}", "a picture of {}", "please draw {}", "can you draw {}?", "an emoji of {}")).format(
            text
        )
    side = random_size(rng)
    ground = random_ground(rng, split, side, white=0.6)
    share = rng.uniform(0.75, 1.0)
    left, top = (rng.uniform(0, s - share * min(side)) / s for s in side)
    things = ((emoji.id, round(left, 4), round(top, 4), round(share, 4)),)
    messages = user(on(text, ground)), assistant(Image(render(rng, ground, things, side), "target"))
    return messages, {"type": "named", "text": text, "ids": [emoji.id]} | scene_info(things, ground, side)


def _asked(rng: np.random.Generator, size: Size, kind: str) -> tuple[str, str, list[str], list[Cell]]:
    """A question about a scene, its answer, ids and cells; yes and no are balanced."""
    if kind == "count":
        n, (this, *others) = int(rng.integers(0, MOST)), nouns(rng, 4)
        ids = [this] * n + others[: int(rng.integers(n == 0, min(MOST + 1 - n, 4)))]
        return f"how many {plural(NOUNS[this])} are there?", NUMBERS[n], ids, cells(rng, len(ids), size)
    yes = bool(rng.random() < 0.5)
    if kind == "exists":
        n = int(rng.integers(1, MOST + 1))
        ids = nouns(rng, n + 1)
        question = f"is there {article(NOUNS[ids[0 if yes else n]])}?"
        return question, "yes" if yes else "no", ids[:n], cells(rng, n, size)
    if kind == "name":
        ids = nouns(rng, 1)
        return "what is this?", article(NOUNS[ids[0]]), ids, cells(rng, 1, size)
    if kind == "caption":
        ids = nouns(rng, int(rng.integers(1, 5)))
        return "describe the picture", listing(sorted(ids)), ids, cells(rng, len(ids), size)
    word, ids = pick(rng, RELATIONS), nouns(rng, int(rng.integers(2, 4 if kind == "which" else 5)))
    while True:
        where = cells(rng, len(ids), size)
        true = relation(*where[:2])
        if kind == "position" and true and (true == word) == yes:
            question = f"is the {NOUNS[ids[0]]} {word} the {NOUNS[ids[1]]}?"
            return question, "yes" if yes else "no", ids, where
        axis = RELATIONS.index(word) // 2
        alone = all(cell[axis] == where[1][axis] for cell in where[2:])  # nothing else is arguably in the relation
        if kind == "which" and true == word and alone:
            return f"what is {word} the {NOUNS[ids[1]]}?", NOUNS[ids[0]], ids, where


QUESTIONS = ("count", "exists", "name", "caption", "position", "which")


def make_scene_ask(rng: np.random.Generator, split: str, size: int) -> Made:
    """A scene of any ground and size and a question (``QUESTIONS``), and the answer; info: answer, things, ground."""
    side, kind = random_size(rng, small=True), pick(rng, QUESTIONS)
    question, answer, ids, where = _asked(rng, side, kind)
    ground = random_ground(rng, split, side)
    things = place(rng, ids, where, side)
    messages = user(Image(render(rng, ground, things, side)), question), assistant(answer)
    return messages, {"type": kind, "answer": answer} | scene_info(things, ground, side)


SOURCES: dict[str, Callable[..., Made]] = {
    "canvas/draw": make_draw,
    "canvas/ask": make_ask,
    "canvas/ask-where": make_ask_where,
    "canvas/caption": make_caption,
    "canvas/edit": make_edit,
    "things/draw": make_named,
    "things/scenes": make_scene,
    "things/ask": make_scene_ask,
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source of pictures on canvases of many grounds and sizes; ``size`` has no effect. Raises
    ``ValueError`` for a name that is not in ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; there are {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
