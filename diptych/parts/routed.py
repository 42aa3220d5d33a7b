"""Per-modality copies of any module: BAGEL's mixture of transformers, SynerGen-VL's vision experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Routed(nn.ModuleList):
    """``n`` copies made by ``make``. A stream holds the tokens of route 0 first, then route 1, and so on.

    ``counts`` says how many tokens each route has. With one copy every token takes it. A copy without tokens is run all
    the same where gradients are kept, so that every parameter is in every training step, on every process.
    """

    def __init__(self, make: Callable[[], nn.Module], n: int = 1) -> None:
        super().__init__(make() for _ in range(n))

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """(T, d) through the copy of each token's route; ``counts`` are the tokens of each route."""
        copies = list(self._modules.values())
        if len(copies) == 1:
            return copies[0](x)
        training = torch.is_grad_enabled()
        busy = [i for i, count in enumerate(counts) if count or training]
        if len(busy) == 1:
            return copies[busy[0]](x)
        return torch.cat([copies[i](part) for i, part in enumerate(x.split(list(counts))) if i in busy])


def spare_parameters(model: nn.Module) -> int:
    """How many parameters no single token uses: all but one copy of every routed module."""
    return sum(
        p.numel() for m in model.modules() if isinstance(m, Routed) for copy in list(m)[1:] for p in copy.parameters()
    )
