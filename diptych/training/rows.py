"""The rows of a stage: its data sets, checked against the model, behind a loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diptych.data.encoded import encoders_of, refuse_stale
from diptych.data.loader import Loader, LoaderConfig
from diptych.models.protocol import Trainable
from diptych.training.recipe import Recipe, Stage

Sources = Callable[[Recipe, Stage], Mapping[str, Any]]  # the data sets of a stage, by name


def stage_loader(recipe: Recipe, stage: Stage, model: Trainable, sources: Sources, **options: Any) -> Loader:
    """The loader of a stage, laid out by ``model``; ``options`` are those of ``Loader`` about processes and padding.

    Raises ``ValueError`` for data sets that were encoded by another encoder than the model's."""
    plan = LoaderConfig(
        stage.data,
        stage.limits.tokens,
        stage.limits.pictures,
        recipe.seed + 7919 * recipe.stages.index(stage),
        recipe.streams,
        dropout=stage.dropout,
        reading=stage.reading,
        prompts=stage.prompts,
        samples=stage.limits.samples,
        order=recipe.order,
        buffer=recipe.buffer,
    )
    data = sources(recipe, stage)
    check_encoded(data, model)
    loader = Loader(
        data,
        plan,
        model.lay_out,
        routes=model.routes,
        conditions=(*model.conditions, *(f"{name}*" for name in model.segmented)),
        workers=recipe.workers,
        skip_limit=recipe.skip_limit,
        **options,
    )
    return loader


def check_encoded(sources: Mapping[str, Any], model: Trainable) -> None:
    """Raises ``ValueError`` for data sets that hold the output of an encoder which this model does not have, has in
    another state, or trains in this stage."""
    for encoder in encoders_of(sources) & model.encoders.keys():
        modules = [model.get_submodule(m) for m in model.encoders[encoder].modules]
        if any(p.requires_grad for m in modules for p in m.parameters()):
            raise ValueError(f"this stage trains {encoder!r}, and its data sets hold the output of that encoder")
    refuse_stale(sources, lambda name: model.digest(name) if name in model.encoders else f"{model.family} has none")
