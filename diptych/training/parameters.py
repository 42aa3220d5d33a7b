"""Parameters by part: freezing, learning-rate groups, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from diptych.models.protocol import Trainable
from diptych.parts.quantize import to_int8
from diptych.training.parallel import local
from diptych.training.recipe import EngineConfig, Stage


def by_part(model: Trainable) -> dict[str, dict[str, nn.Parameter]]:
    """Part name -> {parameter name: parameter}. Raises when a parameter is in no part or in two."""
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in model.parts}
    for name, parameter in model.named_parameters():
        homes = [p for p, globs in model.parts.items() if any(fnmatchcase(name, g) for g in globs)]
        if len(homes) != 1:
            raise AssertionError(f"{model.family}: parameter {name} is in {len(homes)} parts {homes}, not in one")
        parts[homes[0]][name] = parameter
    return parts


GROUPS = ("generation", "unified")  # names of several parts, which every family says


def named(model: Trainable, name: str) -> list[str]:
    """The parts of this name: a part, all of a prefix up to a dot (``decoder`` is ``decoder.text`` and
    ``decoder.image``), ``generation``, the parts that the family draws with, or ``unified``, those that SGT
    post-trains. Raises ``ValueError`` for no part."""
    names = getattr(model, name) if name in GROUPS else (name,)
    chosen = {n: [p for p in model.parts if p == n or p.startswith(n + ".")] for n in names}
    if unknown := [n for n in names or (name,) if not chosen.get(n)]:
        raise ValueError(f"unknown part {unknown[0]!r}; {model.family} has: {', '.join(model.parts)}")
    return [p for p in model.parts if any(p in parts for parts in chosen.values())]


def select(model: Trainable, train: Mapping[str, float]) -> dict[str, float]:
    """Part -> learning rate for every part that is ``named``; a longer name has the last word. Raises ``ValueError``
    for unknown and never-trained parts."""
    rates: dict[str, float] = {}
    for name, rate in sorted(train.items(), key=lambda item: (item[0] not in GROUPS, item[0].count("."))):
        chosen = named(model, name)
        if never := sorted(set(chosen) & model.frozen):
            raise ValueError(f"part {never[0]!r} of {model.family} is always frozen")
        rates.update(dict.fromkeys(chosen, rate))
    return rates


def freeze(model: Trainable, train: Mapping[str, float]) -> dict[str, dict[str, nn.Parameter]]:
    """Freezes every part that ``train`` does not name (no gradient, eval mode) and returns the trained ones."""
    rates, parts = select(model, train), by_part(model)
    for part, named in parts.items():  # where a part has adapters, they are trained in its place (training/lora.py)
        parts[part] = {n: p for n, p in named.items() if ".lora_" in n} or named
    trained = {id(p) for part in rates for p in parts[part].values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    _set_modes(model, False)
    return {part: parts[part] for part in rates}


def ever_trained(model: Trainable, stages: Iterable[Stage]) -> set[nn.Parameter]:
    """What any of the stages trains. The model is left as ``freeze`` leaves it for the last of them."""
    return {p for stage in stages for part in freeze(model, stage.train).values() for p in part.values()}


def always_frozen(model: Trainable) -> set[nn.Parameter]:
    """What no recipe may train (the autoencoder): kept in float32 in every engine, as in drawing."""
    return {p for part in model.frozen for p in by_part(model)[part].values()}


def narrow(model: Trainable, engine: EngineConfig, trained: Set[nn.Parameter]) -> None:
    """Keeps what is not ``trained`` in the dtype that ``engine.frozen`` says, in place."""
    if engine.frozen == "int8":
        to_int8(model.blocks(), trained)
    if engine.frozen != "fp32":
        for p in set(model.parameters()) - trained - always_frozen(model):
            if p.is_floating_point():
                p.data = p.data.to(torch.bfloat16)


def _set_modes(module: nn.Module, parent: bool) -> None:
    """Training mode where something below is trained; a module without parameters follows its parent."""
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else parent
    for child in module.children():
        _set_modes(child, module.training)


class Average:
    """Exponential moving average of the trained parameters, in float32 and with their sharding. With ``warmup`` the
    initial weights do not dominate short runs: decay = min(decay, (1 + step) / (10 + step)). Without, the decay is the
    same in every step: the share of the initial weights after s steps is decay ** s."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup, self.steps = decay, warmup, 0
        self.shadow = {n: p.detach().clone().float() for n, p in parameters.items()}
        self.live = dict(parameters)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the present weights; called after every optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
        shadow, live = ([local(t) for t in ts] for ts in (self.shadow.values(), (self.live[n] for n in self.shadow)))
        torch._foreach_lerp_(shadow, [p.float() for p in live], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.shadow

    @torch.no_grad()
    def hand_on(self) -> None:
        """Copies the averages into the weights, from which the next stage starts."""
        for name, parameter in self.live.items():
            local(parameter).copy_(local(self.shadow[name]))


def release_state(model: Trainable, average: Average | None) -> dict[str, Tensor]:
    """The weights to release: the model's, with the average in place of what was averaged."""
    return model.state_dict() | (average.state() if average else {})
