"""Every family on one GPU of 24 GB and of 80 GB.

Memory is what ``diptych plan`` counts for rows of nothing but the largest pictures (``benchmarks/presets.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diptych.models.configs import config_to_json
from diptych.models.table import config
from diptych.recipes import cheers, iomm, omnigen2, sgt, synergen
from diptych.training.recipe import EngineConfig, Limits, Recipe


def _on_one(
    whole: Recipe,
    name: str,
    rates: Mapping[str, float] | None,
    limits: Limits,
    rank: int = 0,
    frozen: str = "bf16",
    adapted: str = "decoder",
    ema: bool = False,
) -> Recipe:
    """The last stage of a published recipe on one GPU: ``rates`` in place of what it trains, adapters of ``rank`` on
    the part ``adapted``."""
    stage = whole.stages[-1]
    stage = replace(stage, train=dict(rates or stage.train), limits=limits, ema=stage.ema if ema else None)
    engine = EngineConfig(recompute="full", frozen=frozen)  # type: ignore[arg-type]
    return replace(whole, name=name, stages=(stage,), lora={adapted: rank} if rank else {}, engine=engine)


def _on_published(whole: Recipe, size: str) -> Recipe:
    """The recipe from the weights, and with all settings, that were published."""
    return replace(whole, model=config_to_json(whole.model["family"], config(size)), init={"model": size})


def bagel_24gb() -> Recipe:
    """SGT-BAGEL with adapters on the decoder; the weights, in eight bits, stay.

    diptych train sgt/bagel-24gb --catalog my_data.yaml
    """
    limits = Limits(tokens=5632, pictures=8, accumulate=24)
    return _on_one(sgt.bagel(), "sgt/bagel-24gb", {"decoder": 1e-4}, limits, rank=16, frozen="int8")


def bagel_80gb() -> Recipe:
    """SGT-BAGEL with adapters on the decoder; the weights stay, in bf16 as they were published.

    diptych train sgt/bagel-80gb --catalog my_data.yaml
    """
    return _on_one(sgt.bagel(), "sgt/bagel-80gb", {"decoder": 1e-4}, Limits(16_384, 64, 8), rank=64)


def iomm_24gb() -> Recipe:
    """IOMM-B's mixed tuning with adapters on the generator; goes on from runs/iomm-b.

    diptych train iomm/b-24gb --catalog my_data.yaml
    """
    recipe = replace(iomm.b(), init={"model": "runs/iomm-b"})
    rates = {"adapter": 1e-4, "connector": 1e-4, "dit": 1e-4}
    return _on_one(recipe, "iomm/b-24gb", rates, Limits(4 * 1624, 8, 64), rank=32, adapted="dit")


def iomm_80gb() -> Recipe:
    """IOMM-B's mixed tuning of everything that its paper trains; goes on from runs/iomm-b.

    diptych train iomm/b-80gb --catalog my_data.yaml
    """
    recipe = replace(iomm.b(), init={"model": "runs/iomm-b"})
    return _on_one(recipe, "iomm/b-80gb", None, Limits(16 * 1624, 32, 16), ema=True)


def cheers_24gb() -> Recipe:
    """Cheers' last stage with adapters on the language model, beside projector and head; goes on from
    ai9stars/Cheers.

    diptych train cheers/1.5b-24gb --catalog my_data.yaml
    """
    recipe = _on_published(cheers.b1_5(), "cheers/1.5b")
    rates = {"decoder": 1e-4, "projector": 2e-5, "head": 2e-5}
    return _on_one(recipe, "cheers/1.5b-24gb", rates, Limits(4096, 2, 64), rank=32)


def cheers_80gb() -> Recipe:
    """Cheers' last stage, every part that its paper trains; goes on from ai9stars/Cheers.

    diptych train cheers/1.5b-80gb --catalog my_data.yaml
    """
    recipe = _on_published(cheers.b1_5(), "cheers/1.5b")
    return _on_one(recipe, "cheers/1.5b-80gb", None, Limits(8192, 8, 16))


def synergen_24gb() -> Recipe:
    """SynerGen-VL's instruction tuning with adapters on the language model and its vision experts, on pictures of up to
    12 tiles; goes on from runs/synergen-stage2.

    diptych train synergen/tune-24gb --catalog my_data.yaml
    """
    rates = {"decoder": 1e-4, "projector": 5e-5, "special": 5e-5}
    return _on_one(synergen.tune(), "synergen/tune-24gb", rates, Limits(8192, 48, 20), rank=32)


def synergen_80gb() -> Recipe:
    """SynerGen-VL's instruction tuning of everything; goes on from runs/synergen-stage2.

    diptych train synergen/tune-80gb --catalog my_data.yaml
    """
    return _on_one(synergen.tune(), "synergen/tune-80gb", None, Limits(16_384, 96, 10))


def omnigen2_24gb() -> Recipe:
    """SGT on OmniGen2 with adapters on the reader and on the diffusion transformer; the weights, in eight bits, stay.

    diptych train sgt/omnigen2-24gb --catalog my_data.yaml
    """
    made = _on_one(omnigen2.sgt(), "sgt/omnigen2-24gb", {"mllm": 1e-4, "dit": 1e-4}, Limits(5632, 2, 30), frozen="int8")
    return replace(made, lora={"mllm": 16, "dit": 16})


def omnigen2_80gb() -> Recipe:
    """SGT on OmniGen2 with adapters on the reader and on the diffusion transformer; the weights stay, in bf16.

    diptych train sgt/omnigen2-80gb --catalog my_data.yaml
    """
    made = _on_one(omnigen2.sgt(), "sgt/omnigen2-80gb", {"mllm": 1e-4, "dit": 1e-4}, Limits(16_384, 8, 8))
    return replace(made, lora={"mllm": 64, "dit": 64})
