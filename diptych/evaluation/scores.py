"""Items, verdicts and scores with 95 % intervals.

An ``Item`` is one picture to draw or one question to answer. Its ``Outcome`` is the model's answer or picture with the
``Verdict``. Many outcomes give a ``Score``. Pictures of one prompt are correlated, so the interval of a drawing score
is a bootstrap over prompts (``clustered``, ``macro``); questions are independent (``wilson``). A bootstrap of items
that all agree has no width, and one of few prompts too little: no interval is narrower than Wilson's for as many
independent items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from diptych.core import intervals
from diptych.core.sample import Sample

DRAWS = 2000  # bootstrap resamples
FEW = 30  # clusters below which a bootstrap knows too little


# --- items and outcomes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One question or prompt of a benchmark. ``cluster`` names what correlated items share: the prompt.

    ``reference`` is what the judge needs, as JSON; the model sees only ``sample``, whose pictures may be paths or
    "data:" addresses. ``place`` is the path of its picture in the benchmark's official folder (default: ID.png).
    """

    id: str
    benchmark: str
    category: str
    prompt: str
    sample: Sample
    seed: int
    cluster: str
    reference: Mapping[str, Any]
    place: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether an item is right, why not, and its parts where it has any (an edit is done, and the rest kept).

    ``value`` grades what is not only right or wrong, on the benchmark's own scale. ``failed``: there was nothing to
    judge, or the judge's reply could not be read; it counts as the worst.
    """

    ok: bool
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    failed: bool = False

    @property
    def grade(self) -> float:
        """``value`` where it is given, otherwise 1 for right and 0 for wrong."""
        return float(self.ok) if self.value is None else self.value


UNJUDGED = Verdict(False, "not scored")


@dataclass(frozen=True)
class Outcome:
    """An item, what the model answered (``text``) or drew (``picture``, or the file it is in), and the verdict.

    ``error`` is why the model gave nothing; such an item counts as wrong.
    """

    item: Item
    verdict: Verdict
    text: str | None = None
    picture: PIL.Image.Image | Path | None = None
    error: str | None = None

    @property
    def image(self) -> PIL.Image.Image | None:
        """The RGB picture, read anew where it is in a file: thousands of them do not fit in memory."""
        if not isinstance(self.picture, Path):
            return self.picture
        with PIL.Image.open(self.picture) as opened:
            return opened.convert("RGB")


@dataclass(frozen=True)
class Score:
    """A share of ``n`` items that are right (or the mean of what they got), and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict:
        """``{"value", "low", "high", "n"}``, rounded to six digits."""
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}

    def times(self, factor: float) -> Score:
        """The score on another scale."""
        return Score(self.value * factor, self.low * factor, self.high * factor, self.n)


Made = str | PIL.Image.Image  # an answer or a picture
Baselines = dict[str, dict[str, float]]  # score name -> what chance, guessing or the truth would score
Judge = Callable[[Sequence[Item], Sequence[Any]], list[Verdict]]  # of several items, and what was ``Made`` of each


def each(judge: Callable[[Item, Any], Verdict]) -> Judge:
    """A judge of several items from a judge of one."""
    return lambda items, outputs: [judge(item, m) for item, m in zip(items, outputs, strict=True)]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its items, how they are judged, how many become scores, and what the scores are to be compared with.

    ``items(seed, size)`` are in a fixed order for pictures of ``size`` pixels; ``scores`` and ``baselines`` name scores
    ``name@protocol[judge]/category``. ``side`` is the side of its pictures in pixels (None: as the model draws);
    ``scorer`` is everything that moves a verdict and is not in the items; ``worst`` is the grade of a failure;
    ``macro`` says whether its overall score averages categories, or items; ``layout(folder, outcomes)`` writes what an
    official scorer reads.
    """

    name: str
    task: Literal["draw", "answer"]
    items: Callable[[int, int], list[Item]]
    judge: Judge
    scores: Callable[[Sequence[Outcome]], dict[str, Score]]
    baselines: Callable[[Sequence[Item], int], Baselines] = lambda items, size: {}
    pictures_per_prompt: int = 1
    side: int | None = None
    max_new_tokens: int = 48
    scorer: Mapping[str, Any] = field(default_factory=dict)
    worst: float = 0.0
    macro: bool = False
    whole: bool = False  # a limit counts clusters, so that none is cut in two
    layout: Callable[[Path, Sequence[Outcome]], None] | None = None


def by_category(rows: Sequence) -> dict[str, list]:
    """Items or outcomes by category, in order."""
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(row.category if isinstance(row, Item) else row.item.category, []).append(row)
    return groups


def share(outcomes: Sequence[Outcome]) -> Score:
    """The share right of independent outcomes."""
    return wilson(sum(o.verdict.ok for o in outcomes), len(outcomes))


def grades(outcomes: Sequence[Outcome], scale: tuple[float, float] = (0.0, 1.0)) -> Score:
    """The mean grade of outcomes, on a scale from its worst to its best."""
    return weighted({"": outcomes}, {"": 1.0}, scale)


def weighted(
    groups: Mapping[str, Sequence[Outcome]], weights: Mapping[str, float], scale: tuple[float, float] = (0.0, 1.0)
) -> Score:
    """The weighted mean of the groups' mean grades; ``weights`` sum to 1."""
    low, high = scale
    units = {
        k: ([(o.verdict.grade - low) / (high - low) for o in group], [o.item.cluster for o in group])
        for k, group in groups.items()
    }
    score = macro(units, weights=[weights[k] for k in units], graded=True)
    value, least, most = (low + v * (high - low) for v in (score.value, score.low, score.high))
    return Score(value, least, most, score.n)


