"""Pictures about results: a contact sheet with verdicts, and the curves of a training run."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.written import MARK
from diptych.evaluation.scores import Score
from diptych.training.log import read_metrics


def curves(metrics: str | Path | Iterable[Mapping[str, Any]]) -> bytes:
    """PNG bytes: every loss term over steps, raw and smoothed; below, ``tokens_per_second`` where it was logged.

    ``metrics`` is a run's folder, its metrics file, or rows with "step" and numbers, nested or not. A key with "loss"
    in it is a loss term. Raises ``ValueError`` where no row has a loss.
    """
    import matplotlib.pyplot as plt  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    losses, speeds = _series(metrics)
    if not losses:
        raise ValueError("no row of the metrics has a step and a loss to plot")
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        tall = (3, 1) if speeds else (1,)
        figure = Figure(figsize=(7.6, 4.8 if speeds else 3.6), dpi=140, layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(tall), 1, sharex=True, height_ratios=tall))
        low, high = np.inf, 0.0
        for i, (name, (steps, values)) in enumerate(losses.items()):
            smooth = _smooth(values)
            axes[0].plot(steps, values, color=f"C{i}", alpha=0.22, linewidth=0.8)
            axes[0].plot(steps, smooth, color=f"C{i}", linewidth=1.8, label=f"{name}   {smooth[-1]:.3g}")
            low, high = min(low, values.min()), max(high, values.max())
        if low > 0 and high / low > 20:
            axes[0].set_yscale("log")
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[0].yaxis.set_major_formatter("{x:g}")
            axes[0].yaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel("loss")
        axes[0].legend(frameon=False, loc="upper right", title="smoothed, last value", title_fontsize=8)
        for steps, values in speeds:
            axes[1].plot(steps, values, color="0.72", linewidth=0.8)
            axes[1].plot(steps, _smooth(values), color="0.25", linewidth=1.5)
            axes[1].set_ylabel("tokens / s")
            axes[1].set_ylim(0, float(np.quantile(values, 0.99)) * 1.15 or 1.0)
        axes[-1].set_xlabel("step")
        for ax in axes:
            ax.grid(alpha=0.25, linewidth=0.6)
            ax.margins(x=0.01)
        figure.align_ylabels()
        return _png(figure)


def intervals(scores: Mapping[str, Mapping[str, Score]]) -> bytes:
    """PNG bytes: one panel for each benchmark, one score with its interval for each arm."""
    from matplotlib.figure import Figure

    arms = list(next(iter(scores.values())))
    figure = Figure(figsize=(3.8 * len(scores), 0.9 + 0.36 * len(arms)), dpi=140, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
    for ax, (title, by_arm) in zip(axes, scores.items(), strict=True):
        for y, score in enumerate(by_arm.values()):
            ax.plot([score.low, score.high], [y, y], color="C0", linewidth=1.6)
            ax.plot(score.value, y, "o", color="C0", markersize=5)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="x", alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    return _png(figure)


def bars(categories: Sequence[str], scores: Mapping[str, Mapping[str, Score]]) -> bytes:
    """PNG bytes: a bar with its interval for each category, side by side for each model (name -> category -> score)."""
    from matplotlib.figure import Figure

    n, thick = len(scores), 0.8 / len(scores)
    figure = Figure(figsize=(7.6, 0.7 + 0.26 * len(categories) * max(1.0, 0.7 * n)), dpi=140, layout="constrained")
    ax = figure.subplots()
    for k, (model, by_category) in enumerate(scores.items()):
        rows = [i for i, c in enumerate(categories) if c in by_category]
        some = [by_category[categories[i]] for i in rows]
        y = np.array(rows) + (k - (n - 1) / 2) * thick
        arms = [[max(0.0, s.value - s.low) for s in some], [max(0.0, s.high - s.value) for s in some]]
        ax.barh(y, [s.value for s in some], thick * 0.9, color=f"C{k}", label=model, alpha=0.85)
        ax.errorbar([s.value for s in some], y, xerr=arms, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
    ax.set_yticks(range(len(categories)), categories, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.grid(axis="x", alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if n > 1:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    return _png(figure)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": MARK})
    return out.getvalue()


Line = tuple[np.ndarray, np.ndarray]


def _series(metrics: str | Path | Iterable[Mapping[str, Any]]) -> tuple[dict[str, Line], list[Line]]:
    if isinstance(metrics, (str, Path)):
        metrics = read_metrics(metrics)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        if "step" in row:
            for name, value in _numbers(row):
                points.setdefault(name, []).append((row["step"], value))
    lines = {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in points.items()}
    losses = {n: line for n, line in lines.items() if "loss" in n.lower() and "weight" not in n.lower()}
    return losses, [line for n, line in lines.items() if n.endswith("tokens_per_second")]


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value):
            yield prefix + key, float(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a window of a thirtieth of the run, centred, narrower at both ends."""
    half = max(1, len(values) // 60)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
