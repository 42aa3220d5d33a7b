"""95 % confidence intervals of shares and means."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

Z = 1.959963984540054  # two-sided 95 %
STUDENT = (  # the same of Student's t, for 1 to 30 degrees of freedom
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


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
    """(mean, low, high) of independent values, by Student's t; one value alone has no known width (nan)."""
    n = len(values)
    if not n:
        raise ValueError("no values to average")
    centre = sum(values) / n
    if n == 1:
        return centre, float("nan"), float("nan")
    spread = sqrt(sum((v - centre) ** 2 for v in values) / (n - 1))
    half = (STUDENT[n - 2] if n - 2 < len(STUDENT) else Z) * spread / sqrt(n)
    return centre, centre - half, centre + half
