"""Losses travel as sums with counts, so that they are normalised once, by the count over the whole global batch; and
cross-entropy whose logits never exist whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from diptych.core.tensors import Float, Int, Tensor

LOGITS, ROWS = 2**24, 1024  # logits at a time in training: 64 MB of float32, but so many rows at least


class Term(NamedTuple):
    """One loss term: the sum over its elements, and how many elements there are; where the family tells, also both of
    every document of the row, for the log by data set (``by_document``)."""

    sum: Tensor
    count: float  # type: ignore[assignment]  # tuples have a method of this name
    documents: Tensor | None = None  # (D, 2)


Losses = dict[str, Term]


def by_document(values: Tensor, document: Tensor, documents: int, elements: int = 1) -> Tensor:
    """(documents, 2) sums and counts of n values, each the sum over ``elements``, that belong to these documents."""
    pairs = torch.stack([values.detach().float(), torch.full_like(values, elements, dtype=torch.float32)], 1)
    return pairs.new_zeros(documents, 2).index_add_(0, document, pairs)


def add_counts(counts: list[Mapping[str, float]]) -> dict[str, float]:
    """The total count of every term over micro-batches."""
    return {name: sum(c.get(name, 0.0) for c in counts) for name in dict.fromkeys(n for c in counts for n in c)}


def check_weights(names: set[str], weights: Mapping[str, float]) -> None:
    """Raises ``ValueError`` for a term without a weight or a weight without a term."""
    if lacking := sorted(names - weights.keys()):
        raise ValueError(f"loss terms {lacking} have no weight; the recipe weighs {sorted(weights)}")
    if unknown := sorted(weights.keys() - names):
        raise ValueError(f"the recipe weighs unknown loss terms {unknown}; the family has {sorted(names)}")


def combine(losses: Losses, weights: Mapping[str, float], counts: Mapping[str, float]) -> Tensor:
    """sum over terms of weight x (sum / global count); a term that nothing supervises adds nothing."""
    return sum(weights[name] * term.sum / max(counts[name], 1.0) for name, term in losses.items())  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are taken on the way forward, while a chunk's logits exist; so nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, rows):
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
        )


def linear_cross_entropy(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "K d"], targets: Int[Tensor, " n"], rows: int | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """The cross-entropy of softmax(x weight^T) in float32: summed, and row by row (without gradient, for the log).
    ``rows`` of logits exist at a time."""
    return _LinearCrossEntropy.apply(x, weight, targets, rows or max(ROWS, LOGITS // len(weight)))
