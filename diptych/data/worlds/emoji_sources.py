"""Samples of emoji: drawing, captions in ten languages, questions, recolouring, parts, and scenes of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import PIL.Image

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Generated, Made, canvas, mask_picture, pick, picture
from diptych.data.tasks import ladder
from diptych.data.worlds.emoji import (
    LANGUAGES,
    PAINTS,
    Emoji,
    colour_mask,
    colours,
    concepts,
    draw,
    kind,
    name,
    recolour,
    render,
)
from diptych.data.worlds.emoji_scenes import annotated_for, make_scene, make_scene_ask


def _placed(rng: np.random.Generator, emoji: Emoji, size: int) -> PIL.Image.Image:
    """The emoji a little smaller and off centre, so that reading it is more than recalling one picture."""
    side = rng.uniform(0.75, 1.0) * size
    left, top = rng.uniform(0, 1, 2) * (size - side)
    pixels, paper = canvas(size)
    draw(paper, emoji.svg, left, top, side)
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


def make_compose(rng: np.random.Generator, split: str, size: int, limit: int | None = None) -> Made:
    """Two pictures without their names, and one picture of both, side by side or one above the other."""
    pair = [pick(rng, concepts(split, limit)) for _ in range(2)]
    references = [Image(render(emoji, size), "condition") for emoji in pair]
    words = pick(rng, ("left", "right", "above", "below"))
    where = f"to the {words} of" if words in ("left", "right") else words
    messages = (
        user(*references, f"the first {where} the second"),
        assistant(Image(composed(pair, words, size), "target")),
    )
    return messages, {"type": "compose", "emoji": [e.id for e in pair], "relation": words}


def composed(pair: Sequence[Emoji], relation: str, size: int) -> PIL.Image.Image:
    """One picture of two emoji, the first to the left (right, above, below) of the second."""
    pixels, paper = canvas(size)
    for emoji, (x, y) in zip(pair, composed_places(relation), strict=True):
        draw(paper, emoji.svg, x * size, y * size, size / 2)
    return picture(pixels)


def composed_places(relation: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(left, top) of the first and of the second picture of a composition, in fractions of the canvas; each is half as
    wide as the canvas."""
    before, after = ((0.0, 0.25), (0.5, 0.25)) if relation in ("left", "right") else ((0.25, 0.0), (0.25, 0.5))
    return (before, after) if relation in ("left", "above") else (after, before)


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
    "emoji/compose": make_compose,
    "emoji64/compose": partial(make_compose, limit=64),
    **ladder.sources("emoji", annotated_for),
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source of emoji. Raises ``ValueError`` for a name that is not in ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; emoji has {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
