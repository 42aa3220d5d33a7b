"""A folder of recorded numbers, and what came of comparing ours with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

CLOSE = 1e-4  # activations, losses, gradients: |ours - theirs| <= CLOSE + CLOSE |theirs|
TRACK = 1e-3  # losses along a few optimiser steps


@dataclass
class Row:
    """One comparison. ``tolerance`` 0 means exactly."""

    name: str
    difference: float
    tolerance: float
    ok: bool


@dataclass
class Folder:
    """``config.json``, ``meta.json`` and the tensors of every other file as ``FILE.NAME``. Files whose names
    begin with one of ``weights`` are loaded and not compared."""

    path: Path
    weights: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config = json.loads((self.path / "config.json").read_text())
        self.meta = json.loads((self.path / "meta.json").read_text())
        files = [f for f in sorted(self.path.glob("*.safetensors")) if not f.stem.startswith(self.weights)]
        self.tensors = {f"{f.stem}.{name}": t for f in files for name, t in load_file(f).items()}

    def has(self, name: str) -> bool:
        """Whether a file of weights, or a tensor, is there."""
        return name in self.tensors or (self.path / f"{name}.safetensors").is_file()

    def get(self, name: str) -> Tensor:
        """A recorded tensor; asking for it counts as using it."""
        self.used.add(name)
        return self.tensors[name]

    def names(self, prefix: str) -> list[str]:
        """The tensors whose names begin so."""
        return [n for n in self.tensors if n.startswith(prefix)]

    def unused(self) -> list[str]:
        """The tensors that nothing asked for."""
        return sorted(self.tensors.keys() - self.used)

    def close(self, name: str, ours: Tensor, theirs: Tensor | float | None = None, tolerance: float = CLOSE) -> None:
        """Compares with the tensor of this name (or ``theirs``), absolute and relative tolerance alike."""
        theirs = self.get(name) if theirs is None else torch.as_tensor(theirs)
        ours, theirs = torch.as_tensor(ours).detach().double(), theirs.double()
        if ours.shape != theirs.shape:
            self.rows.append(
                Row(f"{name} {tuple(ours.shape)} != {tuple(theirs.shape)}", float("inf"), tolerance, False)
            )
            return
        off = (ours - theirs).abs()
        largest = float(off.max()) if off.numel() else 0.0
        ok = bool((off <= tolerance + tolerance * theirs.abs()).all())  # a NaN is not
        self.rows.append(Row(name, largest, tolerance, ok))

    def same(self, name: str, ours, theirs=None) -> None:
        """Compares ids, masks, places and lists exactly."""
        theirs = self.get(name) if theirs is None else theirs
        ours, theirs = (x.tolist() if isinstance(x, Tensor) else x for x in (ours, theirs))
        self.rows.append(Row(name, 0.0 if ours == theirs else float("inf"), 0.0, ours == theirs))

    def within(self, name: str, ours: Tensor, most: float) -> None:
        """Compares with the tensor of this name, which may differ by at most ``most``."""
        off = (ours.double() - self.get(name).double()).abs().max()
        self.rows.append(Row(name, float(off), most, bool(off <= most)))

    def failures(self) -> list[Row]:
        """What is beyond its tolerance."""
        return [r for r in self.rows if not r.ok]
