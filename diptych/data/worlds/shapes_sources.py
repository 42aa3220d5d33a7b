"""The data sets of the shapes world: drawing, captions, questions and edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Generated, Made, pick
from diptych.data.tasks import ladder
from diptych.data.worlds.shapes import (
    COLOURS,
    EVALUATED,
    MOST,
    SHAPES,
    SIDES,
    TAGS,
    WORDINGS,
    Need,
    Prompt,
    Scene,
    Thing,
    _cells,
    _join,
    _kind,
    _kinds,
    _place,
    _prompt,
    _spots,
    _thing,
    _where,
    describe,
    dev_prompts,
    evaluated_texts,
    masks,
    random_prompt,
    random_scene,
    render,
    scene_for,
    seen,
)
from diptych.data.worlds.shapes_judge import on_side
from diptych.data.worlds.shapes_questions import make_ask, make_read

# --- sources ----------------------------------------------------------------------------------------------------------

_TAG_WEIGHTS = {
    "single_object": 0.04,
    "two_object": 0.18,
    "counting": 0.16,
    "colors": 0.06,
    "position": 0.16,
    "color_attr": 0.22,
    "description": 0.18,
}


def random_draw(rng: np.random.Generator, tag: str = "") -> tuple[str, Prompt, Scene]:
    """The words of a training prompt (of one tag, or any), the prompt, and a scene that satisfies it strictly."""
    prompt = random_prompt(rng, tag or pick(rng, tuple(_TAG_WEIGHTS), tuple(_TAG_WEIGHTS.values())))
    scene = scene_for(rng, prompt)
    return pick(rng, WORDINGS).format(prompt.text) if rng.random() < 0.15 else prompt.text, prompt, scene


def make_draw(rng: np.random.Generator, split: str, size: int, tag: str = "") -> Made:
    """A caption (of one tag, or any), and the picture that satisfies it strictly; info: prompt, scene."""
    text, prompt, scene = random_draw(rng, tag)
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


_REWARDED = {"counting": 0.35, "color_attr": 0.25, "position": 0.15, "description": 0.25}


def make_reward(rng: np.random.Generator, split: str, size: int) -> Made:
    """A caption to train from rewards with, and a right picture; info: prompt, scene. Counts and relations name
    colours. No caption is one that geneval-mini or geneval-dev asks, and no pair of kinds is held out."""
    banned = evaluated_texts()
    while True:
        prompt = random_prompt(rng, pick(rng, tuple(_REWARDED), tuple(_REWARDED.values())))
        if prompt.tag == "counting":
            need = replace(prompt.needs[0], colour=pick(rng, tuple(COLOURS)))
            prompt = _prompt("counting", [need])
        if prompt.text not in banned and all(need.colour for need in prompt.needs):
            break
    scene = scene_for(rng, prompt)
    info = {"type": prompt.tag, "prompt": prompt.to_json(), "scene": scene.to_json()}
    return (user(prompt.text), assistant(Image(render(scene, size), "target"))), info


def make_dev(rng: np.random.Generator, split: str, size: int) -> Made:
    """A prompt of geneval-dev, every tag equally often, and a right picture; info: prompt, scene. Never trained on."""
    prompt = pick(rng, _dev(pick(rng, TAGS)))
    scene = scene_for(rng, prompt)
    info = {"type": prompt.tag, "prompt": prompt.to_json(), "scene": scene.to_json()}
    return (user(prompt.text), assistant(Image(render(scene, size), "target"))), info


@cache
def _dev(tag: str) -> tuple[Prompt, ...]:
    return tuple(dev_prompts(tag, EVALUATED))


def make_caption(rng: np.random.Generator, split: str, size: int) -> Made:
    """A picture, and its canonical description; info: answer, scene. Score with ``caption_ok``."""
    scene = random_scene(rng)
    answer = describe(scene)
    messages = user(Image(render(scene, size)), "describe the picture"), assistant(answer)
    return messages, {"type": "caption", "answer": answer, "scene": scene.to_json()}


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
        """The edit as a JSON object, which ``from_json`` reads."""
        scenes = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {"type": self.type, "text": self.text, "side": self.side} | scenes

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Edit:
        """The edit of a JSON object."""
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
        possible = [side for side in SIDES if on_side(new, side)]
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


# --- the task ladder --------------------------------------------------------------------------------------------------

LARGEST, PAPER = 0.3, 0.2  # for tasks.farness: objects are 0.234 to 0.297 of the canvas wide


def annotated(scene: Scene, size: int) -> ladder.Annotated:
    """The picture of a scene and all its annotations; classes are shapes, phrases name kinds ("the red circle").

    Depth takes objects to be of one size, so that the wider is the nearer, in front of the paper; the right view moves
    each by ``tasks.BASELINE`` times its nearness. Objects that cover no pixel by half are left out.
    """
    every = masks(scene, size)
    seen = [i for i, mask in enumerate(every) if mask.any()]
    things, every = [scene.things[i] for i in seen], every[seen]
    far = [ladder.farness(t.extent, LARGEST, PAPER) for t in things]
    depth = np.ones((size, size))
    for mask, distance in zip(every, far, strict=True):
        depth[mask] = distance
    moved = [replace(t, x=t.x - ladder.BASELINE * (1 - d)) for t, d in zip(things, far, strict=True)]
    behind_first = sorted(moved, key=lambda t: t.extent)
    return ladder.Annotated(
        render(scene, size),
        every,
        tuple(SHAPES.index(t.shape) for t in things),
        SHAPES,
        phrases=ladder.phrases_of([" ".join(t.kind) for t in things], ladder.boxes_of(every)),
        depth=depth,
        view=render(Scene(tuple(behind_first)), size),
    )


def _annotated(rng: np.random.Generator, size: int, task: str) -> ladder.Annotated:
    return annotated(random_scene(rng), size)


SOURCES: dict[str, Callable[..., Made]] = {
    "shapes/draw": make_draw,
    "shapes/draw-where": make_draw_where,
    "shapes/draw-position": partial(make_draw, tag="position"),
    "shapes/reward": make_reward,
    "shapes/dev": make_dev,
    "shapes/ask": make_ask,
    "shapes/ask-where": partial(make_ask, types=("position", "which", "where")),
    "shapes/read": make_read,
    "shapes/caption": make_caption,
    "shapes/edit": make_edit,
    **ladder.sources("shapes", _annotated),
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source of the shapes world. Raises ``ValueError`` for a name that is not in ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; the shapes world has {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