# --- intervals --------------------------------------------------------------------------------------------------------


def wilson(right: float, n: int) -> Score:
    """The share right of ``n`` independent items, with Wilson's interval. Raises ``ValueError`` for no items."""
    return Score(*intervals.wilson(right, n), n)


def clustered(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Score:
    """The mean of values in [0, 1] that are correlated within a cluster: percentile bootstrap over clusters."""
    return macro({"": (values, clusters)}, seed)


def macro(
    groups: Mapping[str, tuple[Sequence[float], Sequence[str]]],
    seed: int = 0,
    weights: Sequence[float] | None = None,
    graded: bool = False,
) -> Score:
    """The mean of the groups' means; ``groups`` maps a name to (values in [0, 1], their clusters), and ``weights`` are
    even unless given.

    The bootstrap redraws clusters within each group. A cluster's name is its own within its group only. Values that are
    ``graded`` may well agree closely: Wilson's width, that of values of 0 or 1, then bounds groups of few clusters.
    """
    if not groups:
        raise ValueError("no groups to average")
    if any(not 0 <= v <= 1 for values, _ in groups.values() for v in values):
        raise ValueError("values must be in [0, 1]")
    rng = np.random.default_rng(seed)
    resampled = np.average([_resample(v, c, rng) for v, c in groups.values()], axis=0, weights=weights)
    each = [wilson(sum(map(float, v)), len(v)) for v, _ in groups.values()]
    share = np.full(len(each), 1 / len(each)) if weights is None else np.asarray(weights, float)
    value = float(np.average([s.value for s in each], weights=weights))
    # the intervals of independent means combine by their arms' squares (MOVER, Zou and Donner 2008)
    arms = [not graded or len(set(c)) < FEW for _, c in groups.values()]
    down = sqrt(sum(((s.value - s.low) * w * a) ** 2 for s, w, a in zip(each, share, arms, strict=True)))
    up = sqrt(sum(((s.high - s.value) * w * a) ** 2 for s, w, a in zip(each, share, arms, strict=True)))
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


def ratio(over: Sequence[float], under: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Score:
    """The ratio of two sums over items (a precision, an F score), 0 over nothing: percentile bootstrap over clusters,
    no narrower than Wilson's interval of the items that count below the line."""
    if not len(over) == len(under) == len(clusters) or not len(over):
        raise ValueError(f"a ratio of {len(over)} and {len(under)} values of {len(clusters)} clusters")
    index = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    which = [index[c] for c in clusters]
    a, b = (np.bincount(which, np.asarray(v, float), len(index)) for v in (over, under))
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), DRAWS)
    above, below = times @ a, times @ b
    drawn = np.divide(above, below, out=np.zeros(DRAWS), where=below > 0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    value, count = float(a.sum() / b.sum()) if b.sum() else 0.0, sum(v > 0 for v in under)
    alone = wilson(value * count, count) if count else Score(0.0, 0.0, 1.0, 0)
    return Score(value, min(float(low), alone.low), max(float(high), alone.high), len(over))


def sign_flip(a: Sequence[float], b: Sequence[float], clusters: Sequence[str], seed: int = 0) -> float:
    """The two-sided p of no difference between paired values: how often flipping the signs of whole clusters at random
    moves their sum as far from 0 as it is."""
    difference = np.asarray(b, float) - np.asarray(a, float)
    index = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    sums = np.bincount([index[c] for c in clusters], difference, len(index))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (5 * DRAWS, len(sums)))
    return float((1 + (abs(signs @ sums) >= abs(sums.sum()) - 1e-12).sum()) / (1 + len(signs)))


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
