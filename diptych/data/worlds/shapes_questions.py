"""Questions about scenes of the shapes world, with their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diptych.core.sample import Image, assistant, user
from diptych.data.canvas import Made, pick
from diptych.data.worlds.shapes import (
    COLOURS,
    MOST,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Kind,
    Prompt,
    Scene,
    _cells,
    _clear,
    _kind,
    _kinds,
    _named,
    _place,
    _scene,
    _spots,
    plural,
    random_prompt,
    relations,
    render,
    seen,
)


@dataclass(frozen=True)
class ShapesQuestion:
    """A question about a scene. ``type`` is one of ``QUESTIONS``; the answer is short and lowercase."""

    type: str
    text: str
    answer: str
    scene: Scene


def random_question(rng: np.random.Generator, types: tuple[str, ...] = ()) -> ShapesQuestion:
    """A question of a random type (of ``types``, or any) about a scene made for it, so that answers are balanced."""
    return _ASKED[pick(rng, types or tuple(QUESTIONS))](rng)


def _unlike(rng: np.random.Generator, n: int, avoid: Callable[[Kind], bool]) -> list[Kind]:
    """``n`` random kinds for which ``avoid`` is false."""
    kinds: list[Kind] = []
    while len(kinds) < n:
        kind = _kind(rng)
        if not avoid(kind):
            kinds.append(kind)
    return kinds


def _ask_colour(rng: np.random.Generator) -> ShapesQuestion:
    while True:
        kinds = _kinds(rng, int(rng.integers(1, MOST + 1)))
        colour, shape = kinds[0]
        if all(s != shape for _, s in kinds[1:]):
            return ShapesQuestion("colour", f"what colour is the {shape}?", colour, _place(rng, kinds))


def _ask_shape(rng: np.random.Generator) -> ShapesQuestion:
    while True:
        kinds = _kinds(rng, int(rng.integers(1, MOST + 1)))
        colour, shape = kinds[0]
        if all(c != colour for c, _ in kinds[1:]):
            return ShapesQuestion("shape", f"what shape is the {colour} object?", shape, _place(rng, kinds))


def _ask_count(rng: np.random.Generator) -> ShapesQuestion:
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
            return ShapesQuestion("count", f"how many {noun} are there?", NUMBERS[count], _place(rng, kinds))


def _ask_exists(rng: np.random.Generator) -> ShapesQuestion:
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
            return ShapesQuestion("exists", text, "yes" if yes else "no", _place(rng, kinds))


def _distinct(rng: np.random.Generator, n: int) -> list[Kind]:
    """``n`` kinds of ``n`` different shapes that may meet."""
    while True:
        kinds = [(pick(rng, tuple(COLOURS)), SHAPES[i]) for i in rng.permutation(len(SHAPES))[:n]]
        if seen(kinds):
            return kinds


def _ask_position(rng: np.random.Generator) -> ShapesQuestion:
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
            return ShapesQuestion("position", text, "yes" if yes else "no", scene)


def _ask_which(rng: np.random.Generator) -> ShapesQuestion:
    """The one object in a relation to another; no second object is arguably in it."""
    relation = pick(rng, RELATIONS)
    n = int(rng.integers(2, MOST + 1))
    kinds = _distinct(rng, n)
    while True:
        cells, spots = _cells(rng, n), _spots(rng, n)
        if _clear(*cells[:2]) != relation:
            continue
        scene = _scene(kinds, cells, spots)
        if not any(relation in relations(other, scene.things[1]) for other in scene.things[2:]):
            return ShapesQuestion("which", f"what is {relation} the {kinds[1][1]}?", kinds[0][1], scene)


def _ask_where(rng: np.random.Generator) -> ShapesQuestion:
    """The row and the column of an object: taught, because relations are hard to learn without it, and never scored."""
    n = int(rng.integers(1, MOST + 1))
    kinds, cells = _distinct(rng, n), _cells(rng, n)
    return ShapesQuestion("where", f"where is the {kinds[0][1]}?", _named(cells[0]), _place(rng, kinds, cells))


QUESTIONS: dict[str, Callable[[np.random.Generator], ShapesQuestion]] = {
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
    """Text only: a description, a question about it, and the answer; info: type, answer, prompt."""
    tag = pick(rng, ("description", "position", "color_attr", "counting"), (3, 3, 2, 1))
    prompt = random_prompt(rng, tag)
    type_, question, answer = pick(rng, _questions_about(rng, prompt))
    messages = user(f"{prompt.text}. {question}"), assistant(answer)
    return messages, {"type": type_, "answer": answer, "prompt": prompt.to_json()}


def _questions_about(rng: np.random.Generator, prompt: Prompt) -> list[tuple[str, str, str]]:
    """What can be asked about a prompt whose needs all have a shape: (type, question, answer)."""
    needs = [(need, need.shape) for need in prompt.needs if need.shape is not None]
    assert len(needs) == len(prompt.needs)
    questions: list[tuple[str, str, str]] = []
    shapes, colours = Counter(shape for _, shape in needs), Counter(need.colour for need, _ in needs)
    for need, shape in needs:
        noun, verb = (shape, "is") if need.count == 1 else (plural(shape), "are")
        if need.colour and shapes[shape] == 1:
            questions.append(("colour", f"what colour {verb} the {noun}?", need.colour))
        if need.colour and colours[need.colour] == 1:
            questions.append(("shape", f"what shape {verb} the {need.colour} object{'s' * (need.count > 1)}?", shape))
        number = sum(other.count for other, same in needs if same == shape)
        questions.append(("count", f"how many {plural(shape)} are there?", NUMBERS[number]))
    if all(need.colour for need, _ in needs):
        pairs = {(need.colour, shape) for need, shape in needs}
        one, other = pick(rng, needs), pick(rng, needs)
        asked = one[0].colour, other[1]  # there as one object, or only in parts
        questions.append(("exists", f"is there a {asked[0]} {asked[1]}?", "yes" if asked in pairs else "no"))
    if prompt.relation and shapes[needs[0][1]] == 1:
        (_, a), (_, b) = needs
        relation, opposite = prompt.relation, _opposite(prompt.relation)
        questions += [("which", f"what is {relation} the {b}?", a), ("which", f"what is {opposite} the {a}?", b)]
        asked_relation = pick(rng, (relation, opposite))
        answer = "yes" if asked_relation == relation else "no"
        questions.append(("position", f"is the {a} {asked_relation} the {b}?", answer))
    return questions


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
