"""How fast the data of a recipe can be delivered, without training on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.data.shards import speed
from diptych.models import configs, store
from diptych.recipes.run import stage_sources
from diptych.training.log import consumption
from diptych.training.recipe import Recipe
from diptych.training.rows import stage_loader


def loader_speed(
    recipe: Recipe, workers: Sequence[int], rows: int, against: str | Path | None = None
) -> list[dict[str, Any]]:
    """One dict for each stage and number of worker processes: rows, tokens, samples and pictures a second, how full
    the rows are, and with ``against``, a run, how many times as fast as its trainer consumed tokens."""
    name, config = configs.config_from_json(recipe.model)
    model = store.create(name, config, device="meta")
    consumed = consumption(against) if against else None
    speeds = []
    for stage in recipe.stages:
        for count in workers:
            loader = stage_loader(replace(recipe, workers=count), stage, model, stage_sources)
            measured = speed(loader, rows)
            row = {"stage": stage.name, "workers": count, **measured.to_json()}
            speeds.append(row | ({"times_consumed": measured.tokens_per_second / consumed} if consumed else {}))
    return speeds
