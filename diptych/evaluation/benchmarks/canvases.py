"""Benchmarks of the whole embedded world: grounds, picture sizes, scenes of up to six emoji, and conversations.

canvas-draw    shapes on a named ground, drawn on 64 x 64 pixels; by kind of ground, and canvases that no training shows
canvas-read    the same questions about shapes on pictures of 32 to 512 pixels, and on grounds of every kind
canvas-edit    edits of pictures of 64 to 128 pixels on grounds of every kind
emoji-scenes   questions about scenes of one to six emoji
talk-mini      the last question of a conversation, in which everything before is right; and the same question about the
               last picture alone ("single"), so that the difference is the cost of the turns before
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from diptych.core.sample import Image, Sample, Text, user
from diptych.data.canvas import pick
from diptych.data.worlds import canvas_sources, embedded, grounds, shapes, shapes_judge, shapes_questions
from diptych.data.worlds.grounds import Ground
from diptych.data.worlds.shapes_sources import Edit
from diptych.data.worlds.talk_sources import FORMS, make_turns
from diptych.evaluation.benchmarks.edits import as_large, source_of
from diptych.evaluation.benchmarks.shapes import seed_of, words
from diptych.evaluation.scores import (
    Baselines,
    Benchmark,
    Item,
    Outcome,
    Score,
    Verdict,
    by_category,
    each,
    macro,
    share,
)

KINDS = ("plain", "gradient", "checkers", "noise")
READ = (32, 64, 128, 256, 512)  # sides of the pictures to read, in pixels
EDITED = ((64, 64), (96, 96), (128, 128), (128, 64), (64, 128))
QUESTIONS, DRAWINGS, EDITS, SCENES, TURNS = 60, 24, 20, 2400, 300


def _kind_of(rng: np.random.Generator, kind: str, colours: Sequence[tuple[int, int, int]]) -> Ground:
    """A ground of a kind on which things of these colours can be seen; never white, not even with noise."""
    every = [g for g in grounds.every(kind) if g.colours != ("white",) and not any(map(g.hides, colours))]
    return pick(rng, every)


def _ground(item: Item) -> Ground:
    return Ground.from_json(item.reference["ground"])


def _canvas_item(name: str, category: str, i: int, seed: int, messages: tuple, reference: Mapping[str, Any]) -> Item:
    key = f"{name}/{category}/{i}"
    prompt = " ".join(p.text for p in messages[-1].parts if isinstance(p, Text))
    return Item(key, name, category, prompt, Sample(key, messages), seed_of(seed, key), str(i), reference)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _draw_items(seed: int, size: int) -> list[Item]:
    """Prompts of GenEval's tags, the same for white paper and for each kind of ground."""
    items = []
    for i in range(DRAWINGS):
        for category in ("white", *KINDS):
            rng = np.random.default_rng((seed, 21, i))
            prompt = pick(rng, shapes.prompts(pick(rng, shapes.TAGS), 48, seed))
            scene = shapes.scene_for(rng, prompt)
            asked = [shapes.COLOURS[n.colour] for n in prompt.needs if n.colour] or canvas_sources.inks(scene)
            ground = grounds.WHITE if category == "white" else _kind_of(rng, category, asked)
            reference = {"prompt": prompt.to_json(), "ground": ground.to_json(), "scene": scene.to_json()}
            messages = (user(canvas_sources.on(prompt.text, ground)),)
            items.append(_canvas_item("canvas-draw", category, i, seed, messages, reference))
    return items


def _judge_drawing(item: Item, image: PIL.Image.Image) -> Verdict:
    ground, prompt = _ground(item), shapes.Prompt.from_json(item.reference["prompt"])
    verdict = shapes_judge.check(image, prompt, ground)
    return Verdict(verdict.ok, verdict.reason)


