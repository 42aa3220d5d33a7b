"""Running a recipe: its data by name, a grid of sample pictures at every checkpoint, its seed and length as asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from diptych.machine.devices import pick_device
from diptych.models.protocol import Trainable, UnifiedModel
from diptych.training import build, loop
from diptych.training.recipe import Recipe, Stage

PROMPTS = (
    "a red circle",
    "three blue stars",
    "a green square left of a black cross",
    "a yellow star and a purple circle",
)


def train(
    recipe: Recipe | str | Path,
    run: str | Path | None = None,
    *,
    steps: int | None = None,
    seed: int | None = None,
    catalog: str | None = None,
    override: Mapping[str, str] | None = None,
    device: str = "auto",
    show: bool = True,
    model: str | Path | None = None,
    encoded: str | None = None,
    folders: Mapping[str, str] | None = None,
    profile: int = 0,
    track: str | None = None,
) -> Path:
    """Trains a recipe (an object, a name or a file) into the folder ``run`` and returns its released model's folder.

    ``model`` is a folder or shipped name to go on training, of any family that has the recipe's parts, in place of the
    recipe's own; ``steps`` cuts or stretches all stages in proportion; ``override`` changes leaves by dotted path;
    ``encoded`` is the folder of ``diptych data precompute``, ``folders`` plain folders of pictures by data set;
    ``profile`` traces so many steps; ``track`` names a tracker."""
    recipe = configured(
        recipe, model=model, steps=steps, seed=seed, catalog=catalog, encoded=encoded, override=override,
        folders=folders,
    )  # fmt: skip
    if run is None:
        run = Path("runs") / f"{recipe.name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    return loop.train(
        recipe, run, stage_sources, pick_device(device), show=show, hook=draw_samples, profile=profile, track=track
    )


def configured(
    recipe: Recipe | str | Path,
    *,
    model: str | Path | None = None,
    steps: int | None = None,
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
    given = {"seed": seed, "catalog": catalog, "encoded": encoded, "folders": dict(folders) if folders else None}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def resume(
    run: str | Path, *, device: str = "auto", show: bool = True, profile: int = 0, track: str | None = None
) -> Path:
    """Goes on with a run from its last checkpoint, exactly as if it had not stopped."""
    run = Path(run)
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} is no run: it holds no recipe.json")
    recipe = Recipe.load(run / "recipe.json")
    how: dict[str, Any] = {"show": show, "hook": draw_samples, "profile": profile, "track": track}
    return loop.train(recipe, run, stage_sources, pick_device(device), resume=True, **how)


def stage_sources(recipe: Recipe, stage: Stage) -> Mapping[str, Any]:
    """The data sets of a stage: encoded beforehand, else the user's (folders, catalog), else embedded."""
    how = {"catalog": recipe.catalog, "size": recipe.size, "encoded": recipe.encoded, "folders": recipe.folders}
    return _self_conditioned(sources(stage.data, **how), stage)


def _self_conditioned(found: Mapping[str, Any], stage: Stage) -> Mapping[str, Any]:
    s = stage.self_condition
    return {name: SelfConditioned(source, s.masked, s.prompt) for name, source in found.items()} if s else found


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
    **how: Any,
) -> dict[str, dict[str, Any]]:
    """Encodes the data sets of a recipe with the frozen encoders of its model into ``folder``, one folder a data set.

    Returns what was done by data set (``diptych.data.encoded.precompute``, which takes ``how``). The recipe then trains
    on them with ``encoded=folder``.

    ``data`` chooses data sets (default: all of the recipe's); ``limit`` cuts each to its first rows."""
    recipe = configured(recipe, model=model, catalog=catalog, override=override)
    stages = {name: stage for stage in reversed(recipe.stages) for name in stage.data}
    made = build.build(recipe, pick_device(device)).eval()
    entries = read_catalog(recipe.catalog) if recipe.catalog else {}
    told = {}
    found = sources(data or stages, catalog=recipe.catalog, size=recipe.size, folders=recipe.folders)
    for name, source in found.items():
        source = _self_conditioned({name: source}, stages[name])[name] if name in stages else source
        cut = First(source, min(limit, len(source))) if limit else source
        done = 0

        def said(rows: int, name: str = name, total: int = len(cut)) -> None:
            nonlocal done
            done += rows
            progress(name, done, total)

        told[name] = precomputed.precompute(
            cut,
            made,
            Path(folder) / name,
            origin=origin(name, entries, recipe.size, recipe.folders),
            progress=said,
            **how,
        )
    return told


def draw_samples(model: Trainable, step: int, run: Path) -> None:
    """Draws fixed prompts with fixed seeds into ``run/samples``, where the family draws."""
    if not isinstance(model, UnifiedModel):
        return
    training = [(m, m.training) for m in model.modules()]
    drawn = Engine(model).draw(
        [Sample(p, (user(p),)) for p in PROMPTS for _ in range(2)], list(range(2 * len(PROMPTS)))
    )
    contact_sheet([d.image for d in drawn], columns=4).save(run / "samples" / f"step-{step:08d}.png")
    for module, mode in training:
        module.training = mode
