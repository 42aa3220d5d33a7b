"""The part of a model card that an evaluation fills in."""

from __future__ import annotations

from pathlib import Path

from diptych.evaluation.harness import load_result


def scores(folder: str | Path) -> str:
    """Markdown of a finished evaluation: a table of scores with 95 % intervals, and the settings that change them.

    ``Engine.push_to_hub`` takes it as ``card``. Raises ``ValueError`` for a folder without scores."""
    result = load_result(folder)
    rows = [f"| {name} | {s.value:.3f} | {s.low:.3f} to {s.high:.3f} | {s.n} |" for name, s in result.scores.items()]
    settings = ", ".join(f"{name} {value}" for name, value in result.card["settings"].items())
    table = "\n".join(["| score | value | 95 % interval | n |", "|---|---|---|---|", *rows])
    return f"## Evaluation\n\n{table}\n\nSampling: seed {result.card['seed']}, {settings}.\n"
