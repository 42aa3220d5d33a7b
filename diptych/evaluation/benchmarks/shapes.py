"""Rule-judged benchmarks of the shapes world: GenEval's tags, questions, captions, edits.

``@strict`` needs exactly the objects asked for, ``@exact`` the answer and no other word. ``geneval-dev`` is for tuning
sampler settings: it shares no text and no seed with ``geneval-mini``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import PIL.Image

from diptych.core.sample import Sample, Text, user
from diptych.data.worlds import embedded, shapes, shapes_judge, shapes_questions, shapes_sources
from diptych.evaluation.scores import (
    Baselines,
    Benchmark,
    Item,
    Outcome,
    Score,
    Verdict,
    by_category,
    clustered,
    each,
    macro,
    share,
    wilson,
)

SIDE = 64  # pixels on a side of every picture, unless asked for otherwise
PROMPTS = shapes.EVALUATED  # of each tag
PICTURES = 4  # of each prompt
QUESTIONS, CAPTIONS, EDITS = 300, 150, 60
GUESSES = 100  # of each tag or type, from which the baselines are measured
HELD_OUT = ("position", "color_attr")


def seed_of(seed: int, address: str) -> int:
    """The seed of one picture: its own, so that pictures do not share their luck."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{address}".encode(), digest_size=4).digest(), "big") >> 1


# --- drawing ----------------------------------------------------------------------------------------------------------


def _geneval_items(name: str, seed: int) -> list[Item]:
    """Prompts of each of GenEval's six tags in the shapes world."""
    groups = [(tag, tag, False) for tag in shapes.TAGS]
    if name == "geneval-mini":
        groups += [(f"held_out/{tag}", tag, True) for tag in HELD_OUT]
    items = []
    for category, tag, held_out in groups:
        dev = name == "geneval-dev"
        prompts = shapes.dev_prompts(tag, PROMPTS, seed) if dev else shapes.prompts(tag, PROMPTS, seed, held_out)
        for picture in range(PICTURES):  # every prompt once before any twice: a limit keeps as many prompts as it can
            for i, prompt in enumerate(prompts):
                key = f"{name}/{category}/{i}/{picture}"
                sample = Sample(key, (user(prompt.text),))
                items.append(
                    Item(key, name, category, prompt.text, sample, seed_of(seed, key), prompt.text, prompt.to_json())
                )
    return items


def unsquare(image: PIL.Image.Image) -> Verdict | None:
    """The verdict on a picture that is not square: the drawn worlds are."""
    square = image.width == image.height
    return None if square else Verdict(False, f"the picture is {image.width}x{image.height}, not square")


def _judge_drawing(item: Item, image: PIL.Image.Image) -> Verdict:
    if wrong := unsquare(image):
        return wrong
    verdict = shapes_judge.check(image, shapes.Prompt.from_json(item.reference))
    return Verdict(verdict.ok, verdict.reason)


