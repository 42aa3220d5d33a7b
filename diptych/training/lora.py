"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: W + B A in place of W, on the blocks of named parts. Alpha
is the rank, as in IOMM's Table 6.

An adapter lives in the part of the weight that it changes, so a recipe trains and freezes it by the part's name; the
weight itself stays. Releases are merged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diptych.machine.extras import install
from diptych.models.adapters import DOWN, UP
from diptych.models.protocol import Trainable
from diptych.training.parameters import by_part, named, select

BASE = ".base_layer."


def inject(model: Trainable, ranks: Mapping[str, int], seed: int) -> None:
    """Gives the linear layers in the blocks of these parts adapters of these ranks, in place; at first they change
    nothing. Raises ``ValueError`` for unknown parts, for parts without such layers, and when peft is not installed."""
    if not ranks:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"lora needs the package peft: {install('tune')}") from error
    inside = {id(p) for block in model.blocks() for p in block.parameters()}
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in inside}
    parts = by_part(model)
    wanted: dict[str, int] = {}
    for part, rank in select(model, {part: float(rank) for part, rank in ranks.items()}).items():
        targets = {n.rpartition(".")[0] for n in parts[part]} & layers
        wanted |= dict.fromkeys(targets, int(rank))
    for part in ranks:
        if not any(n.rpartition(".")[0] in wanted for p in named(model, part) for n in parts[p]):
            raise ValueError(f"part {part!r} of {model.family} has no linear layer in a block for lora to change")
    least = min(wanted.values())
    if least < 1:
        raise ValueError(f"the rank of lora must be at least 1, not {least}")
    config = LoraConfig(
        r=least,
        lora_alpha=least,
        target_modules=sorted(wanted),
        rank_pattern=dict(wanted),
        alpha_pattern=dict(wanted),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global state; what stays is drawn here
        inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if DOWN in name and not p.is_meta:
            nn.init.kaiming_uniform_(p, a=5**0.5, generator=generator)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with every adapter added to its weight, under the names of a model without adapters."""
    out = {}
    for name, tensor in state.items():
        if DOWN in name or UP in name:
            continue
        down, up = (state.get(name.replace(BASE, place)) for place in (DOWN, UP))
        if BASE in name and down is not None and up is not None:
            tensor = (tensor.float() + up.float() @ down.float()).to(tensor.dtype)
        out[name.replace(BASE, ".")] = tensor
    return out


def adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone, as ``diptych.models.adapters.apply`` reads them."""
    return {name: tensor for name, tensor in state.items() if DOWN in name or UP in name}
