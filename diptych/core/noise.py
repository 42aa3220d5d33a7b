"""Random draws addressed by (run seed, step, sample id, name), never by a running generator.

So the loss of a sample depends neither on its neighbours in the row nor on the number of processes, and a resumed run
draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """The draws of one step (any int) of one run."""

    seed: int = 0
    step: int = 0

    def generator(self, sample: str, name: str) -> torch.Generator:
        """A CPU generator that belongs to this address alone."""
        key = f"{self.seed}\0{self.step}\0{sample}\0{name}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))

    def normal(self, sample: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal draws of ``shape``, float32 on the CPU: the same on every device."""
        return torch.randn(shape, generator=self.generator(sample, name))

    def uniform(self, sample: str, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform draws in [0, 1) of ``shape``, float32 on the CPU."""
        return torch.rand(shape, generator=self.generator(sample, name))
