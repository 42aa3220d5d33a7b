"""Post-training from rewards (docs/rewards.md): a recipe for every family and for words, picture codes and flows."""

from __future__ import annotations

from dataclasses import replace

from diptych.models import store
from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.training.recipe import EngineConfig, Limits, Optimizer, Recipe, Reward, Stage

DRAWING = Reward(  # rollouts without guidance cost half; with the reference, drawing with guidance gets better, too
    rewards={"shapes": 1.0},
    group=12,
    asks=10,
    sampling={"guidance_scale": 1.0, "num_inference_steps": 12},
    reference={"image": 1.0},
    follow=(0, 0.001, 0.5),
    dev={"shapes/dev": 1.0},
    dev_asks=144,
)


def _tiny(name: str, model: str, how: Reward, train: dict[str, float], steps: int, data: dict[str, float]) -> Recipe:
    stage = Stage(
        "reward",
        steps=steps,
        train=train,
        data=data,
        loss={"text": 1.0, "image": 1.0},
        optimizer=Optimizer("adamw", betas=(0.9, 0.999)),
        limits=Limits(tokens=4096, pictures=192),
        reward=how,
    )
    return Recipe(name, store.read_config(model), (stage,), init={"model": model}, checkpoint_every=25)


def bagel_tiny() -> Recipe:
    """The shipped BAGEL learns to draw what is asked for, from verdicts of the shapes world, in minutes of one core.

    diptych train bagel/tiny-reward
    """
    return _tiny("bagel/tiny-reward", "bagel/tiny", DRAWING, {"generation": 2e-4}, 50, {"shapes/reward": 1.0})


def cheers_tiny() -> Recipe:
    """The shipped Cheers, as ``bagel/tiny-reward``. Its one decoder reads, too, so questions belong to what is scored.

    diptych train cheers/tiny-reward
    """
    rates = {"decoder": 5e-5, "head": 2e-4}
    return _tiny("cheers/tiny-reward", "cheers/tiny", DRAWING, rates, 50, {"shapes/reward": 1.0})


def iomm_tiny() -> Recipe:
    """The shipped IOMM, as ``bagel/tiny-reward``.

    diptych train iomm/tiny-reward
    """
    return _tiny("iomm/tiny-reward", "iomm/tiny", DRAWING, {"generation": 2e-4}, 50, {"shapes/reward": 1.0})


def omnigen2_tiny() -> Recipe:
    """OmniGen2, as ``bagel/tiny-reward``. No checkpoint ships: train omnigen2/tiny first, or name a run with --model.

    diptych train omnigen2/tiny-reward --model runs/omnigen2-tiny
    """
    made = _tiny("omnigen2/tiny-reward", "bagel/tiny", DRAWING, {"dit": 2e-4}, 50, {"shapes/reward": 1.0})
    model = config_to_json("omnigen2", config("omnigen2/tiny"))
    return replace(made, model=model, init={"model": "runs/omnigen2-tiny"})


def synergen_tiny() -> Recipe:
    """The shipped SynerGen-VL: token GRPO over picture codes, rolled out without guidance at temperature 1.

    diptych train synergen/tiny-reward
    """
    how = replace(
        DRAWING,
        sampling={"guidance_scale": 1.0, "temperature": 1.0},
        reference={"image": 0.003},
        follow=(0, 0.0, 0.0),
        std="group",
        draws=1,
    )
    return _tiny("synergen/tiny-reward", "synergen/tiny", how, {"generation": 4e-4}, 50, {"shapes/reward": 1.0})


def bagel_answers() -> Recipe:
    """The shipped BAGEL answers questions about pictures: token GRPO over words.

    diptych train bagel/tiny-answers
    """
    how = Reward(
        rewards={"answer": 1.0},
        group=8,
        asks=16,
        max_new_tokens=16,
        draws=1,
        std="group",
        reference={"text": 0.02},
        dev={"shapes/ask": 1.0},
    )
    return _tiny("bagel/tiny-answers", "bagel/tiny", how, {"decoder.text": 1e-5}, 50, {"shapes/ask-where": 1.0})


def bagel_lora() -> Recipe:
    """BAGEL-7B-MoT on one GPU of 80 GB: adapters of rank 64 on the experts that draw, over frozen bf16 weights. Prompts
    come from a catalog; the reward is a judge's.

    diptych train bagel/reward-lora --catalog prompts.yaml
    """
    how = Reward(
        rewards={"judge:qwen2.5-vl@http://localhost:8000/v1": 1.0},
        group=16,
        asks=24,
        sampling={"guidance_scale": 1.0, "num_inference_steps": 14},
        draws=4,
        reference={"image": 1.0},
        follow=(0, 0.001, 0.5),
    )
    stage = Stage(
        "reward",
        steps=500,
        train={"decoder.image": 3e-4},
        data={"prompts": 1.0},
        loss={"text": 1.0, "image": 1.0},
        optimizer=Optimizer("adamw", betas=(0.9, 0.999), weight_decay=1e-4),
        limits=Limits(tokens=17_000, pictures=16),
        reward=how,
    )
    return Recipe(
        "bagel/reward-lora",
        config_to_json("bagel", config("bagel/7b-mot")),
        (stage,),
        init={"model": "bagel/7b-mot"},
        precision="bf16",
        engine=EngineConfig(recompute="full", frozen="bf16"),
        lora={"decoder.image": 64},
        checkpoint_every=25,
    )
