"""What is scored, and how sure a score is.

An ``Item`` is one picture to draw or one question to answer; its ``Outcome`` is what a model made of it and the
``Verdict``; many outcomes give a ``Score`` with a 95 % interval. Pictures of one prompt resemble each other, so the
interval of a drawing score comes from redrawing whole prompts (``clustered``, ``macro``); questions are independent
(``wilson``). A bootstrap of items that all agree has no width, and one of few prompts too little: no interval here is
narrower than Wilson's would be for as many independent items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any, Literal

import numpy as np
import PIL.Image

from diptych.core import intervals
from diptych.core.sample import Sample

DRAWS = 2000  # bootstrap resamples


# --- items and what became of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One thing asked of a model. ``cluster`` names what it shares with correlated items: its prompt.

    ``reference`` is what the judge needs, as JSON; the model sees only ``sample``.
    """

    id: str
    benchmark: str
    category: str
    prompt: str
    sample: Sample
    seed: int
    cluster: str
    reference: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether an item is right, why not, and its parts where it has any (an edit is done, and the rest kept)."""

    ok: bool
    reason: str = ""
    parts: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """An item, what the model answered (``text``) or drew (``image``), and the verdict.

    ``error`` is why the model gave nothing; such an item counts as wrong.
    """

    item: Item
    verdict: Verdict
    text: str | None = None
    image: PIL.Image.Image | None = None
    error: str | None = None


@dataclass(frozen=True)
class Score:
    """A share of ``n`` items that are right, and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict:
        """``{"value", "low", "high", "n"}``, rounded to six digits."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


Baselines = dict[str, dict[str, float]]  # score name -> what chance, guessing or the truth would score


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its items, how one is judged, how many become scores, and what the scores are to be compared with.

    ``items(seed, size)`` are in a fixed order for pictures of ``size`` pixels; ``scores`` and ``baselines`` name scores
    ``name@protocol/category``.
    """

    name: str
    task: Literal["draw", "answer"]
    items: Callable[[int, int], list[Item]]
    judge_text: Callable[[Item, str], Verdict] | None
    judge_image: Callable[[Item, PIL.Image.Image], Verdict] | None
    scores: Callable[[Sequence[Outcome]], dict[str, Score]]
    baselines: Callable[[Sequence[Item], int], Baselines]
    pictures_per_prompt: int = 1


# --- intervals --------------------------------------------------------------------------------------------------------


def wilson(right: float, n: int) -> Score:
    """The share right of ``n`` independent items, with Wilson's interval. Raises ``ValueError`` for no items."""
    return Score(*intervals.wilson(right, n), n)


def clustered(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Score:
    """The mean of values in [0, 1] that are correlated within a cluster: percentile bootstrap over clusters."""
    return macro({"": (values, clusters)}, seed)


def macro(groups: Mapping[str, tuple[Sequence[float], Sequence[str]]], seed: int = 0) -> Score:
    """The unweighted mean of the groups' means; ``groups`` maps a name to (values in [0, 1], their clusters).

    The bootstrap redraws clusters within each group. A cluster's name is its own within its group only.
    """
    if not groups:
        raise ValueError("no groups to average")
    rng = np.random.default_rng(seed)
    resampled = np.mean([_resample(v, c, rng) for v, c in groups.values()], axis=0)
    each = [wilson(sum(map(float, v)), len(v)) for v, _ in groups.values()]
    value = float(np.mean([s.value for s in each]))
    # the intervals of independent means combine by their arms' squares (MOVER, Zou and Donner 2008)
    down = sqrt(sum((s.value - s.low) ** 2 for s in each)) / len(each)
    up = sqrt(sum((s.high - s.value) ** 2 for s in each)) / len(each)
    low, high = np.quantile(resampled, (0.025, 0.975))
    low, high = min(float(low), value - down), max(float(high), value + up)
    return Score(value, max(0.0, low), min(1.0, high), sum(s.n for s in each))


def paired(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """How much ``b`` is above ``a`` on the same items, in the same order: the difference and its bootstrap interval.

    ``clusters`` names each item's prompt (default: all different); ``groups`` its tag, when the score is an unweighted
    mean over tags. The interval holds 0 unless the difference is more than the luck of the items.
    """
    clusters = [str(i) for i in range(len(a))] if clusters is None else clusters
    groups = [""] * len(a) if groups is None else groups
    if not len(a) == len(b) == len(clusters) == len(groups):
        raise ValueError(f"paired scores need the same items: {len(a)}, {len(b)}, {len(clusters)} and {len(groups)}")
    if not len(a):
        raise ValueError("paired scores need at least one item")
    difference = np.asarray(b, float) - np.asarray(a, float)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero([g == name for g in groups]) for name in dict.fromkeys(groups)]
    value = float(np.mean([difference[m].mean() for m in members]))
    resampled = np.mean([_resample(difference[m], [clusters[int(i)] for i in m], rng) for m in members], axis=0)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Score(value, float(low), float(high), len(a))


def _resample(values: Sequence[float] | np.ndarray, clusters: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """(DRAWS,) means of the values with their clusters drawn again with replacement."""
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values of {len(clusters)} clusters: every value needs its cluster")
    index = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    which = np.array([index[c] for c in clusters])
    sums = np.bincount(which, np.asarray(values, float), len(index))
    sizes = np.bincount(which, minlength=len(index))
    times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), DRAWS)
    return (times @ sums) / (times @ sizes)
