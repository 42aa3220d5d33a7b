"""Cross-entropy of a linear head that never holds the whole matrix of logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diptych.core.tensors import Float, Int, Tensor

Factor = Callable[[Tensor, slice], Tensor]  # log-probabilities of some rows -> what their gradient is multiplied by
LOGITS, ROWS = 2**24, 1024  # logits at a time in training: 64 MB of float32, but so many rows at least


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward pass, while a chunk's logits exist, so that nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, rows, factor):
        device = "cpu" if x.is_meta else x.device.type  # planning: the meta device knows no autocast
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        states, table = x.to(dtype), weight.to(dtype)
        of_x, of_weight = ctx.needs_input_grad[:2]
        each = torch.zeros(len(x), device=x.device)
        dx = torch.empty_like(states) if of_x else None
        dw = torch.zeros(weight.shape, device=x.device) if of_weight else None
        with torch.autocast(device, enabled=False):
            for at in range(0, len(x), rows):
                some, target = states[at : at + rows], targets[at : at + rows, None]
                logits = (some @ table.T).float()
                total = logits.logsumexp(-1, keepdim=True)
                each[at : at + rows] = (total - logits.gather(1, target))[:, 0]
                if not (of_x or of_weight):
                    continue
                p = logits.sub_(total).exp_()
                p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
                if factor is not None:
                    part = slice(at, at + len(some))
                    p *= factor(-each[part], part)[:, None]
                p = p.to(dtype)
                if of_x:
                    dx[at : at + rows] = p @ table
                if of_weight:
                    dw += (p.T @ some).float() if dtype != torch.float32 else p.T @ some
        ctx.save_for_backward(dx, dw)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        of_x, of_weight = ctx.dtypes
        return (
            None if dx is None else (dx * grad).to(of_x),
            None if dw is None else (dw * grad).to(of_weight),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "K d"],
    targets: Int[Tensor, " n"],
    rows: int | None = None,
    factor: Factor | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """The cross-entropy of softmax(x weight^T) in float32: summed, and row by row (without gradient, for the log).
    ``rows`` of logits exist at a time. ``factor`` multiplies the gradient of each row, not its value."""
    return _LinearCrossEntropy.apply(x, weight, targets, rows or max(ROWS, LOGITS // len(weight)), factor)
