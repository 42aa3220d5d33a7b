"""How sure a number is: 95 % intervals of shares and means."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

Z = 1.959963984540054  # two-sided 95 %


def wilson(right: int | float, n: int) -> tuple[float, float, float]:
    """(share, low, high) of ``right`` among ``n`` independent items, by Wilson's score interval.

    Raises ``ValueError`` for no items."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"{right} right of {n} items is no share; it needs at least one item")
    p = right / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def mean(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of independent values, by the normal approximation; one value alone has no known width."""
    n = len(values)
    if not n:
        raise ValueError("no values to average")
    centre = sum(values) / n
    spread = sqrt(sum((v - centre) ** 2 for v in values) / (n - 1)) if n > 1 else float("nan")
    return centre, centre - Z * spread / sqrt(n), centre + Z * spread / sqrt(n)
