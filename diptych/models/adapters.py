"""Files of low-rank adapters (LoRA, arXiv 2106.09685): those of a run, and those that a family's own trainer writes.

A run names a pair after the weight that it changes, ``X.lora_A.default.weight`` and ``X.lora_B.default.weight``. A
published file has published names, ``transformer.X.lora_A.weight`` and ``transformer.X.lora_B.weight``; other tools
write ``diffusion_model.`` in place of ``transformer.``. W + B A replaces W in both: alpha is the rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diptych.models.protocol import Trainable
from diptych.models.published.key_map import Rules, native_name, published_name, raise_all
from diptych.models.table import published_format

DOWN, UP = ".lora_A.default.", ".lora_B.default."
PUBLISHED_FILE = "pytorch_lora_weights.safetensors"
OTHER_TOOLS = "diffusion_model"


@torch.no_grad()
def apply(model: Trainable, file: str | Path, sign: int = 1) -> None:
    """Adds the adapters of a file to a model's weights; ``sign`` -1 takes them away again. The file is a run's
    ``release/adapter.safetensors`` or one that the family's own trainer wrote.

    Raises ``ValueError`` for a file that cannot be read or does not fit the model; the model is unchanged then."""
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a file of adapters: {error}") from error
    if not any(DOWN in name for name in state):
        state = from_published(model, state, str(file))
    weights, pairs, errors = dict(model.named_parameters()), {}, []
    for name in state:
        target = name.replace(DOWN, ".").replace(UP, ".")
        down, up = (state.get(target.removesuffix(".weight") + side + "weight") for side in (DOWN, UP))
        if down is None or up is None:
            errors.append(f"{name} has no partner: an adapter is a pair lora_A, lora_B")
        elif target not in weights or weights[target].shape != (up.shape[0], down.shape[1]):
            errors.append(f"the model has no weight {target!r} of {up.shape[0]} x {down.shape[1]}")
        else:
            pairs[target] = (down.float(), up.float())
    raise_all(sorted(set(errors)), f"{file} does not fit the model")
    for name, (down, up) in pairs.items():
        weights[name].add_((sign * up @ down).to(weights[name].device, weights[name].dtype))


def _published_rules(model: Trainable) -> tuple[str, Rules] | None:
    """The first component of published adapter names and the key map behind it; None where the family has none."""
    fmt = published_format(model.family)
    if fmt is None or fmt.adapters is None:
        return None
    component, stem = fmt.adapters
    return component, fmt.weights[stem](model.config)


def from_published(model: Trainable, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Published adapters under the names of a run. Raises ``ValueError`` naming every tensor that is none."""
    published = _published_rules(model)
    if published is None:
        raise ValueError(f"{where} holds no adapters of a run (X{DOWN}weight), and {model.family} has no other format")
    component, rules = published
    pattern = re.compile(rf"(?:{component}|{OTHER_TOOLS})\.(.+)\.lora_([AB])\.weight")
    out, errors = {}, []
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        native = native_name(rules, f"{match[1]}.weight") if match else None
        if match is None or native is None:
            errors.append(f"unknown {name}")
            continue
        out[native.removesuffix(".weight") + {"A": DOWN, "B": UP}[match[2]] + "weight"] = tensor
    raise_all(errors, f"{where} holds no adapters of {model.family}")
    return out


def to_published(model: Trainable, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A run's adapters as the family's own trainer writes them; None where it has no format for them, or where they
    change parts that its files do not cover."""
    published = _published_rules(model)
    if published is None:
        return None
    (component, rules), out = published, {}
    for name, tensor in state.items():
        side, letter = (DOWN, "A") if DOWN in name else (UP, "B")
        renamed = published_name(rules, name.replace(side, "."))
        if renamed is None:
            return None
        out[f"{component}.{renamed.removesuffix('.weight')}.lora_{letter}.weight"] = tensor
    return out
