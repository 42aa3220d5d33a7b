"""Resuming and releasing: written under a temporary name and renamed, so a kill leaves the last good one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from diptych.models import write_folder


def save(folder: Path, tensors: Mapping[str, Any], meta: Mapping[str, Any], keep: int) -> None:
    """Writes ``folder`` (tensors by torch.distributed.checkpoint, ``meta`` as JSON) and removes all but ``keep``."""

    def write(tmp: Path) -> None:
        _quietly(dcp.save, dict(tensors), checkpoint_id=tmp / "state", no_dist=True)
        (tmp / "meta.json").write_text(json.dumps(meta))

    write_folder(folder, write)
    for old in available(folder.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def available(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith("step-") and (p / "meta.json").is_file())


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON half of a checkpoint. Raises ``ValueError`` when it cannot be read."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error


def load(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Fills ``tensors`` in place from a checkpoint and returns the filled mapping."""
    state = dict(tensors)
    _quietly(dcp.load, state, checkpoint_id=folder / "state", no_dist=True)
    return state


def optimizer_state(optimizers: list[torch.optim.Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Optimizer state as tensors named ``<optimizer>.<parameter>.<slot>``."""
    out = {}
    for optimizer in optimizers:
        for p, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                out[f"{type(optimizer).__name__}.{names[id(p)]}.{slot}"] = tensor
    return out


def restore_optimizer(
    optimizers: list[torch.optim.Optimizer], names: Mapping[int, str], folder: Path, prefix: str
) -> None:
    """Gives every optimizer the state that ``optimizer_state`` wrote under ``prefix``."""
    stored = dcp.FileSystemReader(folder / "state").read_metadata().state_dict_metadata
    by_name = {name: pid for pid, name in names.items()}
    wanted = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in stored.items()
        if k.startswith(prefix) and isinstance(m, TensorStorageMetadata)
    }
    if not wanted:
        return
    filled = load(folder, wanted)
    for optimizer in optimizers:
        live = {id(p): p for g in optimizer.param_groups for p in g["params"]}
        kind = f"{prefix}{type(optimizer).__name__}."
        for key, value in filled.items():
            if key.startswith(kind):
                name, slot = key[len(kind) :].rsplit(".", 1)
                p = live[by_name[name]]
                optimizer.state[p][slot] = value.to(p.device)


def _quietly(call, *args, **kwargs) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # DCP warns that there is no process group
        warnings.filterwarnings("ignore", category=FutureWarning)
        call(*args, **kwargs)
