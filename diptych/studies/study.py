"""What a study is: its arms, stages and benchmarks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diptych.evaluation.harness import evaluate
from diptych.generation.engine import Engine, load
from diptych.models import store
from diptych.recipes.run import resume, train
from diptych.training.log import read_metrics
from diptych.training.parameters import ever_trained
from diptych.training.recipe import Recipe

BENCHMARKS = ("vqa-mini", "geneval-mini")


@dataclass(frozen=True)
class Study:
    """Arms by name, each a recipe for a number of steps, and the arm that differences are taken from.

    ``takes``    modules that every arm takes from the model given and leaves as they are; the rest begins anew. None:
                 arms go on from the whole model
    ``measure``  more to know of every arm's model: numbers by name
    ``model``    where arms start, or what makes it in a folder; None where every arm is a model of its own
    ``fill``     how an arm starts from the model, where it is in neither of these ways
    ``benchmarks``  what arms are scored on (default: questions and drawings)
    """

    title: str
    arms: Mapping[str, Callable[[int], Recipe]]
    base: str
    takes: tuple[str, ...] | None = None
    measure: Callable[[Engine], dict[str, float]] | None = None
    model: str | Callable[[Path], str] | None = "bagel/tiny"
    fill: Callable[[Recipe, str], Recipe] | None = None
    steps: int = 600
    benchmarks: tuple[str, ...] = ()

    def on(self, recipe: Recipe, model: str) -> Recipe:
        """An arm's recipe, started from ``model``."""
        if self.fill or not model:
            return self.fill(recipe, model) if self.fill else recipe
        return recipe.on(model) if self.takes is None else replace(recipe, init=dict.fromkeys(self.takes, model))


def _agree(folder: Path, settings: Mapping) -> None:
    """Writes what a study was begun with, or refuses to go on with something else."""
    file = folder / "study.json"
    if file.exists():
        begun = json.loads(file.read_text())
        if changed := [k for k, v in settings.items() if begun.get(k) != v]:
            raise ValueError(f"{folder} was begun with another {', '.join(changed)}; name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(settings), indent=1))


def _stages(recipe: Recipe, run: Path, shared: Path) -> Path:
    """The release of a recipe. Of several stages the first has a run of its own under ``shared``, for all that agree in
    it; the rest goes on from there."""
    if len(recipe.stages) > 1:
        first = replace(recipe, stages=recipe.stages[:1])
        place = shared / hashlib.sha256(first.to_json().encode()).hexdigest()[:12]
        recipe = replace(recipe, stages=recipe.stages[1:], init={"model": str(_trained(first, place))})
    return _trained(recipe, run)


def _untouched(recipe: Recipe, model: str, release: Path) -> None:
    """Raises ``ValueError`` where a weight that was taken from the model, and that no stage trains, is another now."""
    taken = {module for module, start in recipe.init.items() if start == model}
    if not taken:
        return
    before, after = store.load(model).state_dict(), store.load(release)
    learned = ever_trained(after, recipe.stages)
    kept = {n: p for n, p in after.named_parameters() if p not in learned and {"model", n.partition(".")[0]} & taken}
    if changed := sorted(n for n, p in kept.items() if not torch.equal(before[n], p)):
        raise ValueError(f"{release} changed {', '.join(changed[:4])}")


def _trained(recipe: Recipe, run: Path) -> Path:
    if not (run / "recipe.json").exists():
        return train(recipe, run)
    done = [row["step"] for row in read_metrics(run)[-1:]]
    return run / "release" if done == [recipe.steps] and (run / "release").exists() else resume(run)


def _rights(this: Study, model: str, folder: Path, limit: int | None) -> dict[tuple[str, str, str], tuple[float, str]]:
    """Of every item (benchmark, category, id): whether it was right, and its cluster."""
    result = evaluate(load(model), this.benchmarks or BENCHMARKS, seed=0, limit=limit, folder=folder)
    return {
        (o.item.benchmark, o.item.category, o.item.id): (float(o.verdict.ok), o.item.cluster) for o in result.outcomes
    }
