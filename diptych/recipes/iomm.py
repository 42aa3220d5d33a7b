"""IOMM (arXiv 2603.16139): a generator on a frozen reader, pre-trained on pictures alone, then tuned on a mix.

Stage 1 and stage 2 share everything but the data: ``image`` is pictures without words, drawn from their own masked
tokens; ``pair`` is pictures with captions; ``mix`` draws a share λ of its samples from the tuning set's pictures
without their text (Section 4.1). Two kinds of stage 1 and three of stage 2 give the paper's six recipes (Table 9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.training.recipe import Limits, Optimizer, Recipe, Schedule, SelfCondition, Stage

Kind = Literal["image", "pair", "mix"]
TRAINED = ("adapter", "connector", "dit")
POOL = {"shapes/draw": 0.6, "emoji64/draw": 0.2, "emoji/scenes": 0.2}  # the embedded ``images``, with their words
CURATED = {"shapes/draw": 0.85, "emoji64/draw": 0.15}
PLACED = {  # told where things are, a small generator binds their colours (NOTES.md)
    "shapes/draw": 0.55,
    "shapes/draw-where": 0.15,
    "shapes/draw-position": 0.15,
    "emoji64/draw": 0.15,
}
TINY_MASK = 0.45
SAME = "Generate an image that is identical to the reference image:"


def reader(steps: int = 4000) -> Recipe:
    """The reader of ``iomm/tiny``: it learns to answer and to describe, and is never trained again.

    diptych train iomm/reader
    """
    return Recipe(
        name="iomm/reader",
        precision="auto",
        model=config_to_json("iomm", config("iomm/tiny")),
        init={"autoencoder": "autoencoder/tiny"},
        stages=(
            Stage(
                "reader",
                steps=steps,
                train={"mllm": 3e-3},
                data={
                    "shapes/ask": 0.22,
                    "shapes/ask-where": 0.25,  # relations are not learned before places are (NOTES.md)
                    "shapes/read": 0.18,  # of a description in words too, as any language model understands
                    "shapes/caption": 0.15,
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
    )


def tiny(
    pretrain: Kind = "image",
    tune: Kind = "mix",
    share: float = 0.5,
    masked: float = TINY_MASK,
    changes: Mapping[str, Any] | None = None,
    tokens: int = 4096,
) -> Recipe:
    """IOMM at a size that one CPU core trains, on the frozen reader of the model that ships. ``share`` is λ;
    ``changes`` are fields of the model's Config, ``tokens`` the budget of a row.

    diptych train iomm/tiny
    diptych train iomm/tiny --data images=FOLDER       # your own pictures, no words needed
    diptych train iomm/tiny --set init.mllm=RUN        # on the reader of a run of iomm/reader
    """
    return Recipe(
        name="iomm/tiny",
        precision="auto",
        model={**config_to_json("iomm", config("iomm/tiny")), **(changes or {})},
        init={"mllm": "iomm/tiny", "autoencoder": "autoencoder/tiny"},
        stages=(
            _tiny_stage(f"{pretrain} pre-training", 2000, pretrain, {"images": 1.0}, POOL, share, masked, tokens),
            _tiny_stage(f"{tune} tuning", 4000, tune, None, PLACED, share, masked, tokens),
        ),
    )


def _tiny_stage(
    name: str,
    steps: int,
    kind: Kind,
    alone: dict[str, float] | None,
    pairs: dict[str, float],
    share: float,
    masked: float,
    tokens: int,
) -> Stage:
    return Stage(
        name,
        steps=steps,
        train=dict.fromkeys(TRAINED, 4e-3),
        data=mixed(kind, alone, pairs, share),
        loss={"image": 1.0, "text": 0.0},
        optimizer=Optimizer("muon"),
        schedule=Schedule(warmup=50, decay=0.4),
        limits=Limits(tokens, pictures=192),
        dropout={"text": 0.1, "image": 0.1},
        ema=0.998,
        self_condition=SelfCondition(masked),
    )


def mixed(kind: Kind, alone: dict[str, float] | None, pairs: dict[str, float], share: float) -> dict[str, float]:
    """The data of a stage: ``pairs``, or their pictures (``alone``, where they have a name of their own), or λ =
    ``share`` of samples from the pictures and the rest from the pairs. Raises ``ValueError`` for a share outside
    [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of pictures without words must lie in [0, 1], not {share}")
    share = {"image": 1.0, "pair": 0.0, "mix": share}[kind]
    pictures = alone or {f"{name}/pictures": weight for name, weight in pairs.items()}
    parts = (pictures, share), (pairs, 1 - share)
    return {name: part * weight / sum(data.values()) for data, part in parts for name, weight in data.items() if part}


# ---- published ------------------------------------------------------------------------------------------------------

# Table 4 and Table 5: optimizer, EMA, mask ratio, batch of stage 1 and of stage 2 at 512 / 1024.
SIZES: dict[str, dict[str, Any]] = {
    "b": {"optimizer": "adamw", "ema": 0.999, "masked": 0.85, "batch": 1024, "tuned": {512: 256, 1024: 96}},
    "l": {"optimizer": "adamw", "ema": None, "masked": 0.85, "batch": 512, "tuned": {512: 256, 1024: 96}},
    "xl": {"optimizer": "muon", "ema": None, "masked": 0.45, "batch": 4096, "tuned": {512: 256}},
}
STEPS = {"b": 107_000, "l": 107_000, "xl": 27_000}  # 11 M pictures: 10 epochs (B), 5 (L); XL's data are not known
FLUX = "ByteDance-Seed/BAGEL-7B-MoT/ae.safetensors"  # FLUX.1's autoencoder, as BAGEL republishes it: 335 MB
PROCESSES = 8  # that the batch sizes below count on


def published(
    size: str, pretrain: Kind = "image", tune: Kind = "mix", resolution: int = 512, start: str | None = None
) -> Recipe:
    """A published size. ``catalog`` says where "images" (11 M pictures; for pair pre-training "captions", the same with
    words) and "pairs" (210 k) are. 10 epochs of the pairs are 8,200 steps of 256. Stage 2 goes on from ``start`` (a run
    of stage 1) where that is given; at 1024 pixels it must, since nothing is pre-trained there (Appendix B.1).

    Raises ``ValueError`` for a resolution that the paper does not tune at, and for 1024 without ``start``."""
    s = SIZES[size]
    if resolution not in s["tuned"]:
        raise ValueError(f"IOMM-{size.upper()} is tuned at {', '.join(map(str, s['tuned']))}, not {resolution}")
    if resolution != 512 and not start:
        raise ValueError(f"there is no pre-training at {resolution} pixels: start=RUN, a run of stage 1 at 512")
    model = config_to_json("iomm", config(f"iomm/{size}")) | {"size": [resolution, resolution]}
    batch = s["tuned"][resolution]
    data = mixed(pretrain, {"images": 1.0}, {"captions": 1.0}, 0.5), mixed(tune, None, {"pairs": 1.0}, 0.5)
    stages = (
        _stage(f"{pretrain} pre-training", STEPS[size], s, s["batch"], data[0], 512),
        _stage(f"{tune} tuning", 2_100_000 // batch, s, batch, data[1], resolution),
    )
    scratch = {"mllm": "transformers:OpenGVLab/InternVL3-2B-hf", "autoencoder": f"transformers:{FLUX}"}
    return Recipe(
        name=f"iomm/{size}",
        model=model,
        init={"model": start} if start else scratch,
        stages=stages[1:] if start else stages,
        precision="bf16",
        checkpoint_every=1000,
    )


def _stage(name: str, steps: int, s: Mapping[str, Any], batch: int, data: dict[str, float], resolution: int) -> Stage:
    rows = batch // PROCESSES  # samples of one process; each is at most a picture to read and one to draw
    together = next(n for n in (16, 12, 8, 4) if rows % n == 0)
    return Stage(
        name,
        steps=steps,
        train=dict.fromkeys(TRAINED, 1e-4),
        data=data,
        loss={"image": 1.0, "text": 0.0},
        optimizer=Optimizer(s["optimizer"], betas=(0.9, 0.95), weight_decay=0.0, clip=1.0),
        schedule=Schedule(warmup=1000),
        limits=Limits(together * (600 + (resolution // 16) ** 2), 2 * together, rows // together, samples=together),
        dropout={"text": 0.1, "image": 0.1},
        ema=s["ema"],
        self_condition=SelfCondition(s["masked"]),
    )


def b() -> Recipe:
    """IOMM-B. Cost: ~1050 H800 hours. Expect GenEval 0.89 after stage 2 (10 epochs of stage 1). Of FLUX.1 only
    ae.safetensors is fetched; a vae/ folder of diffusers does too (--set init.autoencoder=transformers:FOLDER).

    diptych train iomm/b --catalog my_data.yaml
    """
    return published("b")


def b_pair_pair() -> Recipe:
    """IOMM-B of the recipe study (section 4.3): pre-trained and tuned on pairs. Expect GenEval 0.86. ``catalog`` says
    where "captions" (the pictures of pre-training with words) and "pairs" are.

    diptych train iomm/b-pair-pair --catalog my_data.yaml
    """
    return _named("b-pair-pair", published("b", "pair", "pair"))


def b_pair_mix() -> Recipe:
    """IOMM-B of the recipe study: pre-trained on pairs, tuned on a mix of pairs and pictures.

    diptych train iomm/b-pair-mix --catalog my_data.yaml
    """
    return _named("b-pair-mix", published("b", "pair", "mix"))


def b_pair_image() -> Recipe:
    """IOMM-B of the recipe study: pre-trained on pairs, tuned on pictures. Expect GenEval 0.78.

    diptych train iomm/b-pair-image --catalog my_data.yaml
    """
    return _named("b-pair-image", published("b", "pair", "image"))


def b_image_pair() -> Recipe:
    """IOMM-B of the recipe study: pre-trained on pictures, tuned on pairs.

    diptych train iomm/b-image-pair --catalog my_data.yaml
    """
    return _named("b-image-pair", published("b", "image", "pair"))


def b_image_image() -> Recipe:
    """IOMM-B of the recipe study: pre-trained and tuned on pictures alone. iomm/b is the sixth, tuned on the mix.

    diptych train iomm/b-image-image --catalog my_data.yaml
    """
    return _named("b-image-image", published("b", "image", "image"))


def b_1024() -> Recipe:
    """IOMM-B tuned at 1024 pixels; goes on from runs/iomm-b, a run of iomm/b at 512.

    diptych train iomm/b-1024 --catalog my_data.yaml
    """
    return _named("b-1024", published("b", resolution=1024, start="runs/iomm-b"))


def l_1024() -> Recipe:
    """IOMM-L tuned at 1024 pixels; goes on from runs/iomm-l, a run of iomm/l at 512.

    diptych train iomm/l-1024 --catalog my_data.yaml
    """
    return _named("l-1024", published("l", resolution=1024, start="runs/iomm-l"))


def _named(name: str, recipe: Recipe) -> Recipe:
    return replace(recipe, name=f"iomm/{name}")


def l() -> Recipe:  # noqa: E743  the paper's name
    """IOMM-L. Expect GenEval 0.87.

    diptych train iomm/l --catalog my_data.yaml
    """
    return published("l")


def xl() -> Recipe:
    """IOMM-XL, of which the paper shows ablations only; its data and steps are not known.

    diptych train iomm/xl --catalog my_data.yaml
    """
    return published("xl")


# ---- mixed tuning of other families (Appendix B.3, Table 6) ---------------------------------------------------------


def tuning(kind: Kind = "mix", share: float = 0.5, masked: float = 0.85, steps: int = 600, rank: int = 0) -> Recipe:
    """Mixed tuning of another family: pairs, and masked pictures without words, on the parts that draw. BAGEL and
    SynerGen-VL read as before with all of their other weights; Cheers reads with what it draws with. ``rank``: LoRA on
    the blocks of these parts.

    diptych train iomm/tuning
    diptych train iomm/tuning --model cheers/tiny --steps 300
    diptych train iomm/tuning --set lora.generation=64
    """
    return Recipe(
        name="iomm/tuning",
        precision="auto",
        model=config_to_json("bagel", config("bagel/tiny")),
        init={"model": "bagel/tiny"},
        stages=(
            Stage(
                f"{kind} tuning",
                steps=steps,
                train={"generation": 5e-4},
                data=mixed(kind, None, CURATED, share),
                loss={"text": 1.0, "image": 1.0},
                optimizer=Optimizer("muon"),
                schedule=Schedule(warmup=50, decay=0.4),
                limits=Limits(tokens=4096, pictures=192),
                dropout={"text": 0.1},
                ema=0.99,
                self_condition=SelfCondition(masked, SAME),
            ),
        ),
        lora={"generation": rank} if rank else {},
    )


def bagel(kind: Kind = "mix") -> Recipe:
    """Mixed tuning of BAGEL-7B-MoT with the settings of Table 6 (OpenUni-L, full): 12 epochs of 210 k pairs, 256 a
    step. ``catalog`` says where "pairs" is. Cost: 8 GPUs of 80 GB.

    diptych train iomm/bagel --catalog my_data.yaml
    """
    return _table_6("iomm/bagel", kind, 12 * 210_000 // 256, Limits(16_384, pictures=8, accumulate=8), 0.999)


def bagel_lora(kind: Kind = "mix") -> Recipe:
    """The other column of Table 6 (Qwen-Image) on BAGEL-7B-MoT: LoRA of rank 64, 5 epochs, 48 a step, no average.

    diptych train iomm/bagel-lora --catalog my_data.yaml
    """
    limits = Limits(12_288, pictures=6, accumulate=2)
    recipe = _table_6("iomm/bagel-lora", kind, 5 * 210_000 // 48, limits, None)
    return replace(recipe, lora={"generation": 64})


def _table_6(name: str, kind: Kind, steps: int, limits: Limits, ema: float | None) -> Recipe:
    """A sample is at most 4,096 tokens; ``limits`` count on ``PROCESSES``."""
    return Recipe(
        name=name,
        model=config_to_json("bagel", config("bagel/7b-mot")),
        init={"model": "bagel/7b-mot"},
        stages=(
            Stage(
                f"{kind} tuning",
                steps=steps,
                train={"generation": 1e-4},
                data=mixed(kind, None, {"pairs": 1.0}, 0.5),
                loss={"text": 1.0, "image": 1.0},
                optimizer=Optimizer("adamw", betas=(0.9, 0.95), weight_decay=0.0, clip=1.0),
                schedule=Schedule(warmup=1000),
                limits=limits,
                dropout={"text": 0.1},
                ema=ema,
                self_condition=SelfCondition(0.85, SAME),
            ),
        ),
        precision="bf16",
        checkpoint_every=1000,
    )