def _drawing_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``truth``: the judge on pictures drawn by rules; ``white``: on the same scenes on white paper."""
    rows: Baselines = {}
    for name in ("truth", "white"):
        outcomes = []
        for i in items:
            scene, rng = shapes.Scene.from_json(i.reference["scene"]), np.random.default_rng(i.seed)
            ground = _ground(i) if name == "truth" else grounds.WHITE
            image = shapes.render_on(rng, ground, scene, (size or 64, size or 64))
            outcomes.append(Outcome(i, _judge_drawing(i, image)))
        for key, score in _scores("canvas-draw@strict", outcomes).items():
            rows.setdefault(key, {})[name] = score.value
    return rows


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_items(seed: int, size: int) -> list[Item]:
    """The same questions at every size on white paper, and on every kind of ground at 64 pixels."""
    items = []
    for i in range(QUESTIONS):
        question = shapes_questions.random_question(np.random.default_rng((seed, 22, i)))
        colours = canvas_sources.inks(question.scene)
        canvases = [(f"{side} px", side, grounds.WHITE) for side in READ]
        for kind in KINDS:
            canvases.append((kind, 64, _kind_of(np.random.default_rng((seed, 23, i)), kind, colours)))
        for category, side, ground in canvases:
            image = shapes.render_on(np.random.default_rng((seed, 24, i)), ground, question.scene, (side, side))
            reference = {"answer": question.answer, "type": question.type, "ground": ground.to_json()}
            messages = (user(Image(image), question.text),)
            items.append(_canvas_item("canvas-read", category, i, seed, messages, reference))
    return items


def _judge_answer(item: Item, text: str) -> Verdict:
    ok = words(text) == item.reference["answer"]
    return Verdict(ok, "" if ok else f"the answer is {item.reference['answer']}")


def _majority(name: str, items: Sequence[Item]) -> Baselines:
    """``majority``: always the most frequent answer to this type of question, on these very items."""
    answers: dict[str, Counter[str]] = {}
    for i in items:
        answers.setdefault(i.reference["type"], Counter())[i.reference["answer"]] += 1
    best = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
    outcomes = [Outcome(i, _judge_answer(i, best[i.reference["type"]])) for i in items]
    return {key: {"majority": score.value} for key, score in _scores(name, outcomes).items()}


# --- edits ------------------------------------------------------------------------------------------------------------


def _edit_items(seed: int, size: int) -> list[Item]:
    """Edits of the test split by the size of the picture, each on white paper and on one other ground."""
    items = []
    for width, height in EDITED:
        for i in range(EDITS):
            rng = np.random.default_rng((seed, 25, i))
            edit = canvas_sources.random_edit(rng)
            colours = canvas_sources.inks(edit.before) + canvas_sources.inks(edit.after)
            ground = grounds.WHITE if i % 2 else _kind_of(rng, pick(rng, KINDS), colours)
            image = shapes.render_on(np.random.default_rng((seed, 26, i)), ground, edit.before, (width, height))
            messages = (user(Image(image, "condition"), edit.text),)
            reference = edit.to_json() | {"ground": ground.to_json(), "size": [width, height]}
            items.append(_canvas_item("canvas-edit", f"{width}x{height}", i, seed, messages, reference))
    return items


def _judge_edit(item: Item, image: PIL.Image.Image) -> Verdict:
    edit = Edit.from_json(item.reference)
    whole = as_large(image, source_of(item))
    verdict = shapes_judge.check_edit(whole, edit.before, edit.after, edit.side, _ground(item))
    return Verdict(verdict.ok, verdict.reason, {"instruction": verdict.done, "preserved": verdict.kept})


def _edit_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``copy``: the picture as it was; ``truth``: the judge on pictures drawn by rules."""
    rows: Baselines = {}
    for name in ("copy", "truth"):
        outcomes = []
        for i in items:
            image = source_of(i)
            if name == "truth":
                after = Edit.from_json(i.reference).after
                image = shapes.render_on(np.random.default_rng(i.seed), _ground(i), after, image.size)
            outcomes.append(Outcome(i, _judge_edit(i, image)))
        for key, score in _scores("canvas-edit@strict", outcomes).items():
            rows.setdefault(key, {})[name] = score.value
    return rows


# --- scenes of emoji --------------------------------------------------------------------------------------------------


def _scene_items(seed: int, size: int) -> list[Item]:
    """Questions about emoji, one kind after the other, so that a limit keeps all kinds."""
    source, items = embedded.source("things/ask", "test", seed=seed), []
    for i in range(SCENES):
        sample = source[i]
        items.append(_canvas_item("emoji-scenes", sample.info["type"], i, seed, sample.messages[:-1], sample.info))
    return items


# --- several turns ----------------------------------------------------------------------------------------------------


def _talk_items(seed: int, size: int) -> list[Item]:
    """Conversations that end with a question; each question twice, after its turns and alone."""
    items, forms = [], tuple(form for form in FORMS if form.endswith("ask"))
    for i in range(TURNS):
        form = forms[i % len(forms)]
        messages, info = make_turns(np.random.default_rng((seed, 27, i)), "test", 64, (form,))
        pictures = [part for m in messages for part in m.parts if isinstance(part, Image)]
        alone = (user(Image(pictures[-1].image), messages[-2].parts[-1]),)
        reference = {**info, "form": form, "type": info["turns"][-1]}
        items.append(_canvas_item("talk-mini", form, i, seed, messages[:-1], reference))
        items.append(_canvas_item("talk-mini", "single", i, seed, alone, reference))
    return items


def _talk_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """``overall`` is of the conversations alone; ``single`` of the same questions without them."""
    turns = [o for o in outcomes if o.item.category != "single"]
    rows = {"talk-mini@exact/overall": share(turns)} if turns else {}
    return rows | {f"talk-mini@exact/{k}": share(group) for k, group in by_category(outcomes).items()}


def _talk_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``majority``, as in canvas-read."""
    rows = _majority("talk-mini@exact", items)
    return {k: v for k, v in rows.items() if not k.endswith("overall")}


# --- the table --------------------------------------------------------------------------------------------------------


def _scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The share right of every category, and their mean."""
    groups = by_category(outcomes)
    of_all = {k: ([float(o.verdict.ok) for o in group], [o.item.cluster for o in group]) for k, group in groups.items()}
    return {f"{stamp}/overall": macro(of_all)} | {f"{stamp}/{k}": share(group) for k, group in groups.items()}


def _questions(name: str, items: Callable[[int, int], list[Item]]) -> Benchmark:
    """A benchmark of questions with exact answers; its baseline is the most frequent answer of a category."""
    stamp = f"{name}@exact"
    return Benchmark(
        name,
        "answer",
        items,
        each(_judge_answer),
        lambda outcomes: _scores(stamp, outcomes),
        lambda items, size: _majority(stamp, items),
        macro=True,
    )


BENCHMARKS: dict[str, Benchmark] = {
    "canvas-draw": Benchmark(
        "canvas-draw",
        "draw",
        _draw_items,
        each(_judge_drawing),
        lambda outcomes: _scores("canvas-draw@strict", outcomes),
        _drawing_baselines,
        side=64,
        macro=True,
    ),
    "canvas-read": _questions("canvas-read", _read_items),
    "canvas-edit": Benchmark(
        "canvas-edit",
        "draw",
        _edit_items,
        each(_judge_edit),
        lambda outcomes: _scores("canvas-edit@strict", outcomes),
        _edit_baselines,
        macro=True,
    ),
    "emoji-scenes": _questions("emoji-scenes", _scene_items),
    "talk-mini": Benchmark(
        "talk-mini",
        "answer",
        _talk_items,
        each(_judge_answer),
        _talk_scores,
        _talk_baselines,
    ),
}
