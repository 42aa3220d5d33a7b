"""SynerGen-VL (arXiv 2412.09604): a picture tokenizer, then stages that leave the language path alone."""

from __future__ import annotations

from dataclasses import replace

from diptych.models import config, config_to_json
from diptych.recipes import tiny as tiny_recipes
from diptych.train.recipe import Limits, Recipe


def tokenizer() -> Recipe:
    """The tiny picture tokenizer that the tiny SynerGen-VL reads and draws through: 64 x 64 pixels to 16 x 16 codes.

    diptych train autoencoder/vq-tiny
    """
    recipe = tiny_recipes.autoencoder()
    return replace(
        recipe,
        name="autoencoder/vq-tiny",
        model=config_to_json("autoencoder", config("autoencoder/vq-tiny")),
        stages=(replace(recipe.stages[0], steps=1200, limits=Limits(tokens=8 * 256, pictures=8)),),
    )
