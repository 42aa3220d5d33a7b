"""Recipes that two CPU cores run in minutes, on the data that ships."""

from __future__ import annotations

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.training.recipe import Limits, Optimizer, Recipe, Schedule, Stage

MIX = {  # what the tiny families learn from
    "shapes/draw": 0.55,
    "shapes/ask": 0.10,
    "shapes/ask-where": 0.16,  # where things are is what a small reader learns last
    "shapes/caption": 0.03,
    "shapes/edit": 0.05,
    "emoji64/draw": 0.05,
    "emoji64/ask": 0.02,
    "emoji64/caption": 0.02,
    "emoji64/edit": 0.02,
}


def autoencoder() -> Recipe:
    """The tiny image autoencoder that the tiny families draw through: 64 x 64 pixels to 8 x 8 x 8 latents.

    diptych train autoencoder/tiny
    """
    return Recipe(
        name="autoencoder/tiny",
        model=config_to_json("autoencoder", config("autoencoder/tiny")),
        stages=(
            Stage(
                "autoencoder",
                steps=1500,
                train={"encoder": 2e-3, "decoder": 2e-3},
                data={"shapes/draw": 0.45, "emoji64/draw": 0.2, "emoji/draw": 0.15, "emoji/scenes": 0.2},
                loss={"mse": 1.0, "l1": 0.3},
                schedule=Schedule(warmup=50, decay=0.6),
                limits=Limits(tokens=64 * 32, pictures=32),
                ema=0.99,
            ),
        ),
    )


def bagel() -> Recipe:
    """BAGEL at a size that two CPU cores train: 5.9 M parameters, 64 x 64 pixels, 16 tokens a picture.

    x-prediction in latents, late decay, Muon on the blocks' matrices: what made small models learn composition from
    little compute (NOTES.md). The shipped checkpoint is this recipe, longer.

    diptych train bagel/tiny --steps 2000
    """
    return Recipe(
        name="bagel/tiny",
        model=config_to_json("bagel", config("bagel/tiny")),
        init={"autoencoder": "autoencoder/tiny"},
        stages=(
            Stage(
                "unified",
                steps=6000,
                train={"decoder": 2e-3, "vision": 2e-3, "projector": 2e-3, "head": 2e-3},
                data=dict(MIX),
                loss={"text": 0.3, "image": 1.0},
                optimizer=Optimizer("muon"),
                schedule=Schedule(warmup=60, decay=0.4),
                limits=Limits(tokens=4096, pictures=192),
                dropout={"text": 0.1},
                ema=0.998,
            ),
        ),
        checkpoint_every=500,
    )