def _geneval_scores(name: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    groups = {
        category: ([float(o.verdict.ok) for o in members], [o.item.cluster for o in members])
        for category, members in by_category(outcomes).items()
    }
    stamp = f"{name}@strict"
    scores = {f"{stamp}/overall": macro({k: v for k, v in groups.items() if k in shapes.TAGS})}
    scores |= {f"{stamp}/{category}": clustered(*group) for category, group in groups.items()}
    if unseen := {k: v for k, v in groups.items() if k not in shapes.TAGS}:
        scores[f"{stamp}/held_out"] = macro(unseen)
    return scores


def _geneval_baselines(name: str, items: Sequence[Item], size: int) -> Baselines:
    """``chance``: a right picture of another prompt of the tag; ``truth``: the checker on pictures drawn by rules."""
    stamp = f"{name}@strict"
    rows: Baselines = {f"{stamp}/{tag}": {"chance": rate} for tag, rate in _chance(size).items()}
    for category, group in by_category(items).items():
        rng = np.random.default_rng(0)
        prompts = {item.prompt: shapes.Prompt.from_json(item.reference) for item in group}.values()
        right = [shapes_judge.check(shapes.render(shapes.scene_for(rng, p), size), p).ok for p in prompts]
        rows.setdefault(f"{stamp}/{category}", {})["truth"] = float(np.mean(right))
    mean = {k: float(np.mean([rows[f"{stamp}/{tag}"][k] for tag in shapes.TAGS])) for k in ("chance", "truth")}
    return {f"{stamp}/overall": mean, **rows}


@cache
def _chance(size: int) -> dict[str, float]:
    return shapes_judge.chance(GUESSES, 0, size)


def _geneval(name: str) -> Benchmark:
    return Benchmark(
        name,
        "draw",
        lambda seed, size: _geneval_items(name, seed),
        each(_judge_drawing),
        lambda outcomes: _geneval_scores(name, outcomes),
        lambda items, size: _geneval_baselines(name, items, size),
        PICTURES,
        SIDE,
        macro=True,
    )


# --- questions --------------------------------------------------------------------------------------------------------


def asked(name: str, source: str, n: int, seed: int, size: int) -> list[Item]:
    """The first ``n`` samples of a test split without their answers."""
    samples = embedded.source(source, "test", size, seed)
    items = []
    for i in range(n):
        sample = samples[i]
        category = str(sample.info["type"])
        key = f"{name}/{category}/{i}"
        asked = Sample(key, sample.messages[:-1])
        prompt = " ".join(p.text for p in sample.messages[-2].parts if isinstance(p, Text))
        items.append(Item(key, name, category, prompt, asked, seed_of(seed, key), sample.id, sample.info))
    return items


def words(text: str) -> str:
    """The answer in lower case, without outer spaces and a final full stop."""
    return text.strip().lower().removesuffix(".").rstrip()


def _judge_answer(item: Item, text: str) -> Verdict:
    answer = item.reference["answer"]
    return Verdict(words(text) == answer, "" if words(text) == answer else f"the answer is {answer}")


def _vqa_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    scores = {"vqa-mini@exact/overall": share(outcomes)}
    return scores | {f"vqa-mini@exact/{k}": share(group) for k, group in by_category(outcomes).items()}


def _vqa_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``majority``: always the most frequent answer of the question's type, on these very questions."""
    best = _majority()
    right = {k: [i.reference["answer"] == best[k] for i in group] for k, group in by_category(items).items()}
    overall = {"majority": float(np.mean([r for group in right.values() for r in group]))}
    rows = {f"vqa-mini@exact/{k}": {"majority": float(np.mean(group))} for k, group in right.items()}
    return {"vqa-mini@exact/overall": overall} | rows


@cache
def _majority() -> dict[str, str]:
    return {kind: row["answer"] for kind, row in shapes_questions.majority(GUESSES).items()}


# --- captions ---------------------------------------------------------------------------------------------------------


def _judge_caption(item: Item, text: str) -> Verdict:
    ok = shapes_judge.caption_ok(text, shapes.Scene.from_json(item.reference["scene"]))
    return Verdict(ok, "" if ok else f"it is {item.reference['answer']}")


def _caption_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``chance``: the right caption of the picture before; ``truth``: the judge on the right captions."""
    answers = [str(i.reference["answer"]) for i in items]
    guesses = {"truth": answers} | ({"chance": answers[-1:] + answers[:-1]} if len(items) > 1 else {})
    rates = {
        name: float(np.mean([_judge_caption(i, text).ok for i, text in zip(items, texts, strict=True)]))
        for name, texts in guesses.items()
    }
    return {"caption-mini@strict/overall": rates}


# --- edits ------------------------------------------------------------------------------------------------------------


def _judge_edit(item: Item, image: PIL.Image.Image) -> Verdict:
    if wrong := unsquare(image):
        return wrong
    edit = shapes_sources.Edit.from_json(item.reference)
    verdict = shapes_judge.check_edit(image, edit.before, edit.after, edit.side)
    return Verdict(verdict.ok, verdict.reason, {"instruction": verdict.done, "preserved": verdict.kept})


def _edit_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    stamp, n = "edit-mini@strict", len(outcomes)
    scores = {f"{stamp}/overall": share(outcomes)}
    for part in ("instruction", "preserved"):
        scores[f"{stamp}/{part}"] = wilson(sum(o.verdict.parts.get(part, False) for o in outcomes), n)
    return scores | {f"{stamp}/{k}": share(group) for k, group in by_category(outcomes).items()}


def _edit_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``copy``: the picture as it was; ``truth``: the checker on pictures drawn by rules."""
    edits = [shapes_sources.Edit.from_json(i.reference) for i in items]
    rows: Baselines = {}
    for name, scenes in (("copy", [e.before for e in edits]), ("truth", [e.after for e in edits])):
        verdicts = [_judge_edit(i, shapes.render(s, size)) for i, s in zip(items, scenes, strict=True)]
        outcomes = [Outcome(i, v) for i, v in zip(items, verdicts, strict=True)]
        for key, score in _edit_scores(outcomes).items():
            rows.setdefault(key, {})[name] = score.value
    return rows


# --- the table --------------------------------------------------------------------------------------------------------


BENCHMARKS: dict[str, Benchmark] = {
    "geneval-mini": _geneval("geneval-mini"),
    "vqa-mini": Benchmark(
        "vqa-mini",
        "answer",
        lambda seed, size: asked("vqa-mini", "shapes/ask", QUESTIONS, seed, size),
        each(_judge_answer),
        _vqa_scores,
        _vqa_baselines,
        side=SIDE,
    ),
    "caption-mini": Benchmark(
        "caption-mini",
        "answer",
        lambda seed, size: asked("caption-mini", "shapes/caption", CAPTIONS, seed, size),
        each(_judge_caption),
        lambda outcomes: {"caption-mini@strict/overall": share(outcomes)},
        _caption_baselines,
        side=SIDE,
    ),
    "edit-mini": Benchmark(
        "edit-mini",
        "draw",
        lambda seed, size: asked("edit-mini", "shapes/edit", EDITS, seed, size),
        each(_judge_edit),
        _edit_scores,
        _edit_baselines,
        side=SIDE,
    ),
    "geneval-dev": _geneval("geneval-dev"),
}
