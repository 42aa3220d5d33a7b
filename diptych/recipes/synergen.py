"""SynerGen-VL (arXiv 2412.09604): a picture tokenizer, then stages that leave the language path alone.

Loss = CE of answers + 2 CE of picture codes, each a mean; pictures to read and to draw 1 : 1 by samples; one request to
draw in ten is read without its text (Sections 3.2 and 4.1). The tokenizer's codes can be made once:
``diptych data precompute synergen/stage1 --catalog my_data.yaml --out codes``, then ``diptych train`` with
``--encoded codes``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.recipes import tiny as tiny_recipes
from diptych.training.recipe import Limits, Optimizer, Recipe, Schedule, Stage

VISUAL = ("decoder.vision", "vision", "projector", "head", "special")  # stage 1: the language path stays bit for bit
ALIGNED = (*VISUAL, "decoder.attention")  # stage 2
EVERYTHING = ("decoder", "vision", "projector", "head", "special")
LOSS = {"text": 1.0, "image": 2.0}
PROMPTS = {  # of stage 1 (appendix A)
    "captions": "Provide a one-sentence caption for the image",
    "drawings": "Generate an image of: {}",
}


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
    """SynerGen-VL at a size that two CPU cores train: 4.8 M parameters, 64 x 64 pixels, 256 codes in 16 tokens a
    picture, on the pictures, questions and edits of bagel/tiny and on captions that tell where things are, from which
    it learns to bind their colours. Like the published one it begins with a language model, here that of ``bagel/tiny``
    (experts with what that draws with), which it then trains on: all parts at once.

    diptych train synergen/tiny --steps 2000
    """
    recipe = tiny_recipes.bagel()
    data = tiny_recipes.MIX | {"shapes/draw": 0.40, "shapes/draw-where": 0.15}
    stage = replace(recipe.stages[0], train=dict.fromkeys(EVERYTHING, 2e-3), loss=LOSS, data=data)
    return replace(
        recipe,
        name="synergen/tiny",
        model=config_to_json("synergen", config("synergen/tiny")),
        init={"decoder": "bagel/tiny", "autoencoder": "autoencoder/vq-tiny"},
        stages=(stage,),
    )


def stage1() -> Recipe:
    """SynerGen-VL's first stage (table 8): concepts and pixels, from noisy pairs, asked for as "Provide a one-sentence
    caption for the image" and "Generate an image of: CAPTION" (the stage's ``prompts``: rows hold bare captions).
    ``catalog`` says where "captions" (pictures to describe)
    and "drawings" (pictures to draw) are; model.autoencoder.folder where Emu3's tokenizer is, unless codes were made
    before. The base is transformers:internlm/internlm2-1_8b.
    667 M samples of each task; 64 GPUs, 18 rows each a step.

    diptych train synergen/stage1 --catalog my_data.yaml --out runs/synergen-stage1
    """
    return _published("stage1", 1, VISUAL, 95_000, 1e-4, "constant", 0.05, Limits(4096, 24, 18), {})


def stage2() -> Recipe:
    """SynerGen-VL's second stage (table 8): alignment, from clean data at up to 6 tiles; attention is trained too. Goes
    on from runs/synergen-stage1.

    diptych train synergen/stage2 --catalog my_data.yaml --out runs/synergen-stage2
    """
    init = {"model": "runs/synergen-stage1"}
    return _published("stage2", 6, ALIGNED, 35_000, 5e-5, "cosine", 0.05, Limits(8192, 48, 18), init)


def tune() -> Recipe:
    """SynerGen-VL's instruction tuning (table 8): everything, at up to 12 tiles. Goes on from runs/synergen-stage2.

    diptych train synergen/tune --catalog my_data.yaml --out runs/synergen-tune
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
        init=init or {"decoder": "transformers:internlm/internlm2-1_8b"},
        stages=(
            Stage(
                name,
                steps=steps,
                train=dict.fromkeys(parts, rate),
                data={"captions": 1.0, "drawings": 1.0},
                prompts=dict(PROMPTS) if name == "stage1" else {},
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


def qwen2() -> Recipe:
    """The ablation of SynerGen-VL's stages (table 7), progressive: Qwen2-0.5B-Instruct, 256 pixels, stage 1 and then
    stage 2 on a sixth of the samples. ``catalog`` says where "captions" and "drawings" are; model.autoencoder.folder
    where Emu3's tokenizer is, unless codes were made before.

    diptych train synergen/qwen2-0.5b --catalog my_data.yaml
    """
    return _ablation("qwen2-0.5b", (1, 2))


def qwen2_full() -> Recipe:
    """The same with everything trained in both stages: the paper's full tuning.

    diptych train synergen/qwen2-0.5b-full --catalog my_data.yaml
    """
    return _ablation("qwen2-0.5b-full", (1, 2), full=True)


def qwen2_stage1() -> Recipe:
    """The same, stage 1 alone: words are as the base had them.

    diptych train synergen/qwen2-0.5b-s1 --catalog my_data.yaml
    """
    return _ablation("qwen2-0.5b-s1", (1,))


def qwen2_stage2() -> Recipe:
    """The same, stage 2 alone.

    diptych train synergen/qwen2-0.5b-s2 --catalog my_data.yaml
    """
    return _ablation("qwen2-0.5b-s2", (2,))


def qwen2_folded() -> Recipe:
    """The ablation of folding (table 6): Qwen2-0.5B-Instruct reads up to 12 tiles of 256 pixels, folded 2 x 4, on data
    of stage 2; synergen/qwen2-0.5b-s2 is its arm without folding.

    diptych train synergen/qwen2-0.5b-folded --catalog my_data.yaml
    """
    recipe = _ablation("qwen2-0.5b-folded", (2,))
    model = config("synergen/qwen2-0.5b")
    model = replace(model, fold=(2, 4), see=replace(model.see, most=12, thumbnail=True))
    return replace(recipe, model=config_to_json("synergen", model))


def _ablation(name: str, numbers: tuple[int, ...], full: bool = False) -> Recipe:
    """Stages of table 8 on a sixth of the samples of each, over Qwen2-0.5B-Instruct."""
    published = {1: stage1().stages[0], 2: stage2().stages[0]}
    stages = []
    for number in numbers:
        stage = published[number]
        rate = next(iter(stage.train.values()))
        train = dict.fromkeys(EVERYTHING, rate) if full else stage.train
        stages.append(replace(stage, steps=stage.steps // 6, train=train))
    return Recipe(
        name=f"synergen/{name}",
        model=config_to_json("synergen", config("synergen/qwen2-0.5b")),
        init={"decoder": "transformers:Qwen/Qwen2-0.5B-Instruct"},
        stages=tuple(stages),
        precision="bf16",
        checkpoint_every=1000,
    )


# ---- miniatures ---------------------------------------------------------------------------------------------------

READERS = {  # pixels of a side, most tiles, fold: the arms of table 6
    "24 px 1x1": (24, 1, (1, 1)),  # 36 tokens
    "64 px 2x4": (64, 1, (2, 4)),  # 32 tokens
    "24 px 1x2": (24, 1, (1, 2)),  # 18 tokens
    "tiles 2x4": (32, 4, (2, 4)),  # 4 tiles and a thumbnail of 32 px: 40 tokens
}
UNFOLDED = {  # the upper bound, and what it costs
    "64 px 2x4": (64, 1, (2, 4)),
    "64 px 1x1": (64, 1, (1, 1)),  # 256 tokens
}
# the arms of table 7, and one for figure 4: pictures that are read carry the picture loss too
ARMS: dict[str, dict[str, Any]] = {
    "S1+S2 full": {"full": True},
    "S1": {"stages": (1,)},
    "S2": {"stages": (2,)},
    "S1+S2": {},
    "S1+S2 both": {"image_loss_on_und": True},
}


def _small(layers: int, side: int, ratio: tuple[int, int], experts: bool = True, **more: Any) -> dict[str, Any]:
    """A SynerGen-VL of width 96 over the tiny tokenizer's codes."""
    tiny_size = config("synergen/tiny")
    routes: dict[str, Any] = {"routes": 2, "routed": ("mlp",)} if experts else {"routes": 1, "routed": ()}
    decoder = replace(
        tiny_size.decoder,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        qk_norm=False,
        qkv_bias=False,
        **routes,
    )
    head = replace(tiny_size.head, hidden_size=96, num_attention_heads=4, qk_norm=False, qkv_bias=False)
    model = replace(
        tiny_size,
        decoder=decoder,
        head=head,
        fold=ratio,
        embed_size=32,
        grid=(side // 4, side // 4),
        see=replace(tiny_size.see, side=side, **more.pop("tiles", {})),
        size=(side, side),
        draw=replace(tiny_size.draw, longest=side, shortest=side, stride=side),
        **more,
    )
    return config_to_json("synergen", model)


def reader(steps: int, side: int, tiles: int, ratio: tuple[int, int]) -> Recipe:
    """One arm of table 6: reads numbers and shapes on pictures of 64 pixels, seen at ``side``, in up to ``tiles``."""
    more: dict[str, Any] = {"tiles": {"most": tiles, "thumbnail": tiles > 1}}
    stage = Stage(
        "read",
        steps=steps,
        train=dict.fromkeys(("decoder", "vision", "projector", "special"), 2e-3),
        data={"glyphs/number": 0.77, "glyphs/shape": 0.23},
        loss=LOSS,
        optimizer=Optimizer("adamw"),
        schedule=Schedule("cosine", warmup=50),
        limits=Limits(tokens=100_000, pictures=52),
    )
    return Recipe(
        "synergen/reader",
        _small(3, side, ratio, **more),
        (stage,),
        init={"autoencoder": "autoencoder/vq-tiny"},
        checkpoint_every=steps,
    )


def words() -> Recipe:
    """The language model of the miniature of table 7: facts, sums and reversals, no pictures."""
    stage = Stage(
        "words",
        steps=1000,
        train={"decoder": 3e-3},
        data={"words/fact": 0.5, "words/sum": 0.2, "words/reverse": 0.3},
        loss=LOSS,
        optimizer=Optimizer("adamw"),
        schedule=Schedule("cosine", warmup=50),
        limits=Limits(tokens=1536),
    )
    return Recipe(
        "synergen/words",
        _small(6, 32, (1, 1), experts=False),
        (stage,),
        init={"autoencoder": "autoencoder/vq-tiny"},
        size=32,
        checkpoint_every=1000,
    )


def miniature(
    steps: int, stages: tuple[int, ...] = (1, 2), full: bool = False, image_loss_on_und: bool = False
) -> Recipe:
    """One arm of table 7 on a small language model (of ``words``; the study fills it in): stage 1 from noisy pairs,
    stage 2 from clean ones, half of the steps each; 24 pictures to read and 24 to draw a step. ``full`` trains
    everything, without vision experts, which the paper leaves open."""
    model = _small(6, 32, (1, 1), experts=not full, image_loss_on_und=image_loss_on_und)
    plan = {
        1: (VISUAL, 2e-3, {"glyphs/say/noisy": 1.0, "glyphs/draw/noisy": 1.0}),
        2: (ALIGNED, 1e-3, {"glyphs/say": 1.0, "glyphs/draw": 1.0}),
    }
    return Recipe(
        "synergen/miniature",
        model,
        tuple(
            Stage(
                f"S{n}",
                steps=steps // 2,
                train=dict.fromkeys(EVERYTHING if full else parts, rate),
                data=data,
                loss=LOSS,
                optimizer=Optimizer("adamw"),
                schedule=Schedule("constant" if n == 1 else "cosine", warmup=20),
                limits=Limits(tokens=100_000, pictures=48),
                dropout={"text": 0.1},
            )
            for n, (parts, rate, data) in plan.items()
            if n in stages
        ),
        init={"autoencoder": "autoencoder/vq-tiny"},
        size=32,
        checkpoint_every=steps,
    )
