"""Runs a recipe: opens its data sets, changes its settings, and draws sample pictures at every checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych import recipes
from diptych.core.sample import Sample, user
from diptych.data import encoded as precomputed
from diptych.data.catalog import origin, read_catalog, sources
from diptych.data.contact_sheet import contact_sheet
from diptych.data.mixture import First
from diptych.data.self_condition import SelfConditioned
from diptych.generation.engine import Engine
from diptych.machine import disk
from diptych.machine.devices import pick_device
from diptych.models.protocol import Trainable, UnifiedModel
from diptych.recipes.rollouts import Scheduled
from diptych.training import build, checkpoint, loop
from diptych.training.recipe import Recipe, Stage

log = logging.getLogger("diptych.training")
PROMPTS = (
    "a red circle",
    "three blue stars",
    "a green square left of a black cross",
    "a yellow star and a purple circle",
)


@dataclass(frozen=True)
class Watch:
    """How a run is reported besides metrics.jsonl.

    ``show``     show progress on standard error
    ``profile``  how many steps to trace into trace.json
    ``track``    a tracker: trackio or wandb
    """

    show: bool = True
    profile: int = 0
    track: str | None = None


def train(
    recipe: Recipe | str | Path,
    run: str | Path | None = None,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    catalog: str | None = None,
    override: Mapping[str, str] | None = None,
    device: str = "auto",
    model: str | Path | None = None,
    encoded: str | None = None,
    folders: Mapping[str, str] | None = None,
    watch: Watch = Watch(),
) -> Path:
    """Trains a recipe (an object, a name or a file) into the folder ``run`` and returns its released model's folder.

    ``run``       by default a new folder under ``runs``, the same for all processes
    ``steps``     cuts or stretches all stages in proportion
    ``minutes``   trains for this long instead, by the wall clock; schedules follow the share of it that is over
    ``model``     a folder or shipped name to continue training, of any family that has the recipe's parts, in place of
                  the recipe's own
    ``override``  changes leaves of the recipe by dotted path
    ``encoded``   the folder of ``diptych data precompute``
    ``folders``   data set -> a plain folder of pictures in its place

    Raises ``ValueError`` for settings that contradict each other, ``Interrupted`` when it was asked to stop."""
    recipe = configured(
        recipe,
        model=model,
        steps=steps,
        minutes=minutes,
        seed=seed,
        catalog=catalog,
        encoded=encoded,
        override=override,
        folders=folders,
    )
    return _train(recipe, run, device, watch)


def _train(recipe: Recipe, run: str | Path | None, device: str, watch: Watch, **options: Any) -> Path:
    options |= {"show": watch.show, "profile": watch.profile, "track": watch.track}
    options |= {"hook": draw_samples, "rollouts": Scheduled()}
    return loop.train(recipe, run, stage_sources, pick_device(device), **options)


def configured(
    recipe: Recipe | str | Path,
    *,
    model: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    catalog: str | None = None,
    encoded: str | None = None,
    override: Mapping[str, str] | None = None,
    folders: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe (an object, a name or a file) with the changes that ``train`` takes."""
    recipe = recipe if isinstance(recipe, Recipe) else recipes.find(recipe)
    if model is not None:
        recipe = recipe.on(model)
    if override:
        recipe = recipe.override(override)
    if steps is not None:
        recipe = recipe.with_steps(steps)
    given: dict[str, Any] = {"seed": seed, "minutes": minutes, "catalog": catalog, "encoded": encoded}
    given["folders"] = dict(folders) if folders else None
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def resume(
    run: str | Path,
    *,
    override: Mapping[str, str] | None = None,
    steps: int | None = None,
    grown_data: bool = False,
    device: str = "auto",
    watch: Watch = Watch(),
) -> Path:
    """Continues a run from its last checkpoint as if it had not stopped; returns its released model's folder.

    ``override``    changes leaves of the recipe that may change (``Recipe.resumed_with``), by dotted path
    ``steps``       of the whole run: its last stage becomes longer
    ``grown_data``  data sets may have more rows than they had; each then begins an epoch of all its rows

    Raises ``ValueError`` where ``run`` is no run, and for changes that contradict what was trained so far."""
    run = Path(run)
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} is no run: it holds no recipe.json")
    recipe = Recipe.load(run / "recipe.json")
    changes = dict(override or {})
    if steps is not None:
        changes[f"stages.{len(recipe.stages) - 1}.steps"] = str(steps - sum(s.steps for s in recipe.stages[:-1]))
    if changes:
        saved = checkpoint.available(run / "checkpoints")
        position = checkpoint.read_meta(saved[-1]) if saved else {"stage": 0, "done": 0}
        recipe = recipe.resumed_with(changes, position["stage"], position["done"])
    return _train(recipe, run, device, watch, resume=True, grown=grown_data)


