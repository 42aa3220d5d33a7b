"""Rewards that ask another model: a judge behind an OpenAI-compatible address, and CLIP.

Their names stand in a recipe (``diptych.recipes.rewards``). Replies of a judge are kept in the run's folder, so a
resumed run replays them. The judge's key is taken from the environment, ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image

from diptych.core.sample import Sample
from diptych.evaluation.addresses import NO_KEY
from diptych.evaluation.benchmarks.clipscore import PREFIX, clip_score
from diptych.evaluation.benchmarks.geneval2 import LIKELIEST, probability
from diptych.evaluation.judges.detector import colourist
from diptych.evaluation.judges.judge import Judge, Unreachable
from diptych.machine.devices import pick_device

Made = PIL.Image.Image | str
Reward = Callable[[Sequence[Sample], Sequence[Made]], list[float | None]]
PAUSES = (5.0, 20.0, 60.0)  # seconds to wait for a judge that cannot be reached, before the run ends
PICTURE = "Does this picture show exactly this: {prompt}? Answer with one word, yes or no."
TEXT = "Question: {prompt}\nAnswer: {made}\nIs the answer right? Answer with one word, yes or no."
GRADE = "How well does this picture show this: {prompt}? Answer with one number from 0 (not at all) to 10 (perfectly)."
GRADE_TEXT = "Question: {prompt}\nAnswer: {made}\nHow good is the answer? Answer with one number from 0 to 10."


def judge(rest: str, folder: Path) -> Reward:
    """ "judge:MODEL@URL": how likely the judge answers yes to whether a picture shows what was asked for, or whether an
    answer is right. The server must give log-probabilities."""
    asked = _judge(rest, folder)

    def value(text: str, images: Sequence[PIL.Image.Image]) -> float:
        return probability(asked.ask(text, images, logprobs=LIKELIEST, max_tokens=4).first, "yes")

    return _reward(asked, value, PICTURE, TEXT)


def grade(rest: str, folder: Path) -> Reward:
    """ "grade:MODEL@URL": the judge's number from 0 to 10, divided by 10; None where its reply holds none."""
    asked = _judge(rest, folder)

    def value(text: str, images: Sequence[PIL.Image.Image]) -> float | None:
        number = re.search(r"\d+(?:\.\d+)?", asked.ask(text, images, max_tokens=16).text)
        return min(float(number.group()), 10.0) / 10 if number else None

    return _reward(asked, value, GRADE, GRADE_TEXT)


def clip(rest: str, folder: Path) -> Reward:
    """ "clip:FOLDER": CLIPScore (arXiv 2104.08718) of a picture and its prompt, 2.5 times the cosine and at least 0."""

    def reward(asks: Sequence[Sample], made: Sequence[Made]) -> list[float | None]:
        pictures = [m for m in made if isinstance(m, PIL.Image.Image)]
        texts = [PREFIX + a.prompt for a, m in zip(asks, made, strict=True) if isinstance(m, PIL.Image.Image)]
        cosines = iter(colourist(rest, pick_device("auto")).fit(pictures, texts) if pictures else [])
        return [clip_score(next(cosines)) if isinstance(m, PIL.Image.Image) else None for m in made]

    return reward


def _judge(rest: str, folder: Path) -> Judge:
    model, at, url = rest.partition("@")
    if not at or not url.startswith(("http://", "https://")):
        raise ValueError(f"a judge is named MODEL@URL, such as qwen2.5-vl@http://localhost:8000/v1, not {rest!r}")
    return Judge(model, url, folder / "judge", os.environ.get("OPENAI_API_KEY", NO_KEY))


def _reward(
    asked: Judge,
    value: Callable[[str, Sequence[PIL.Image.Image]], float | None],
    of_picture: str,
    of_text: str,
) -> Reward:
    def one(pair: tuple[Sample, Made]) -> float | None:
        ask, made = pair
        sources = [p.pixels for p in (ask.request.parts if ask.request else ()) if hasattr(p, "pixels")]
        if isinstance(made, str):
            return value(of_text.format(prompt=ask.prompt, made=made), sources)
        return value(of_picture.format(prompt=ask.prompt), [*sources, made])

    def reward(asks: Sequence[Sample], made: Sequence[Made]) -> list[float | None]:
        """Raises ``ConnectionError`` where the judge cannot be reached, after ``PAUSES``."""
        pairs = list(zip(asks, made, strict=True))
        for pause in PAUSES:
            try:
                return asked.every(one, pairs)
            except Unreachable:
                time.sleep(pause)
        try:
            return asked.every(one, pairs)
        except Unreachable as error:
            raise ConnectionError(f"the judge cannot be reached: {error}") from error

    return reward
