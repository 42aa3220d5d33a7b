"""Other weights of the same model: copies of the trained parameters that take their place for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Snapshot:
    """A copy of the trained parameters. Inside ``used`` the model computes with it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.live = dict(parameters)
        self.copy = {name: p.detach().clone() for name, p in parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """The copies by parameter name."""
        return self.copy

    @contextmanager
    def used(self) -> Iterator[None]:
        """The copies in place of the parameters, which come back with the end of the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.live.items():
            parameter.data, self.copy[name] = self.copy[name], parameter.data

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """copy = decay copy + (1 - decay) parameter; 0 makes it equal to the bit."""
        for name, parameter in self.live.items():
            if decay:
                self.copy[name].lerp_(parameter, 1 - decay)
            else:
                self.copy[name].copy_(parameter)
