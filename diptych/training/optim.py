"""Optimizers and schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from diptych.models.protocol import Trainable
from diptych.training.parallel import each_whole
from diptych.training.recipe import Optimizer, Schedule


def factor(schedule: Schedule, step: int | float, steps: int) -> float:
    """The factor on the learning rate at ``step`` (from 0; between two steps where a run follows the clock) of
    ``steps``."""
    rate = min(1.0, (step + 1) / (schedule.warmup + 1))
    if schedule.shape == "cosine":
        along = max(0, step - schedule.warmup) / max(1, steps - schedule.warmup)
        rate *= schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * along))
    tail = schedule.decay * steps
    if tail and step > steps - tail:
        rate *= schedule.floor + (1 - schedule.floor) * (steps - step) / tail
    return rate


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024), scaled by
    0.2 sqrt(max(rows, columns)) so that AdamW's learning rates carry over (Moonlight, arXiv 2502.16982).

    Ours rather than ``torch.optim.Muon``, which orthogonalises in bfloat16 whatever the processor: without bfloat16
    units that is a hundred times slower than the training step. Matrices of one shape are done together.
    """

    def __init__(self, params: Iterable[dict], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append((p, p.grad))
            for shape, pairs in shapes.items():
                buffers = []
                for p, gradient in pairs:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    buffers.append(gradient.lerp(state["momentum"], group["momentum"]))  # Nesterov
                update = each_whole(torch.stack(buffers), orthogonalise) * (0.2 * max(shape) ** 0.5)
                for (p, _), u in zip(pairs, update.unbind(), strict=True):
                    if group["weight_decay"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.to(p.dtype), alpha=-group["lr"])


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(n, rows, columns) with their singular values brought near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.float()
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide else x


def build(
    model: Trainable, parts: Mapping[str, Mapping[str, nn.Parameter]], rates: Mapping[str, float], config: Optimizer
) -> list[torch.optim.Optimizer]:
    """The optimizers of a stage; every group remembers its peak rate as ``peak``.

    Weight decay is for weights of linear and convolution layers only, not for norms, biases, embeddings and tables of
    positions. With Muon, the 2-D weights inside ``model.blocks()`` take it."""
    weights = {
        id(p) for m in model.modules() for n, p in m.named_parameters(recurse=False) if n == "weight" and p.dim() > 1
    }
    weights -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = (
        {id(p) for b in model.blocks() for p in b.parameters() if p.dim() == 2} if config.name == "muon" else set()
    )
    adamw, muon = [], []
    for part, parameters in parts.items():
        for decays in (True, False):
            own = [p for p in parameters.values() if id(p) not in matrices and (id(p) in weights) == decays]
            if own:
                decay = config.weight_decay if decays else 0.0
                adamw.append({"params": own, "lr": rates[part], "peak": rates[part], "weight_decay": decay})
        if own := [p for p in parameters.values() if id(p) in matrices]:
            muon.append({"params": own, "lr": rates[part], "peak": rates[part], "weight_decay": config.weight_decay})
    optimizers: list[torch.optim.Optimizer] = []
    if adamw and config.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("adamw8bit needs the package bitsandbytes and a GPU: pip install bitsandbytes") from error
        optimizers.append(AdamW8bit(adamw, lr=0.0, betas=config.betas, eps=config.eps))
    elif adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=0.0, betas=config.betas, eps=config.eps, fused=True))
    if muon:
        optimizers.append(Muon(muon, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay))
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    """Sets every group's learning rate to its peak times ``value``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * value
