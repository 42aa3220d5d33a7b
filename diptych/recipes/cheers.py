"""Cheers (arXiv 2603.12793): the paper's four stages, and the same model where two CPU cores train it.

Loss = cross-entropy + flow matching. AdamW without weight decay, gradients clipped at 1, 2 % warm-up; the text is
blanked in one drawing out of five. The paper mentions no weight average; the tiny recipe uses one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.recipes.tiny import MIX
from diptych.training.recipe import Limits, Optimizer, Recipe, Schedule, Stage

ALL = ("decoder", "vision", "pixels", "projector", "head")
TINY = {
    "decoder": "bagel/tiny",
    "autoencoder": "autoencoder/tiny",
    "pixel_decoder.decoder": "autoencoder/tiny#autoencoder.decoder",
    "pixel_decoder.bn": "autoencoder/tiny#autoencoder.bn",
}


def tiny(tokens: int = 2048, **changes: Any) -> Recipe:
    """Cheers at a size that two CPU cores train: 5.9 M parameters, 64 x 64 pixels, 16 tokens a picture. ``tokens`` are
    those of a row, ``changes`` fields of its Config.

    Like the published one it begins with a language model, here that of ``bagel/tiny``. The pixel decoder stays what it
    began as, the autoencoder's own: training it makes a row 1.2 to 1.5 times dearer.

    diptych train cheers/tiny
    """
    model = replace(config("cheers/tiny"), **changes)
    return Recipe(
        name="cheers/tiny",
        precision="auto",
        model=config_to_json("cheers", model),
        init={module: source for module, source in TINY.items() if model.pixels or "pixel" not in module},
        stages=(
            Stage(
                "unified",
                steps=6000,
                train={"decoder": 2e-3, "vision": 2e-3, "projector": 2e-3, "head": 2e-3},
                data=dict(MIX),
                loss={"text": 0.5, "image": 1.0},
                optimizer=Optimizer("muon"),
                schedule=Schedule(warmup=60, decay=0.4),
                limits=Limits(tokens=tokens, pictures=tokens // 21),
                dropout={"text": 0.1},
                ema=0.998,
            ),
        ),
        checkpoint_every=500,
    )


def b1_5() -> Recipe:
    """Cheers. ``catalog`` says where the mixes of the paper are. Cost: 128 A100 (the last stage: 8 for two days).

    A batch of 512 is 8 pictures on each of 64 processes, or the same with ``accumulate``. Shares are of samples.
    Qwen2.5 and SigLIP2 come from the hub; FLUX.2's ae.safetensors is looked for here (--set init.autoencoder=...).

    diptych train cheers/1.5b --catalog my_data.yaml
    """

    def stage(
        name: str, steps: int, rate: float, parts: tuple[str, ...], data: dict[str, float], **options: Any
    ) -> Stage:
        settings: dict[str, Any] = {"schedule": Schedule(warmup=steps // 50), "limits": Limits(tokens=8192, pictures=8)}
        return Stage(
            name,
            steps=steps,
            train=dict.fromkeys(parts, rate),
            data=data,
            loss={"text": 1.0, "image": 1.0},
            optimizer=Optimizer("adamw", betas=(0.9, 0.95), eps=1e-8),
            dropout={"text": 0.2},
            **settings | options,
        )

    return Recipe(
        name="cheers/1.5b",
        model=config_to_json("cheers", replace(config("cheers/1.5b"), published_quirks=())),
        init={
            "decoder": "transformers:Qwen/Qwen2.5-1.5B-Instruct",
            "vision": "transformers:google/siglip2-so400m-patch16-512",
            "autoencoder": "transformers:ae.safetensors",
            "pixel_decoder": "transformers:ae.safetensors",
        },
        stages=(
            stage("alignment", 30_000, 1e-4, ("projector", "head"), {"captions": 4.5, "recaptioned-imagenet": 13.0}),
            stage("general", 60_000, 1e-4, ALL, {"understanding": 3.0, "generation": 6.0, "text": 1.0}),
            stage("refined", 65_000, 4e-5, ALL, {"instructions": 3.0, "composed-pictures": 6.0, "reasoning": 1.0}),
            stage(
                "sft",
                30_000,
                2e-5,
                ALL,
                {"sft-understanding": 1.0, "sft-generation": 1.0},
                schedule=Schedule("cosine", warmup=600),
                limits=Limits(tokens=4096, pictures=2),
            ),
        ),
        precision="bf16",
        checkpoint_every=1000,
    )


def without_pixels() -> dict[str, Any]:
    """The changes that make the tiny vision encoder read latents, as many tokens as it has of pixels."""
    vision = config("cheers/tiny").vision
    return {"pixels": False, "vision": replace(vision, patch_size=1, image_size=vision.side)}
