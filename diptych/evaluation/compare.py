"""Two evaluations of the same items: paired differences have much narrower intervals than two separate scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.evaluation import card as cards
from diptych.evaluation import files
from diptych.evaluation.scores import Score, paired, sign_flip


@dataclass(frozen=True)
class Difference:
    """How much B is above A on the same items: ``score`` with its interval, ``p`` of no difference (sign flips of whole
    clusters), and how many items B has better and worse."""

    score: Score
    a: float
    b: float
    p: float
    better: int
    worse: int

    def to_json(self) -> dict:
        """Plain numbers."""
        return {
            "a": round(self.a, 6),
            "b": round(self.b, 6),
            "difference": self.score.to_json(),
            "p": round(self.p, 6),
            "better": self.better,
            "worse": self.worse,
        }


def compare(a: str | Path, b: str | Path) -> dict[str, Difference]:
    """The differences of two finished evaluations, by "BENCHMARK" (the mean over its categories) and
    "BENCHMARK/CATEGORY"; grades are on the benchmark's own scale.

    Raises ``ValueError`` where the two share no benchmark, and where one was asked other prompts, or scored by another
    judge, in the two."""
    first, second = _rows(Path(a)), _rows(Path(b))
    shared = [name for name in first.prompts if name in second.prompts]
    if not shared:
        raise ValueError(f"{a} has {', '.join(first.prompts)}, {b} has {', '.join(second.prompts)}: nothing in common")
    differences = {}
    for name in shared:
        if first.prompts[name] != second.prompts[name]:
            raise ValueError(f"{name} was asked with other prompts (or another limit or seed) in {a} than in {b}")
        if first.scorers.get(name) != second.scorers.get(name):
            raise ValueError(
                f"{name} was scored by {first.scorers.get(name)} in {a}, by {second.scorers.get(name)} in {b}"
            )
        rows = [r for r in first.items if r["benchmark"] == name]
        differences[name] = _difference(rows, first, second, [r["category"] for r in rows])
        categories = list(dict.fromkeys(r["category"] for r in rows))
        for category in categories if len(categories) > 1 else []:
            some = [r for r in rows if r["category"] == category]
            differences[f"{name}/{category}"] = _difference(some, first, second, [""] * len(some))
    return differences


@dataclass(frozen=True)
class _Rows:
    """A scored evaluation: hash of the prompts and scorer by benchmark, its items by id, and their grades."""

    prompts: Mapping[str, str]
    scorers: Mapping[str, Any]
    items: Sequence[Mapping]
    grades: Mapping[str, float]


def _rows(folder: Path) -> _Rows:
    """The scored evaluation of a folder. Raises ``ValueError`` for one that is not scored."""
    card = cards.load(folder)
    summary = folder / "summary.json"
    if not summary.is_file():
        raise ValueError(f"{folder} is not scored yet: diptych evaluate score {folder}")
    scored = {r["id"]: r for r in files.read(folder / "scores.jsonl")}
    items = [r for r in files.read(folder / "items.jsonl") if r["id"] in scored]
    grades = {k: float(r["ok"]) if r.get("value") is None else r["value"] for k, r in scored.items()}
    scorers = files.load(summary).get("scorers", {})
    prompts = {k: v for k, v in card["prompts"].items() if any(r["benchmark"] == k for r in items)}  # what is scored
    return _Rows(prompts, scorers, sorted(items, key=lambda r: r["id"]), grades)


def _difference(rows: Sequence[Mapping], first: _Rows, second: _Rows, groups: Sequence[str]) -> Difference:
    """The difference on these items, averaged within groups first."""
    if missing := [r["id"] for r in rows if r["id"] not in second.grades]:
        raise ValueError(f"{len(missing)} items were scored in one evaluation only, first {missing[0]}")
    a, b = ([evaluation.grades[r["id"]] for r in rows] for evaluation in (first, second))
    clusters = [f"{r['category']}/{r.get('cluster', r['prompt'])}" for r in rows]
    score = paired(a, b, clusters, groups)
    mean_a, mean_b = (sum(_means(grades, groups)) / len(set(groups)) for grades in (a, b))
    better, worse = sum(y > x for x, y in zip(a, b)), sum(y < x for x, y in zip(a, b))
    return Difference(score, mean_a, mean_b, sign_flip(a, b, clusters), better, worse)


def _means(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    return [
        sum(v for v, g in zip(values, groups, strict=True) if g == name) / groups.count(name) for name in set(groups)
    ]