def stage_sources(recipe: Recipe, stage: Stage) -> Mapping[str, Any]:
    """The data sets of a stage: precomputed ones, else the user's (folders, catalog), else embedded ones."""
    by_name = sources(
        stage.data, catalog=recipe.catalog, size=recipe.size, encoded=recipe.encoded, folders=recipe.folders
    )
    return _self_conditioned(by_name, stage)


def _self_conditioned(by_name: Mapping[str, Any], stage: Stage) -> Mapping[str, Any]:
    s = stage.self_condition
    return {name: SelfConditioned(source, s.masked, s.prompt) for name, source in by_name.items()} if s else by_name


def precompute(
    recipe: Recipe | str | Path,
    folder: str | Path,
    *,
    data: Sequence[str] | None = None,
    limit: int | None = None,
    model: str | Path | None = None,
    catalog: str | None = None,
    override: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda name, done, rows: None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Encodes the data sets of a recipe with the frozen encoders of its model into ``folder``, one folder a data set.

    Returns the counts of each data set (``diptych.data.encoded.precompute``, which takes ``options``). The recipe then
    trains on them with ``encoded=folder``.

    ``data`` chooses data sets (default: all of the recipe's); ``limit`` cuts each to its first rows."""
    recipe = configured(recipe, model=model, catalog=catalog, override=override)
    stages = {name: stage for stage in reversed(recipe.stages) for name in stage.data}
    network = build.build(recipe, pick_device(device)).eval()
    entries = read_catalog(recipe.catalog) if recipe.catalog else {}
    results = {}
    by_name = sources(data or stages, catalog=recipe.catalog, size=recipe.size, folders=recipe.folders)
    for name, source in by_name.items():
        source = _self_conditioned({name: source}, stages[name])[name] if name in stages else source
        cut = First(source, min(limit, len(source))) if limit else source
        done = 0

        def report(rows: int, name: str = name, total: int = len(cut)) -> None:
            nonlocal done
            done += rows
            progress(name, done, total)

        results[name] = precomputed.precompute(
            cut,
            network,
            Path(folder) / name,
            origin=origin(name, entries, recipe.size, recipe.folders),
            progress=report,
            **options,
        )
    return results


# what sampling from a partly trained model and writing the picture may raise
DRAWING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def draw_samples(model: Trainable, step: int, run: Path) -> None:
    """Generates pictures of fixed prompts with fixed seeds into ``run/samples``, if the model can. A failure is logged
    as a warning and does not end the run."""
    if not isinstance(model, UnifiedModel):
        return
    training = [(m, m.training) for m in model.modules()]
    prompts = [Sample(p, (user(p),)) for p in PROMPTS for _ in range(2)]
    try:
        drawn = Engine(model).draw(prompts, list(range(len(prompts))))
        with disk.atomic(run / "samples" / f"step-{step:08d}.png") as part:
            contact_sheet([d.image for d in drawn], columns=4).save(part, "PNG")
    except DRAWING_ERRORS as error:
        log.warning("step %d: its samples cannot be drawn: %s: %s", step, type(error).__name__, error)
    finally:
        for module, mode in training:
            module.training = mode
