"""``diptych study``: a paper's table in miniature. Arms differ in one thing; all start from one model and share steps,
data order, noise, prompts and scorer. Arms of several stages that agree in the first share its run. Every run resumes,
so a stopped study goes on where it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diptych.core.errors import nearest
from diptych.generation.engine import load
from diptych.models import store
from diptych.studies.page import _page
from diptych.studies.study import _agree, _rights, _stages, _untouched
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
    """Runs what is missing of a study and returns the page that it writes, with one table and one plot.

    ``folder`` keeps the runs, ``folder/ARM/seed-S``; ``model`` is where arms start (default: the study's own);
    ``steps`` are those of an arm (default: the study's own); ``limit`` is the evaluation's items per category.
    Raises ``ValueError`` for an unknown study, for a model where a study makes its own, and for a folder that was begun
    with other settings."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; choose from {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"a study needs different seeds, at least one, not {list(seeds)}")
    this, console = STUDIES[name], Console()
    if model is not None and not isinstance(this.model, str):
        raise ValueError(f"{name} makes its own models; it cannot start from {model!r}")
    steps = steps or this.steps
    told = model or (this.model if isinstance(this.model, str) else None)
    settings = {"study": name, "model": told and store.read_config(told), "from": told, "steps": steps, "limit": limit}
    _agree(folder, settings)
    model = this.model(folder / "start") if callable(this.model) else told or ""
    rights: dict[str, list[dict]] = {}
    measures: dict[str, list[dict[str, float]]] = {}
    if model:
        console.rule("start")
        rights["start"] = [_rights(this, model, folder / "start", limit)]
    for arm, make in this.arms.items():
        for seed in seeds:
            console.rule(f"{arm}, seed {seed}")
            run = folder / re.sub(r"[^\w.+-]+", "-", arm) / f"seed-{seed}"
            recipe = replace(this.on(make(steps), model), seed=seed)
            release = _stages(recipe, run, folder / "stage-1")
            _untouched(recipe, model, release)
            rights.setdefault(arm, []).append(_rights(this, str(release), run / "evaluate", limit))
            if this.measure:
                measures.setdefault(arm, []).append(this.measure(load(release)))
    page = _page(this, name, rights, measures, told, seeds, steps, limit, out)
    console.print(page.read_text(), highlight=False)
    return page
