"""The sampling card: everything that moves a score and is not the model's doing, and which model it was.

Two cards that differ in anything but the benchmarks they name are two settings, and are not mixed in one folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn

from diptych.evaluation import files
from diptych.evaluation.scores import Benchmark, Item
from diptych.machine import disk

PER_BENCHMARK = ("asked", "prompts", "pictures_per_prompt", "items", "size", "max_new_tokens")


def sampling_card(
    engine: Any,
    asked: Mapping[str, str],
    benchmarks: Sequence[Benchmark],
    items: Mapping[str, Sequence[Item]],
    sides: Mapping[str, int | None],
    seed: int,
    limit: int | None,
    temperature: float,
    settings: Any,
) -> dict:
    """The card of an evaluation, JSON-able; ``asked`` is how each benchmark was named ("wise=FOLDER")."""
    drawn, answered = ([b for b in benchmarks if b.task == task] for task in ("draw", "answer"))
    card = {
        **identity(engine),
        "seed": seed,
        "seeds": "one per picture, from (seed, item id)",
        "limit": limit,
        "settings": asdict(settings),
        "temperature": temperature,
        "versions": _versions(),
        "asked": {b.name: asked.get(b.name, b.name) for b in benchmarks},
        "prompts": {b.name: prompts_hash(items[b.name]) for b in benchmarks},
        "pictures_per_prompt": {b.name: b.pictures_per_prompt for b in drawn},
        "max_new_tokens": {b.name: b.max_new_tokens for b in answered},
        "items": {b.name: len(items[b.name]) for b in benchmarks},
        "size": {b.name: [sides[b.name]] * 2 if sides[b.name] else "the model's own" for b in benchmarks},
    }
    return json.loads(json.dumps(card))


def identity(engine: Any) -> dict[str, Any]:
    """Which model it is: of a network also a hash of its weights, dtype and device; of others what they say."""
    who = {"model": engine.name, "family": engine.model.family}
    if not isinstance(engine.model, nn.Module):
        return who | {k: v for k, v in asdict(engine.model).items() if k not in ("family", "settings")}
    parameter = next(engine.model.parameters())
    device = parameter.device.type
    if device == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(parameter.device)})"
    dtype = str(parameter.dtype).removeprefix("torch.")
    return who | {"weights": fingerprint(engine.model), "dtype": dtype, "device": device}


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and 64 of its values: other weights, other hash."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def agree(folder: Path, card: dict) -> dict:
    """The card of this folder, with benchmarks that it did not name before. Raises ``ValueError`` when any field
    differs."""
    path = folder / "card.json"
    if path.is_file():
        old = files.load(path)
        known = _flat(old)
        for name, value in _flat(card).items():
            if name in known and known[name] != value:
                raise ValueError(
                    f"{folder} was made with {name} = {known[name]!r}, not {value!r}; use another folder: "
                    "two settings are not mixed in one"
                )
        card = card | {k: {**old.get(k, {}), **card[k]} for k in PER_BENCHMARK}
    elif any((folder / name).exists() for name in ("items.jsonl", "items.0.jsonl")):
        raise ValueError(f"{folder} holds items.jsonl without its card.json; use another folder")
    return card


def write(folder: Path, card: dict) -> None:
    """Puts the card into its folder."""
    disk.write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")


def load(folder: Path) -> dict:
    """The card of a folder. Raises ``ValueError`` where there is none."""
    path = folder / "card.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of an evaluation: it has no card.json")
    return files.load(path)


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("diptych")
    except metadata.PackageNotFoundError:
        own = "not installed"
    ours = {"diptych": own, "python": platform.python_version(), "torch": torch.__version__}
    return ours | {"numpy": np.__version__, "pillow": PIL.__version__}


def prompts_hash(items: Sequence[Item]) -> str:
    """A hash of what is asked, in order, and what it is judged by."""
    rows = [[i.id, i.category, i.prompt, i.seed, i.reference] for i in items]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
