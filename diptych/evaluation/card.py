"""The sampling card: the identity of the model, and every setting that changes a score.

Cards may differ in their benchmarks only. An evaluation with any other difference needs a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from diptych.models.protocol import THINK_BEFORE_ANSWERING as THINK

PER_BENCHMARK = ("asked", "prompts", "pictures_per_prompt", "items", "size", "max_new_tokens")
OWN_FILES = ("items.jsonl", "scores.jsonl", "summary.json", "pictures", "lmms-eval")  # written beside the card
THINKING_TOKENS = 2048  # room for the reasoning before an answer
# The instruction of BAGEL's released inference code (arXiv 2505.14683); other models follow it as well.


@dataclass(frozen=True)
class Answering:
    """How questions are put to a model.

    ``max_new_tokens``  longest answer in tokens (default: the benchmark's own, or 2048 for a model that thinks)
    ``system``          a system message before each question
    ``thinking``        True: the model is asked to reason in ``<think>`` tags first, which are not scored. True and
                        False are also sent to a server, as ``enable_thinking``. None: as the model does by itself
    ``temperature``     0 takes the likeliest token
    """

    max_new_tokens: int | None = None
    system: str = ""
    thinking: bool | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1, or None for the default")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")

    def tokens(self, benchmark: Benchmark) -> int:
        """The longest answer to a question of the benchmark."""
        return self.max_new_tokens or (THINKING_TOKENS if self.thinking else benchmark.max_new_tokens)

    @property
    def instruction(self) -> str:
        """The whole system message, empty where there is none."""
        return "\n\n".join(text for text in (THINK if self.thinking else "", self.system) if text)


DEFAULT = Answering()


def sampling_card(
    engine: Any,
    asked: Mapping[str, str],
    benchmarks: Sequence[Benchmark],
    items: Mapping[str, Sequence[Item]],
    sides: Mapping[str, int | None],
    seed: int,
    limit: int | None,
    answering: Answering,
    settings: Any,
) -> dict:
    """The card of an evaluation as JSON; ``asked`` is how each benchmark was named ("wise=FOLDER")."""
    drawn, answered = ([b for b in benchmarks if b.task == task] for task in ("draw", "answer"))
    card = {
        **identity(engine),
        "seed": seed,
        "seeds": "one per picture, from (seed, item id)",
        "limit": limit,
        "settings": asdict(settings),
        "temperature": answering.temperature,
        "system": answering.instruction,
        "thinking": answering.thinking,
        "versions": _versions(),
        "asked": {b.name: asked.get(b.name, b.name) for b in benchmarks},
        "prompts": {b.name: prompts_hash(items[b.name]) for b in benchmarks},
        "pictures_per_prompt": {b.name: b.pictures_per_prompt for b in drawn},
        "max_new_tokens": {b.name: answering.tokens(b) for b in answered},
        "items": {b.name: len(items[b.name]) for b in benchmarks},
        "size": {b.name: [sides[b.name]] * 2 if sides[b.name] else "the model's own" for b in benchmarks},
    }
    return json.loads(json.dumps(card))


def identity(engine: Any) -> dict[str, Any]:
    """The model's name and family; for a network also a hash of its weights, its dtype and device, for other engines
    the fields of their ``model``."""
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
    """A hash over the name, shape, dtype and 64 values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def agree(folder: Path, card: dict) -> dict:
    """The card of this folder, with the benchmarks that it names already. Raises ``ValueError`` where a setting
    differs, and for a folder whose files are not those of an evaluation."""
    if (folder / "card.json").is_file():
        old = load(folder)
        old_settings, settings = _flat(old), _flat(card)
        for name in {**settings, **old_settings}:
            if name.partition(".")[0] in PER_BENCHMARK and not (name in settings and name in old_settings):
                continue  # another benchmark of the same folder
            before, now = old_settings.get(name), settings.get(name)
            if before != now:
                raise ValueError(
                    f"{folder} was made with {name} = {before!r}, not {now!r}; use another folder: "
                    "two settings are not mixed in one"
                )
        return card | {k: {**old.get(k, {}), **card[k]} for k in PER_BENCHMARK}
    if foreign := [name for name in (*OWN_FILES, "items.0.jsonl") if (folder / name).exists()]:
        raise ValueError(f"{folder} holds {foreign[0]} without its card.json; use another folder")
    return card


def write(folder: Path, card: dict) -> None:
    """Writes the card into its folder."""
    disk.write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")


def load(folder: Path) -> dict:
    """The card of a folder. Raises ``ValueError`` for a folder that has none, and for a card.json of something else."""
    path = folder / "card.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of an evaluation: it has no card.json")
    card = files.load(path)
    if not isinstance(card, dict) or not all(isinstance(card.get(key), dict) for key in ("asked", "prompts")):
        raise ValueError(f"{path} is not the card of an evaluation; use another folder")
    return card


def _versions() -> dict[str, str]:
    try:
        version = metadata.version("diptych")
    except metadata.PackageNotFoundError:
        version = "not installed"
    versions = {"diptych": version, "python": platform.python_version(), "torch": torch.__version__}
    return versions | {"numpy": np.__version__, "pillow": PIL.__version__}


def prompts_hash(items: Sequence[Item]) -> str:
    """A hash of the items in order: ids, categories, prompts, seeds and references."""
    rows = [[i.id, i.category, i.prompt, i.seed, i.reference] for i in items]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
