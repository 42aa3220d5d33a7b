"""Benchmarks of the digits' world (data/worlds/glyphs.py): they score SynerGen-VL's tables in miniature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import PIL.Image

from diptych.core.sample import Sample, user
from diptych.data.worlds import glyphs
from diptych.evaluation.benchmarks.shapes import asked, seed_of, words
from diptych.evaluation.scores import Baselines, Benchmark, Item, Outcome, Score, Verdict, by_category, each, share

DRAWN = 3  # pictures of each of the thirty prompts


def _items(name: str, sources: Sequence[tuple[str, int]], seed: int, size: int) -> list[Item]:
    return [item for source, n in sources for item in asked(name, source, n, seed, size)]


def _read_items(seed: int, size: int) -> list[Item]:
    """Numbers as a whole, digit by digit (one of the two, in turn), and shapes."""
    whole = asked("glyphs-read", "glyphs/number", 200, seed, size)
    digits = [
        replace(i, id=i.id.replace("/number/", "/digit/"), category="digit", reference={**i.reference, "digit": n % 2})
        for n, i in enumerate(whole)
    ]
    return [*whole, *digits, *asked("glyphs-read", "glyphs/shape", 100, seed, size)]


def _judge(item: Item, text: str) -> Verdict:
    read, answer = words(text), item.reference["answer"]
    if (place := item.reference.get("digit")) is not None:
        ok = len(read) == 2 and read[place] == answer[place]
    else:
        ok = read == answer
    return Verdict(ok, "" if ok else f"the answer is {answer}")


def _draw_items(seed: int, size: int) -> list[Item]:
    """Prompts for every digit on every ground, several pictures of each."""
    items = []
    for n in range(DRAWN):
        for digit in range(10):
            for ground in glyphs.GROUNDS:
                prompt, key = f"{digit} on {ground}", f"glyphs-draw/{digit}-{ground}/{n}"
                sample = Sample(key, (user(prompt),))
                items.append(
                    Item(
                        key,
                        "glyphs-draw",
                        "read back",
                        prompt,
                        sample,
                        seed_of(seed, key),
                        prompt,
                        {"answer": prompt},
                    )
                )
    return items


def _judge_picture(item: Item, image: PIL.Image.Image) -> Verdict:
    read, off = glyphs.read_back(image)
    ok = read == item.reference["answer"]
    return Verdict(ok, f"reads {read!r}, {off:.0f} grey levels off")


def _scores(name: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    stamp = f"{name}@exact"
    return {f"{stamp}/overall": share(outcomes)} | {
        f"{stamp}/{k}": share(group) for k, group in by_category(outcomes).items()
    }


def _chance(name: str, items: Sequence[Item], size: int) -> Baselines:
    """``majority``: always the most frequent answer of the category, on these very items."""
    rows: Baselines = {}
    for category, group in by_category(items).items():
        answers = [i.reference["answer"] for i in group]
        if category == "digit":
            answers = [a[i.reference["digit"]] for a, i in zip(answers, group, strict=True)]
        best = max(sorted(set(answers)), key=answers.count)
        rows[f"{name}@exact/{category}"] = {"majority": float(np.mean([a == best for a in answers]))}
    return rows


def _benchmark(name: str, task, items, judge, side: int, pictures: int = 1) -> Benchmark:
    return Benchmark(
        name,
        task,
        items,
        each(judge),
        lambda outcomes: _scores(name, outcomes),
        lambda some, size: _chance(name, some, size),
        pictures,
        side=side,
    )


LANGUAGE = (("words/fact", 200), ("words/sum", 100), ("words/reverse", 100))
SAYING = (("glyphs/say", 120),)
BENCHMARKS: dict[str, Benchmark] = {
    "glyphs-read": _benchmark("glyphs-read", "answer", _read_items, _judge, 64),
    "glyphs-say": _benchmark(
        "glyphs-say", "answer", lambda seed, size: _items("glyphs-say", SAYING, seed, size), _judge, 32
    ),
    "glyphs-draw": _benchmark("glyphs-draw", "draw", _draw_items, _judge_picture, 32, DRAWN),
    "words": _benchmark("words", "answer", lambda seed, size: _items("words", LANGUAGE, seed, size), _judge, 32),
}
