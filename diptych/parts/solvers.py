"""Steps of solvers on the straight path from noise (time 1) to data (time 0)."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from typing import Literal

from diptych.core.tensors import Float, Tensor

Solver = Literal["euler", "dpm"]


def euler_step(
    x: Float[Tensor, "*n f"], velocity: Float[Tensor, "*n f"], times: Float[Tensor, " steps_1"], step: int
) -> Float[Tensor, "*n f"]:
    """x after step ``step`` of a schedule of ``times``; the velocity is noise - data."""
    return x - velocity * float(times[step] - times[step + 1])


def dpm_step(
    x: Float[Tensor, "*n f"],
    velocity: Float[Tensor, "*n f"],
    times: Float[Tensor, " steps_1"],
    step: int,
    before: Float[Tensor, "*n f"] | None,
) -> tuple[Float[Tensor, "*n f"], Float[Tensor, "*n f"]]:
    """(x after the step, the data that it predicts) by DPM-Solver++ of order 2 (arXiv 2211.01095, algorithm 2;
    multistep, midpoint), with ``before`` the data that the step before predicted.

    With a = 1 - s at time s and h = log(a' s / (a s')), e^-h is a s' / (a' s). The first step is of first order, since
    a = 0 makes h infinite; so is the second, whose ratio of steps is infinite, and the last, which ends at the data."""
    now, then = float(times[step]), float(times[step + 1])
    data = x - now * velocity
    out = then / now * x + ((1 - then) - (1 - now) * then / now) * data
    if step >= 2 and before is not None and step < len(times) - 2:
        past = float(times[step - 1])
        log_ratio = _log_snr(now) - _log_snr(past)
        h = _log_snr(then) - _log_snr(now)
        out = out + ((1 - then) - (1 - now) * then / now) * (data - before) * h / (2 * log_ratio)
    return out, data


def extrapolate(points: Sequence[tuple[float, Float[Tensor, "*n f"]]], time: float) -> Float[Tensor, "*n f"]:
    """The value at ``time`` of the polynomial through (time, value) pairs with different times (Lagrange's form)."""
    out = 0 * points[0][1]
    for i, (t, value) in enumerate(points):
        weight = prod((time - other) / (t - other) for j, (other, _) in enumerate(points) if j != i)
        out = out + weight * value
    return out


def _log_snr(time: float) -> float:
    """log((1 - s) / s)."""
    return log((1 - time) / time)
