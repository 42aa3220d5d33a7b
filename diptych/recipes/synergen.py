"""SynerGen-VL (arXiv 2412.09604): a picture tokenizer, then stages that leave the language path alone.

Loss = CE of answers + 2 CE of picture codes, each a mean; pictures to read and to draw 1 : 1 by samples; one request to
draw in ten is read without its words (specs: SynerGen-VL 3). The tokenizer's codes can be made once:
``diptych data precompute synergen/stage1 --catalog my_data.yaml --out codes``, then ``diptych train`` with
``--encoded codes``.
"""

from __future__ import annotations

from dataclasses import replace

from diptych.models import config, config_to_json
from diptych.recipes import tiny as tiny_recipes
from diptych.train.recipe import Limits, Optimizer, Recipe, Schedule, Stage

VISUAL = ("decoder.vision", "vision", "projector", "head", "special")  # stage 1: the language path stays bit for bit
ALIGNED = (*VISUAL, "decoder.attention")  # stage 2
EVERYTHING = ("decoder", "vision", "projector", "head", "special")
LOSS = {"text": 1.0, "image": 2.0}


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


def tiny() -> Recipe:
    """SynerGen-VL at a size that two CPU cores train: 5.7 M parameters, 64 x 64 pixels, 256 codes in 16 tokens a
    picture, on the pictures, questions and edits of bagel/tiny. All parts at once: there is no base to protect.

    diptych train synergen/tiny --steps 2000
    """
    recipe = tiny_recipes.bagel()
    stage = replace(recipe.stages[0], train=dict.fromkeys(EVERYTHING, 2e-3), loss=LOSS)
    return replace(
        recipe,
        name="synergen/tiny",
        model=config_to_json("synergen", config("synergen/tiny")),
        init={"autoencoder": "autoencoder/vq-tiny"},
        stages=(stage,),
    )


def stage1() -> Recipe:
    """SynerGen-VL's first stage (table 8): concepts and pixels, from noisy pairs. ``catalog`` says where "captions"
    (pictures to describe) and "drawings" (pictures to draw) are; model.autoencoder.folder where Emu3's tokenizer is,
    unless codes were made before. The base is internlm/internlm2-1_8b, with a tokenizer.json beside its weights.
    667 M samples of each task; 64 GPUs, 18 rows each a step.

    diptych train synergen/stage1 --catalog my_data.yaml --run runs/synergen-stage1
    """
    return _published("stage1", 1, VISUAL, 95_000, 1e-4, "constant", 0.05, Limits(4096, 24, 18), {})


def stage2() -> Recipe:
    """SynerGen-VL's second stage (table 8): alignment, from clean data at up to 6 tiles; attention is trained too. Goes
    on from runs/synergen-stage1.

    diptych train synergen/stage2 --catalog my_data.yaml --run runs/synergen-stage2
    """
    init = {"model": "runs/synergen-stage1"}
    return _published("stage2", 6, ALIGNED, 35_000, 5e-5, "cosine", 0.05, Limits(8192, 48, 18), init)


def tune() -> Recipe:
    """SynerGen-VL's instruction tuning (table 8): everything, at up to 12 tiles. Goes on from runs/synergen-stage2.

    diptych train synergen/tune --catalog my_data.yaml --run runs/synergen-tune
    """
    init = {"model": "runs/synergen-stage2"}
    return _published("tune", 12, EVERYTHING, 12_000, 5e-5, "cosine", 0.01, Limits(16_384, 96, 10), init)


def _published(
    name: str, tiles: int, parts: tuple, steps: int, rate: float, shape: str, decay: float, limits: Limits, init: dict
) -> Recipe:
    model = config("synergen/2b")
    model = replace(model, see=replace(model.see, most=tiles, thumbnail=tiles > 1))
    return Recipe(
        name=f"synergen/{name}",
        model=config_to_json("synergen", model),
        init=init or {"decoder": "internlm/internlm2-1_8b"},
        stages=(
            Stage(
                name,
                steps=steps,
                train=dict.fromkeys(parts, rate),
                data={"captions": 1.0, "drawings": 1.0},
                loss=LOSS,
                optimizer=Optimizer("adamw", weight_decay=decay),
                schedule=Schedule(shape, warmup=200),  # type: ignore[arg-type]
                limits=limits,
                dropout={"text": 0.1},
            ),
        ),
        precision="bf16",
        checkpoint_every=1000,
    )
