"""SGT (arXiv 2605.18714): post-training a unified model to draw a dense visual target of what it reads.

Segmentation : questions = 2 : 1 by samples (``samples/*`` and ``count/*`` of metrics.jsonl say what a run really saw),
L = 1.5 cross-entropy + 1.0 flow matching, words dropped from one drawing in ten. The picture enters through the vision
encoder alone: its latents are withheld, so nothing can be copied.
"""

from __future__ import annotations

from dataclasses import replace

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.training.recipe import EngineConfig, Limits, Optimizer, Recipe, Schedule, Stage

PARTS = ("decoder", "vision", "projector", "head")
QUESTIONS = {"shapes/ask": 0.9, "emoji64/ask": 0.1}
ARMS = {  # the proxies of the paper's central table, of the embedded pictures
    "none": None,
    "edges": "edges",
    "depth": "depth",
    "reconstruction": "reconstruct",
    "segmentation": "segment",
}


def tiny(proxy: str | None = "segment", ratio: float = 2.0, amount: int | None = None, steps: int = 1000) -> Recipe:
    """Post-training of a tiny model on the embedded data: ``ratio`` proxies to one question, of ``amount`` different
    pictures (default: all). ``proxy=None`` trains on questions alone, as many as at ratio 2:1: a proxy has 54 tokens
    on average and a question 30, so 896 of 4,096 tokens are questions there.

    diptych train sgt/tiny
    diptych train sgt/tiny --model omnigen2/tiny
    """
    share = ratio / (1 + ratio) if proxy else 0.0
    some = f"#{amount}" if amount else ""
    proxies = {f"shapes/sgt/{proxy}{some}": 0.7 * share, f"emoji/sgt/{proxy}{some}": 0.3 * share} if proxy else {}
    return Recipe(
        name="sgt/tiny",
        precision="auto",
        model=config_to_json("bagel", config("bagel/tiny")),
        init={"model": "bagel/tiny"},
        stages=(
            Stage(
                "sgt",
                steps=steps,
                train={"unified": 5e-4},
                data=proxies | {name: weight * (1 - share) for name, weight in QUESTIONS.items()},
                loss={"text": 1.5, "image": 1.0},
                optimizer=Optimizer("muon"),
                schedule=Schedule(warmup=50, decay=0.4),
                limits=Limits(tokens=4096 if proxy else 896, pictures=192),
                dropout={"text": 0.1} if proxy else {},
                ema=0.99,
            ),
        ),
    )


def bagel() -> Recipe:
    """SGT-BAGEL. ``catalog`` says where "segmentation" (190k SAM pictures, ``read: sgt/segment``) and "questions" are.

    Proxies are read at a long side of 224 pixels and questions at 378 to 980; the average is plain, as its trainer has
    it. The number of steps of the paper is not known; 10,000 of 8 rows is about one epoch. Cost: 8 GPUs of 80 GB.

    diptych train sgt/bagel --catalog my_data.yaml
    """
    published = config("bagel/7b-mot")
    draw = replace(published.draw, over="root")  # as SGT's fork resizes what has too many pixels
    return Recipe(
        name="sgt/bagel",
        model=config_to_json("bagel", replace(published, see=replace(published.see, over="root"), draw=draw)),
        init={"model": "bagel/7b-mot"},
        stages=(
            Stage(
                "sgt",
                steps=10_000,
                train=dict.fromkeys(PARTS, 1e-4),
                data={"segmentation": 2.0, "questions": 1.0},
                loss={"text": 1.5, "image": 1.0},
                optimizer=Optimizer("adamw", eps=1e-15),
                schedule=Schedule(warmup=1000),
                limits=Limits(tokens=16_384, pictures=64),
                dropout={"text": 0.1},
                ema=0.9999,
                ema_warmup=False,
                reading={"segmentation": "proxies", "questions": "benchmarks"},
            ),
        ),
        precision="bf16",
        engine=EngineConfig(shard="full", recompute="full"),
        checkpoint_every=1000,
    )
