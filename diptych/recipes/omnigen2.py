"""OmniGen2 (arXiv 2506.18871): a tiny one from scratch, fine-tuning as its trainer does it, and SGT
(arXiv 2605.18714) on it.

The published option files fix the optimizer, the dropout and the batch; the paper's own data and stages are not in the
published code.
"""

from __future__ import annotations

from dataclasses import replace

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.training.recipe import EngineConfig, Limits, Optimizer, Recipe, Schedule, Stage

DRAW = {  # pictures from words, edits of a reference, and two references in one picture
    "shapes/draw": 0.40,
    "shapes/draw-where": 0.18,
    "shapes/draw-position": 0.14,
    "emoji64/draw": 0.02,
    "shapes/edit": 0.12,
    "emoji64/edit": 0.04,
    "emoji64/compose": 0.10,
}
DROPOUT = {"text": 1e-4, "image|text": 0.5}  # of the published option files: references go only where the words go
OPTIMIZER = Optimizer("adamw", betas=(0.9, 0.95), weight_decay=0.01, clip=1.0)


def tiny(steps: int = 12_000) -> Recipe:
    """OmniGen2 at a size that one CPU core trains. The reader is that of ``iomm/tiny``; it is frozen, like the released
    one. Edits and compositions cannot be drawn from words alone, so the references are learned. Words are dropped from
    one request in ten, and half of those lose their references too.

    A drawing takes 11 ms of one core and a step has 66, so 12,000 steps take about two and a half hours. So many have
    not been run yet (NOTES.md).

    diptych train omnigen2/tiny --steps 2000
    diptych train omnigen2/tiny --minutes 120
    """
    return Recipe(
        name="omnigen2/tiny",
        precision="auto",
        model=config_to_json("omnigen2", config("omnigen2/tiny")),
        init={"mllm": "iomm/tiny", "autoencoder": "autoencoder/tiny"},
        stages=(
            Stage(
                "drawing",
                steps=steps,
                train={"dit": 4e-3},
                data=dict(DRAW),
                loss={"text": 0.0, "image": 1.0},
                optimizer=Optimizer("muon"),
                schedule=Schedule(warmup=50, decay=0.4),
                limits=Limits(tokens=2048, pictures=192),
                dropout={"text": 0.1, "image|text": 0.5},
                ema=0.998,
            ),
        ),
        checkpoint_every=250,
    )


def tune() -> Recipe:
    """Fine-tuning of the diffusion transformer with the settings of the published ``ft.yml``: 16 pairs a step on 8
    processes. ``catalog`` says where "pairs" is: OmniGen2's jsonl after ``diptych data convert omnigen2``.

    diptych train omnigen2/tune --catalog my_data.yaml
    """
    return Recipe(
        name="omnigen2/tune",
        model=config_to_json("omnigen2", config("omnigen2/3b-4b")),
        init={"model": "omnigen2/3b-4b"},
        stages=(
            Stage(
                "tuning",
                steps=4000,
                train={"dit": 8e-7},
                data={"pairs": 1.0},
                loss={"text": 0.0, "image": 1.0},
                optimizer=OPTIMIZER,
                schedule=Schedule(warmup=500),
                limits=Limits(tokens=18_432, pictures=8),
                dropout=dict(DROPOUT),
            ),
        ),
        precision="bf16",
        engine=EngineConfig(shard="full", recompute="full"),
        checkpoint_every=1000,
    )


def tune_lora() -> Recipe:
    """The published ``ft_lora.yml``: adapters of rank 8 on the attention of every block of the diffusion transformer.
    The run leaves them in ``release/pytorch_lora_weights.safetensors`` too, which the published pipeline loads.

    diptych train omnigen2/tune-lora --catalog my_data.yaml
    """
    whole = tune()
    stage = replace(whole.stages[0], train={"dit.attention": 8e-7})
    return replace(whole, name="omnigen2/tune-lora", stages=(stage,), lora={"dit.attention": 8})


def sgt() -> Recipe:
    """SGT on OmniGen2: reader and diffusion transformer learn to draw the segmentation of a photo that the reader alone
    sees, two such drawings to one question. ``catalog`` says where "segmentation" (``read: sgt/segment``) and
    "questions" are. Both losses are means over what a step supervises, weighted 1 : 1. The published run begins with
    Qwen's own reader: ``--set init.mllm=transformers:Qwen/Qwen2.5-VL-3B-Instruct`` does too. Cost: 8 GPUs of 80 GB.

    diptych train sgt/omnigen2 --catalog my_data.yaml
    """
    return Recipe(
        name="sgt/omnigen2",
        model=config_to_json("omnigen2", config("omnigen2/3b-4b")),
        init={"model": "omnigen2/3b-4b"},
        stages=(
            Stage(
                "sgt",
                steps=5000,
                train={"mllm": 5e-6, "dit": 5e-6},
                data={"segmentation": 2.0, "questions": 1.0},
                loss={"text": 1.0, "image": 1.0},
                optimizer=OPTIMIZER,
                schedule=Schedule(warmup=300),
                limits=Limits(tokens=16_384, pictures=64),
            ),
        ),
        precision="bf16",
        engine=EngineConfig(shard="full", recompute="full"),
        checkpoint_every=1000,
    )


def sgt_published() -> Recipe:
    """``sgt/omnigen2`` with the weights that the published trainer's accumulation gives: it adds the flow losses of 20
    micro-batches and divides the cross-entropy of 10 by 30, so an update follows 20 flow + 1/3 cross-entropy, 60 : 1
    between the two means.

    diptych train sgt/omnigen2-published --catalog my_data.yaml
    """
    balanced = sgt()
    stage = replace(balanced.stages[0], loss={"text": 1 / 3, "image": 20.0})
    return replace(balanced, name="sgt/omnigen2-published", stages=(stage,))
