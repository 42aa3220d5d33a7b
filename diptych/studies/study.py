"""What a study is, and how its arms are trained and scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diptych.evaluation import files
from diptych.evaluation.harness import evaluate
from diptych.generation.engine import Engine, load
from diptych.machine import disk
from diptych.models import store
from diptych.recipes.run import resume, train
from diptych.training.log import read_metrics
from diptych.training.parameters import ever_trained
from diptych.training.recipe import Recipe

Arm = Callable[[int], Recipe]  # the recipe of an arm for a number of steps
Items = dict[tuple[str, str, str], tuple[float, str]]  # (benchmark, category, id) -> (right, cluster)


@dataclass(frozen=True)
class Study:
    """A table of a paper in miniature.

    ``title``      heading of the page: the question, with the paper's table or figure
    ``arms``       what is compared, by name
    ``base``       the arm that differences are taken from
    ``takes``      modules that every arm takes from ``model`` and keeps frozen; all others are initialised anew. None:
                   arms start from the whole model
    ``measure``    further numbers about each arm's model, by name
    ``model``      the model that arms start from, or a function that trains it in a folder; None: arms start from
                   random weights
    ``fill``       how an arm's recipe starts from ``model`` where neither of these ways applies
    ``steps``      training steps of an arm
    ``benchmarks`` what arms are scored on
    """

    title: str
    arms: Mapping[str, Arm]
    base: str
    takes: tuple[str, ...] | None = None
    measure: Callable[[Engine], dict[str, float]] | None = None
    model: str | Callable[[Path], str] | None = "bagel/tiny"
    fill: Callable[[Recipe, str], Recipe] | None = None
    steps: int = 600
    benchmarks: tuple[str, ...] = ("vqa-mini", "geneval-mini")

    def on(self, recipe: Recipe, model: str) -> Recipe:
        """An arm's recipe, started from ``model``."""
        if self.fill or not model:
            return self.fill(recipe, model) if self.fill else recipe
        return recipe.on(model) if self.takes is None else replace(recipe, init=dict.fromkeys(self.takes, model))


@dataclass(frozen=True)
class Results:
    """What a study measured, and the settings that it ran with.

    ``scores`` has the items of every arm (and of the ``start``, where there is one) for each seed; ``measures`` the
    further numbers. ``model`` is None where arms start from random weights or from a model that the study trains."""

    name: str
    study: Study
    model: str | None
    seeds: tuple[int, ...]
    steps: int
    limit: int | None
    scores: dict[str, list[Items]]
    measures: dict[str, list[dict[str, float]]]


def claim(folder: Path, settings: Mapping[str, object]) -> None:
    """Writes the settings of a study into its folder. Raises ``ValueError`` where the folder has other settings, or
    holds files but no settings."""
    file = folder / "study.json"
    if file.exists():
        begun = files.load(file)
        if changed := [k for k, v in settings.items() if not isinstance(begun, dict) or begun.get(k) != v]:
            raise ValueError(f"{folder} was begun with another {', '.join(changed)}; name another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files, but no study.json: it is no folder of a study; name another folder")
    disk.write_text(file, json.dumps(dict(settings), indent=1))


def train_stages(recipe: Recipe, run: Path, shared: Path) -> Path:
    """The released model of a recipe. Arms whose first stage is the same share one run of it, in a folder under
    ``shared``, and continue from there in ``run``."""
    if len(recipe.stages) > 1:
        first = replace(recipe, stages=recipe.stages[:1])
        place = shared / hashlib.sha256(first.to_json().encode()).hexdigest()[:12]
        recipe = replace(recipe, stages=recipe.stages[1:], init={"model": str(train_or_resume(first, place))})
    return train_or_resume(recipe, run)


def train_or_resume(recipe: Recipe, run: Path) -> Path:
    """The released model of a run, which is started, continued, or finished already."""
    if not (run / "recipe.json").exists():
        return train(recipe, run)
    release = run / "release"
    finished = release.exists() and [row["step"] for row in read_metrics(run)[-1:]] == [recipe.steps]
    return release if finished else resume(run)


def check_frozen(recipe: Recipe, model: str, release: Path) -> None:
    """Raises ``ValueError`` where a weight that the recipe takes from ``model`` and never trains has changed."""
    taken = {module for module, start in recipe.init.items() if start == model}
    if not taken:
        return
    before, after = store.load(model).state_dict(), store.load(release)
    trained = ever_trained(after, recipe.stages)
    frozen = {n: p for n, p in after.named_parameters() if p not in trained and {"model", n.partition(".")[0]} & taken}
    if changed := sorted(n for n, p in frozen.items() if not torch.equal(before[n], p)):
        raise ValueError(f"{release} changed {', '.join(changed[:4])}")


def score(study: Study, model: str, folder: Path, limit: int | None) -> Items:
    """Whether a model is right, and the cluster, for every item of the study's benchmarks."""
    result = evaluate(load(model), study.benchmarks, seed=0, limit=limit, folder=folder)
    return {
        (o.item.benchmark, o.item.category, o.item.id): (float(o.verdict.ok), o.item.cluster) for o in result.outcomes
    }
