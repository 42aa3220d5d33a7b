"""Optimizers and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from diptych.machine.processes import place
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
    units that is a hundred times slower than the training step. Here it is done in ``dtype``. Matrices of one shape are
    done together, as many at a time as ``at_once`` says.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; parameters of one shape go together."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, alike in shapes.items():
                n = at_once(*shape)
                for at in range(0, len(alike), n):
                    self._update(alike[at : at + n], group)

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        """One step of matrices of one shape."""
        buffers = []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            buffers.append(p.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
        update = each_whole(torch.stack(buffers), lambda x: orthogonalise(x, self.dtype))
        for p, u in zip(parameters, update.unbind(), strict=True):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(u.to(p.dtype), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def at_once(rows: int, columns: int, numbers: int = 2**26) -> int:
    """How many matrices of this shape Muon orthogonalises together: up to ``numbers`` entries, and one for each
    process at least, because processes that share the matrices take whole ones."""
    return max(numbers // (rows * columns), place()[1])


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32, iterations: int = 5) -> Tensor:
    """Nearly orthogonal matrices, (n, rows, columns) float32: a quintic Newton-Schulz iteration in ``dtype`` moves the
    singular values near 1."""
    x = matrices.float()
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    if x.device.type == "cpu":  # batched products do not use the matrix units for bfloat16
        x = torch.stack([_newton_schulz(m, iterations, torch.addmm) for m in x])
    else:
        x = _newton_schulz(x, iterations, torch.baddbmm)
    return (x.mT if wide else x).float()


def _newton_schulz(x: Tensor, iterations: int, add: Callable[..., Tensor]) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(iterations):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def build(
    model: Trainable,
    parts: Mapping[str, Mapping[str, nn.Parameter]],
    rates: Mapping[str, float],
    config: Optimizer,
    precision: str = "fp32",
) -> list[torch.optim.Optimizer]:
    """The optimizers of a stage; every group remembers its peak rate as ``peak``.

    Weight decay is for weights of linear and convolution layers only, not for norms, biases, embeddings and tables of
    positions. With Muon, the 2-D weights inside ``model.blocks()`` take it, in bfloat16 where ``precision`` is bf16."""
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
            group = [p for p in parameters.values() if id(p) not in matrices and (id(p) in weights) == decays]
            if group:
                decay = config.weight_decay if decays else 0.0
                adamw.append({"params": group, "lr": rates[part], "peak": rates[part], "weight_decay": decay})
        if group := [p for p in parameters.values() if id(p) in matrices]:
            muon.append({"params": group, "lr": rates[part], "peak": rates[part], "weight_decay": config.weight_decay})
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
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        optimizers.append(Muon(muon, 0.0, config.momentum, config.weight_decay, dtype))
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    """Sets every group's learning rate to its peak times ``value``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * value
