"""Questions about space with options to choose from: count, relation (2D), depth order and distance (3D) of shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diptych.data.worlds import shapes

Asked = tuple[shapes.Scene, str, list[str], str]  # a picture, a question, options and the right one


def _scene(rng: np.random.Generator, n: int) -> tuple[shapes.Scene, list[str]]:
    """A scene of things that have one name each."""
    while True:
        scene = shapes.random_scene(rng)
        names = [" ".join(t.kind) for t in scene.things]
        if len(names) >= n and len(set(names)) == len(names):
            return scene, names


def ask_count(rng: np.random.Generator) -> Asked:
    """How many objects there are: one of four numbers."""
    scene = shapes.random_scene(rng)
    right = len(scene.things)
    others = [n for n in range(1, 6) if n != right]
    some = [str(others[int(i)]) for i in rng.permutation(len(others))[:3]]
    return scene, "how many objects are there?", [str(right), *some], str(right)


def ask_relation(rng: np.random.Generator) -> Asked:
    """Where one object is relative to another: the relation or its opposite."""
    while True:
        scene, names = _scene(rng, 2)
        true = shapes.relations(*scene.things[:2])
        if len(true) == 1:
            right = true.pop()
            question = f"where is the {names[0]} relative to the {names[1]}?"
            opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[right]
            return scene, question, [right, opposite], right


def ask_depth(rng: np.random.Generator) -> Asked:
    """Which of two objects is nearer. Things are of one size, so the wider is the nearer (``tasks.farness``)."""
    while True:
        scene, names = _scene(rng, 2)
        a, b = scene.things[:2]
        if abs(a.extent - b.extent) > 0.12 * max(a.extent, b.extent):
            right = names[0] if a.extent > b.extent else names[1]
            return scene, "which looks larger, so is closer to the camera?", names[:2], right


def ask_distance(rng: np.random.Generator) -> Asked:
    """Which of two objects is closer to a third."""
    while True:
        scene, names = _scene(rng, 3)
        a, b, c = scene.things[:3]
        to_a, to_b = (np.hypot(t.x - c.x, t.y - c.y) for t in (a, b))
        if max(to_a, to_b) > 1.3 * min(to_a, to_b):
            right = names[0] if to_a < to_b else names[1]
            return scene, f"which is closer to the {names[2]}?", names[:2], right


SPACE: dict[str, Callable[[np.random.Generator], Asked]] = {
    "count": ask_count,
    "relation": ask_relation,
    "depth": ask_depth,
    "distance": ask_distance,
}


def lettered(rng: np.random.Generator, options: list[str], right: str) -> tuple[dict[str, str], str]:
    """The options by letter in a random order, and the letter of the right one."""
    order = rng.permutation(len(options))
    letters = {"ABCD"[n]: options[int(k)] for n, k in enumerate(order)}
    return letters, next(letter for letter, option in letters.items() if option == right)


def with_options(question: str, letters: dict[str, str]) -> str:
    """The question followed by its options: "which is nearer? (A) a star (B) a cross"."""
    return f"{question} " + " ".join(f"({letter}) {option}" for letter, option in letters.items())
