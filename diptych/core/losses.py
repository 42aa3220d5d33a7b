"""Losses as sums with counts, which are normalised once, by the count over the whole global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from diptych.core.tensors import Tensor


class Term(NamedTuple):
    """One loss term: the sum over its elements and the element count. ``documents``, optional, holds (sum, count) per
    packed document, for logging by data set (``by_document``)."""

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
