"""Rewards: how good a picture or a text is that a model made. They judge what was made and know no model.

A reward is a function of rows of a data set and of what was made of them. It returns one value for each, or None where
it has nothing to judge, as the rewards of drawings do for a question. A row holds its right answer and ``info``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.core.errors import nearest
from diptych.core.sample import Image, Sample, Text
from diptych.data.tasks.ladder import TASKS
from diptych.data.worlds import shapes, shapes_judge, shapes_sources

Made = PIL.Image.Image | str


# rows of a data set and what was made of each -> the value of each, or None where there is nothing to judge
Reward = Callable[[Sequence[Sample], Sequence[Made]], Sequence[float | None]]


def each(judge: Callable[[Sample, Any], float | None], kind: type) -> Reward:
    """A reward from a judge of one thing, where that is a ``kind`` (a picture or a text)."""

    def reward(asks: Sequence[Sample], made: Sequence[Made]) -> list[float | None]:
        return [judge(a, m) if isinstance(m, kind) else None for a, m in zip(asks, made, strict=True)]

    return reward


def drawing(graded: bool, ask: Sample, made: PIL.Image.Image) -> float | None:
    """1 where a picture of the shapes world shows exactly what its prompt asks for, else 0; ``graded``, the share of
    clauses that hold: every object, the number of objects, the relation."""
    if "prompt" not in ask.info:
        return None
    prompt = shapes.Prompt.from_json(ask.info["prompt"])
    if made.width != made.height:
        return 0.0
    verdict = shapes_judge.check(made, prompt)
    return float(verdict.ok) if not graded else shapes_judge.share_met(verdict, prompt)


def edit(ask: Sample, made: PIL.Image.Image) -> float | None:
    """1 where an edit of the shapes world is done and everything else is kept, else 0."""
    if "before" not in ask.info:
        return None
    row = shapes_sources.Edit.from_json(ask.info)
    if made.width != made.height:
        return 0.0
    return float(shapes_judge.check_edit(made, row.before, row.after, row.side).ok)


def answer(ask: Sample, made: str) -> float:
    """1 where a text is the row's answer, without case and a final full stop, else 0."""
    parts = ask.messages[-1].parts if ask.messages[-1].role == "assistant" else ()
    right = ask.info.get("answer", " ".join(p.text for p in parts if isinstance(p, Text)))
    return float(_plain(made) == _plain(str(right)))


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def caption(ask: Sample, made: str) -> float | None:
    """1 where a caption names exactly the objects of the row's scene, in any order, else 0."""
    if "scene" not in ask.info:
        return None
    return float(shapes_judge.caption_ok(made, shapes.Scene.from_json(ask.info["scene"])))


def overlap(ask: Sample, made: PIL.Image.Image) -> float | None:
    """The share of labelled pixels, of a segmentation or of the row's target, on which both have one label."""
    task = TASKS.get(str(ask.info.get("type")))
    targets = [p for p in ask.messages[-1].parts if isinstance(p, Image) and p.role == "target"]
    if task is None or task.palette not in ("tab20", "bits", "binary") or not targets:
        return None
    truth = targets[-1].pixels
    resized = made.convert("RGB").resize(truth.size, PIL.Image.Resampling.NEAREST)
    a, b = (task.decode(picture, int(ask.info.get("count", 0))) for picture in (resized, truth))
    either = (a != 0) | (b != 0)
    return float(((a == b) & either).sum() / max(int(either.sum()), 1))


def imported(name: str) -> Callable:
    """A function "module:name"; modules of the current folder are found, too.

    Raises ``ValueError`` for one that cannot be imported."""
    module, _, function = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        value = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if not callable(value):
        raise ValueError(f"reward {name!r} is no function, but {value!r}")
    return value


REWARDS: Mapping[str, Reward] = {
    "shapes": each(partial(drawing, False), PIL.Image.Image),
    "shapes:graded": each(partial(drawing, True), PIL.Image.Image),
    "edit": each(edit, PIL.Image.Image),
    "overlap": each(overlap, PIL.Image.Image),
    "answer": each(answer, str),
    "caption": each(caption, str),
}


MADE_BY = {  # what follows the colon of these names goes to the function that makes the reward
    "judge": "diptych.evaluation.rewards:judge",
    "grade": "diptych.evaluation.rewards:grade",
    "clip": "diptych.evaluation.rewards:clip",
}


@cache
def find(name: str, folder: Path) -> Reward:
    """The reward of a name: one of ``REWARDS``, one of ``MADE_BY`` with what follows its colon, or a user's function
    "module:name". Replies of judges are kept in ``folder``.

    Raises ``ValueError`` listing the names."""
    if name in REWARDS:
        return REWARDS[name]
    kind, colon, rest = name.partition(":")
    if kind in MADE_BY and rest:
        return imported(MADE_BY[kind])(rest, folder)
    if colon and rest and kind not in {known.partition(":")[0] for known in REWARDS}:
        return imported(name)
    choices = (*REWARDS, *(f"{kind}:..." for kind in MADE_BY), "module:name")
    raise ValueError(f"unknown reward {name!r}; choose from {', '.join(choices)}{nearest(name, choices)}")
