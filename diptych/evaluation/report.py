"""The sections of a report from the results of ``evaluate``: scores, curves, pictures and answers with their verdicts,
and the sampling card. ``diptych.evaluation.page`` writes them as one HTML file or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diptych.evaluation import files
from diptych.evaluation.harness import Result
from diptych.evaluation.page import Asked, Figure, Gallery, Questions, Section, Shown, Table, Text, Verdicts
from diptych.evaluation.scores import Outcome, by_category

# --- sections from results --------------------------------------------------------------------------------------------


def sections(
    results: Mapping[str, Result], metrics: str | Path | None = None, commands: str = "", per_category: int = 6
) -> list[Section]:
    """All sections: the score table of all models, bars by category and curves; then, of the last model, its drawings,
    answers and edits, every verdict, and the card.

    ``results`` maps the name of a column ("untrained", "trained") to its result. ``metrics`` is a training run's folder
    or metrics file. Of each category ``per_category`` outcomes are shown: failures first, then wrong, then right ones.
    Raises ``ValueError`` for no result.
    """
    if not results:
        raise ValueError("a report needs at least one result")
    name, last = list(results.items())[-1]
    page: list[Section] = [score_table(results), *charts(results)]
    if metrics is not None:
        from diptych.evaluation.figures import curves

        page.append(Figure("Training", curves(metrics), "Faint: every logged step. Bold: smoothed."))
    for benchmark, group in _by_benchmark(last).items():
        if any(o.text is not None for o in group):
            page += answers(benchmark, group, name, per_category)
        else:
            page += drawings(benchmark, group, name, per_category)
        page.append(verdicts(benchmark, group, per_category))
    page.append(card_table(last))
    if commands:
        page.append(Text("Reproduce", "", commands))
    return page


def score_table(results: Mapping[str, Result]) -> Table:
    """Scores as rows, models as columns, baselines last."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.scores))
    baselines = {name: row for result in results.values() for name, row in result.baselines.items()}
    rows = []
    for name in names:
        cells = [result.scores.get(name, "–") for result in results.values()]
        rows.append((name, *cells, " · ".join(f"{k} {v:.2f}" for k, v in baselines.get(name, {}).items())))
    note = "Bars show the value and its 95 % interval. Intervals of drawing scores resample whole prompts."
    failed = {name: result.failures for name, result in results.items() if result.failures}
    if failed:
        note += " Failed items, counted as wrong: " + ", ".join(f"{k} {v}" for k, v in failed.items()) + "."
    return Table("Scores", ("score", *results, "to compare with"), tuple(rows), note)


def charts(results: Mapping[str, Result]) -> list[Figure]:
    """Bars by category with intervals, one colour for each model, of each score with three categories or more."""
    from diptych.evaluation.figures import bars

    groups: dict[str, list[str]] = {}
    for result in results.values():
        for name in result.scores:
            stamp, slash, category = name.partition("/")
            if slash and category not in groups.setdefault(stamp, []):
                groups[stamp].append(category)
    figures = []
    for stamp, categories in groups.items():
        scores = {
            model: {c: r.scores[f"{stamp}/{c}"] for c in categories if f"{stamp}/{c}" in r.scores}
            for model, r in results.items()
        }
        if len(categories) >= 3 and any(scores.values()):
            figures.append(Figure(f"{stamp} by category", bars(categories, scores)))
    return figures


def drawings(benchmark: str, outcomes: Sequence[Outcome], name: str, per_category: int = 6) -> list[Gallery]:
    """One gallery for each category of a drawing benchmark; the pictures that the model was shown come first."""
    galleries = []
    for category, group in by_category(outcomes).items():
        shown = []
        for o in _worst_first(group)[:per_category]:
            before = [files.picture(i.image) for i in o.item.sample.images() if i.image is not None]
            images = (*before, *([o.image] if o.image is not None else []))
            shown.append(Shown(images, o.item.prompt, o.verdict.ok, o.verdict.reason, o.item.id))
        galleries.append(Gallery(f"{benchmark}: {category} · {name}", tuple(shown), _tally(group)))
    return galleries


def answers(benchmark: str, outcomes: Sequence[Outcome], name: str, per_category: int = 6) -> list[Questions]:
    """Questions of each category with their answers and the expected ones."""
    groups = by_category(outcomes).values()
    asked = [_asked(o) for group in groups for o in _worst_first(group)[:per_category]]
    return [Questions(f"{benchmark} · {name}", tuple(asked), _tally(outcomes))]


def verdicts(benchmark: str, outcomes: Sequence[Outcome], per_category: int = 6) -> Verdicts:
    """Every verdict of a benchmark, failures first; those that are shown on the page are linked."""
    seen = {o.item.id for group in by_category(outcomes).values() for o in _worst_first(group)[:per_category]}
    rows = [
        (o.item.id, o.item.id in seen, o.verdict.ok, o.verdict.grade, o.verdict.reason or (o.text or ""))
        for o in _worst_first(outcomes)
    ]
    return Verdicts(f"{benchmark}: every verdict", tuple(rows))


def card_table(result: Result) -> Table:
    """The sampling card and the scorers: every setting that changes a score."""
    rows = []
    for key, value in {**result.card, "scorers": result.scorers or "none but the rules"}.items():
        shown = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{key} {k}".strip(), v if isinstance(v, str) else json.dumps(v)) for k, v in shown]
    return Table("Sampling card", ("setting", "value"), tuple(rows))


def _by_benchmark(result: Result) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in result.outcomes:
        groups.setdefault(outcome.item.benchmark, []).append(outcome)
    return groups


def _worst_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Failures, then wrong outcomes by grade, then right ones; a stable order."""
    return sorted(outcomes, key=lambda o: (not o.verdict.failed and o.error is None, o.verdict.ok, o.verdict.grade))


def _asked(outcome: Outcome) -> Asked:
    image = next((files.picture(i.image) for i in outcome.item.sample.images() if i.image is not None), None)
    answer = outcome.text if outcome.error is None else f"failed: {outcome.error}"
    expected = str(outcome.item.reference.get("answer", outcome.verdict.reason))
    return Asked(image, outcome.item.prompt, answer or "", expected, outcome.verdict.ok, outcome.item.id)


def _tally(outcomes: Sequence[Outcome]) -> str:
    failed = sum(o.error is not None or o.verdict.failed for o in outcomes)
    right = sum(o.verdict.ok for o in outcomes)
    failures = f", {failed} failed" if failed else ""
    return f"{right} of {len(outcomes)} right{failures}; the worst are shown first."
