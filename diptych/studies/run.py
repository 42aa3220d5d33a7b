"""``diptych study``: a paper's table in miniature.

The arms of a study differ in one thing. They start from the same model and share steps, data order, noise, prompts and
scorer. Arms of several stages that agree in the first one share its run. Every run can be resumed, so a stopped study
continues where it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diptych.core.errors import nearest
from diptych.generation.engine import load
from diptych.models import store
from diptych.studies.page import check_page, write_page
from diptych.studies.study import Results, check_frozen, claim, score, train_stages
from diptych.studies.table import STUDIES


def study(
    name: str,
    folder: Path,
    out: Path,
    model: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    limit: int | None = None,
) -> Path:
    """Runs what is missing of a study and returns the page that it writes, with tables and one plot.

    ``folder``  keeps the runs, ``folder/ARM/seed-S``
    ``out``     folder of the page and the plot
    ``model``   where arms start (default: the study's own)
    ``seeds``   one run of every arm for each
    ``steps``   of every arm (default: the study's own)
    ``limit``   items per category of the evaluation

    Raises ``ValueError`` for an unknown study, for a model where the study trains its own, and for a folder that was
    begun with other settings."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; choose from {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"a study needs different seeds, at least one, not {list(seeds)}")
    this, console = STUDIES[name], Console(markup=False)
    if model is not None and not isinstance(this.model, str):
        raise ValueError(f"{name} makes its own models; it cannot start from {model!r}")
    steps = steps or this.steps
    named = model or (this.model if isinstance(this.model, str) else None)
    config = named and store.read_config(named)
    check_page(out, name)
    claim(folder, {"study": name, "model": config, "from": named, "steps": steps, "limit": limit})
    start = this.model(folder / "start") if callable(this.model) else named or ""
    results = Results(name, this, named, tuple(seeds), steps, limit, {}, {})
    if start:
        console.rule("start")
        results.scores["start"] = [score(this, start, folder / "start", limit)]
    for arm, make in this.arms.items():
        for seed in seeds:
            console.rule(f"{arm}, seed {seed}")
            run = folder / re.sub(r"[^\w.+-]+", "-", arm) / f"seed-{seed}"
            recipe = replace(this.on(make(steps), start), seed=seed)
            release = train_stages(recipe, run, folder / "stage-1")
            check_frozen(recipe, start, release)
            results.scores.setdefault(arm, []).append(score(this, str(release), run / "evaluate", limit))
            if this.measure:
                results.measures.setdefault(arm, []).append(this.measure(load(release)))
    page = write_page(results, out)
    console.print(page.read_text(), highlight=False, soft_wrap=True)
    return page
