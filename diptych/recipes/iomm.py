"""IOMM (arXiv 2603.16139): a generator on a frozen reader, pre-trained on pictures alone, then tuned on a mix."""

from __future__ import annotations

from diptych.models import config, config_to_json
from diptych.train.recipe import Limits, Optimizer, Recipe, Schedule, Stage


def reader(steps: int = 3000) -> Recipe:
    """The reader of ``iomm/tiny``: it learns to answer and to describe, and is never trained again.

    diptych train iomm/reader
    """
    return Recipe(
        name="iomm/reader",
        model=config_to_json("iomm", config("iomm/tiny")),
        init={"autoencoder": "autoencoder/tiny"},
        stages=(
            Stage(
                "reader",
                steps=steps,
                train={"mllm": 3e-3},
                data={
                    "shapes/ask": 0.55,
                    "shapes/caption": 0.25,
                    "emoji64/ask": 0.1,
                    "emoji64/caption": 0.1,
                },
                loss={"text": 1.0, "image": 0.0},
                optimizer=Optimizer("muon"),
                schedule=Schedule(warmup=50, decay=0.5),
                limits=Limits(tokens=2560, pictures=192),
                ema=0.998,
            ),
        ),
        checkpoint_every=1000,
    )
