"""Batch-invariant linear layers: the bits of a row do not depend on the other rows of the batch.

On a CPU a matrix product of few rows takes another kernel, with another order of summing. Measured with MKL, float32:
with AVX2 (1 to 16 threads) where fewer than four rows are left to a thread, with AVX-512 (1 to 3 threads) where there
are fewer than 16 in all. Products of few rows are padded to both. With AVX-512 and several threads, inputs of 768
numbers and more are also cut along their length, by a plan that depends on the number of rows: there bits are kept
with one thread only. Activations work on 32 numbers at a time and on the rest one by one: they keep bits where widths
are multiples of 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.tensors import Float

_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, each of a few rows is a product of its own: batch-invariant too, and a single token is decoded without
    padding (NOTES.md has the figures)."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def decoding() -> bool:
    """Whether this runs inside ``alone``."""
    return _ALONE.get()


def linear(x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> Float[Tensor, "*n o"]:
    """x weight^T + bias, row by row independent of the number of rows (no gradient, CPU; elsewhere ``F.linear``)."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or torch.is_grad_enabled() or (rows == 1 and _ALONE.get()):
        return F.linear(x, weight, bias)
    if _ALONE.get():
        products = [F.linear(row, weight, bias) for row in x.reshape(rows, -1).split(1)]
        return torch.cat(products).reshape(*x.shape[:-1], -1)
    threads = torch.get_num_threads()
    missing = -(-max(rows, 16) // (4 * threads)) * 4 * threads - rows
    if not missing or rows >= 16 * threads:
        return F.linear(x, weight, bias)
    padded = torch.cat([x.reshape(rows, -1), x.new_zeros(missing, x.shape[-1])])
    return F.linear(padded, weight, bias)[:rows].reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


def steady(model: nn.Module) -> None:
    """Turns every ``nn.Linear`` of the model into ``Linear``, in place; parameters, names and training stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
