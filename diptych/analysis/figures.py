"""Figures of the probes: measures by point, t-SNE maps, attention by layer, keyword shares by layer and step."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diptych.data.written import MARK

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
MARKS = "osD^vP*Xph"
Models = Mapping[str, Any]  # name of a model -> its numbers; the base, where there is one, comes last


def _figure(rows: int, columns: int, size: tuple[float, float], draw: Callable[[Any, np.ndarray], None]) -> bytes:
    """PNG bytes of a figure whose axes, (rows, columns), ``draw(figure, axes)`` fills."""
    import matplotlib.pyplot as plt  # heavy
    from matplotlib.figure import Figure

    with plt.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        draw(figure, axes)
        for ax in axes.flat:
            ax.set_axisbelow(True)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": MARK})
    return out.getvalue()


def separability(models: Models, title: str) -> bytes:
    """Accuracy (with interval and chance), discriminant ratio and silhouette by point; a colour a model."""

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        panels = {
            "accuracy": "accuracy of a linear probe",
            "discriminant_ratio": "tr S_b / tr S_w",
            "silhouette": "silhouette",
        }
        wide = 0.8 / len(models)
        for ax, (key, label) in zip(axes[0], panels.items(), strict=True):
            for m, (name, measures) in enumerate(models.items()):
                at = np.arange(len(measures)) + (m - (len(models) - 1) / 2) * wide
                rows = [row[key] for row in measures.values()]
                values = [row["value"] if key == "accuracy" else row for row in rows]
                ax.bar(at, values, wide * 0.94, color=f"C{m}", label=name)
                if key == "accuracy":
                    ends = [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]]
                    ax.errorbar(at, values, ends, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
            points = list(next(iter(models.values())))
            ax.set_xticks(range(len(points)), points, rotation=30, ha="right")
            ax.set_title(label)
            ax.grid(axis="y", alpha=0.25, linewidth=0.6)
            ax.axhline(0, color="0.2", linewidth=0.8)
        chance = next(iter(next(iter(models.values())).values()))["chance"]
        axes[0, 0].axhline(chance, color="0.35", linewidth=1, linestyle=":")
        axes[0, 0].set_ylim(0, 1.18)
        axes[0, 0].annotate("chance", (1, chance), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        if len(models) > 1:
            axes[0, 0].legend(frameon=False, loc="upper left", ncols=2, fontsize=8)

    return _figure(1, 3, (10.0, 3.6), draw)


def maps(models: Models, labels: Sequence[int], classes: Sequence[str], title: str) -> bytes:
    """t-SNE maps, a row a model and a column a point; ``models`` maps a name to {point: (N, 2)}."""
    points = list(next(iter(models.values())))
    number = np.asarray(labels)

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        for row, (name, planes) in zip(axes, models.items(), strict=True):
            for ax, (point, plane) in zip(row, planes.items(), strict=True):
                for c, label in enumerate(classes):
                    some = np.asarray(plane)[number == c]
                    ax.scatter(
                        *some.T,
                        s=15,
                        marker=MARKS[c % len(MARKS)],
                        color=f"C{c % 10}",
                        label=label,
                        alpha=0.8,
                        linewidths=0,
                    )
                ax.set(xticks=[], yticks=[], title=point)
                ax.spines[:].set_visible(True)
                ax.spines[:].set_color("0.8")
            row[0].set_ylabel(name)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(classes), 6), frameon=False, fontsize=9)

    return _figure(len(models), len(points), (2.3 * len(points) + 0.4, 2.4 * len(models) + 0.9), draw)


def attention(models: Models, changes: Sequence[Mapping[str, float | None]] | None, title: str) -> bytes:
    """A_V and A_T by layer with intervals; with ``changes``, below, the percent by which A_V differs from the base's.

    ``models`` maps a name to the rows of ``Allocation.to_json``, or to a list of numbers for the published variant."""

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        ax = axes[0, 0]
        for m, (name, rows) in enumerate(models.items()):
            if not isinstance(rows[0], Mapping):
                ax.plot(range(len(rows)), rows, color=f"C{m}", linestyle=":", marker="x", label=name)
                continue
            for key, style, filled in (("picture", "-", True), ("text", "--", False)):
                values = [r[key]["value"] for r in rows]
                label = f"{name}: on the {key}" if len(models) > 1 else f"on the {key}"
                ax.plot(
                    range(len(rows)),
                    values,
                    style,
                    color=f"C{m}",
                    marker="o",
                    markersize=4,
                    markerfacecolor=f"C{m}" if filled else "w",
                    label=label,
                )
                if rows[0][key]["low"] is not None:
                    ax.fill_between(
                        range(len(rows)),
                        [r[key]["low"] for r in rows],
                        [r[key]["high"] for r in rows],
                        color=f"C{m}",
                        alpha=0.13,
                        linewidth=0,
                    )
        ax.set(ylim=(0, 1.02), ylabel="attention mass")
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        if changes:
            # a single request has no interval: low and high are None, here NaN
            change, low, high = (np.array([c[key] for c in changes], float) for key in ("value", "low", "high"))
            axes[1, 0].bar(range(len(change)), change, 0.6, color=["C0" if v >= 0 else "C3" for v in change])
            if not np.isnan(low).any():
                ends = [change - low, high - change]
                axes[1, 0].errorbar(range(len(change)), change, ends, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
            axes[1, 0].axhline(0, color="0.2", linewidth=0.8)
            axes[1, 0].set_ylabel("change of picture\nmass, % of the base")
        layers = len(next(iter(models.values())))
        for ax in axes[:, 0]:
            ax.set_xticks(range(0, layers, max(1, layers // 14)))
            ax.set_xlim(-0.5, layers - 0.5)
            ax.grid(alpha=0.25, linewidth=0.6)
        axes[-1, 0].set_xlabel("layer")

    return _figure(2 if changes else 1, 1, (8.6, 5.6 if changes else 3.4), draw)


def similarity(models: Models, title: str) -> bytes:
    """Cosine of a picture read and drawn by layer: the same picture (with its interval), mean-centred, another picture.
    ``models`` maps a name to the rows of ``layers.similarity``; a colour a model."""

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        ax = axes[0, 0]
        for m, (name, rows) in enumerate(models.items()):
            at, prefix = range(len(rows)), f"{name}: " if len(models) > 1 else ""
            ax.set_xticks(at, [str(r["layer"]) for r in rows])
            ax.plot(
                at, [r["same"]["value"] for r in rows], "-o", color=f"C{m}", markersize=4, label=f"{prefix}same picture"
            )
            ax.fill_between(
                at,
                [r["same"]["low"] for r in rows],
                [r["same"]["high"] for r in rows],
                color=f"C{m}",
                alpha=0.15,
                linewidth=0,
            )
            ax.plot(at, [r["centred"] for r in rows], "--", color=f"C{m}", label=f"{prefix}mean-centred")
            ax.plot(at, [r["other"] for r in rows], ":", color=f"C{m}", label=f"{prefix}another picture")
        ax.set(
            xlabel="layer (0: inputs)",
            ylabel="cosine of a picture token read\nand the same token drawn",
            ylim=(-0.1, 1.05),
        )
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return _figure(1, 1, (8.2, 3.6), draw)


def locality(models: Models, title: str) -> bytes:
    """Locality, distance, periodicity and mass on everything else by layer, reading (solid) and drawing (dashed);
    ``models`` maps a name to ``layers.Local``."""

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        panels = {
            "locality": "mass within one token",
            "distance": "mean distance, tokens",
            "periodicity": "one row up / its neighbours",
            "to text": "mass off the picture",
        }
        for ax, (key, label) in zip(axes[0], panels.items(), strict=True):
            for m, (name, local) in enumerate(models.items()):
                for style, (task, rows) in zip(("-o", "--s"), local.rows.items(), strict=True):
                    line_name = f"{name}: {task}" if len(models) > 1 else task
                    ax.plot(
                        range(1, len(rows) + 1),
                        [r[key] for r in rows],
                        style,
                        color=f"C{m}",
                        markersize=4,
                        label=line_name,
                    )
                if key in local.even and m == 0:
                    ax.axhline(local.even[key], color="0.4", linewidth=1, linestyle=":", label="even causal attention")
            ax.set(title=label, xlabel="layer", ylim=(0, None))
            ax.grid(alpha=0.25, linewidth=0.6)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)

    return _figure(1, 4, (11.5, 3.3), draw)


def regions(local: Any, title: str, shown: int = 4) -> bytes:
    """Whole attention maps of up to ``shown`` layers for reading and drawing (white lines part before, picture, after),
    and below each the picture with what its middle token attends to. ``local`` is a ``layers.Local``."""
    layers = len(next(iter(local.maps.values())))
    chosen = sorted({round(i) for i in np.linspace(0, layers - 1, min(shown, layers))})
    rows, columns = local.first.grid
    query = (rows // 2) * columns + columns // 2

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        for t, (task, maps) in enumerate(local.maps.items()):
            places = local.first.places[t].numpy()
            for ax, below, layer in zip(axes[2 * t], axes[2 * t + 1], chosen, strict=True):
                w = maps[layer]
                ax.imshow(np.sqrt(w / w.max(1, keepdims=True)), cmap="magma", vmin=0, vmax=1)
                for edge in (places[0] - 0.5, places[-1] + 0.5):
                    ax.axhline(edge, color="w", linewidth=0.7)
                    ax.axvline(edge, color="w", linewidth=0.7)
                ax.set(title=f"{task}, layer {layer + 1}", xticks=[], yticks=[])
                on = w[places[query], places].reshape(rows, columns)
                below.imshow(local.first.picture, extent=(0, columns, rows, 0), aspect="auto")
                blue = np.zeros((rows, columns))
                below.imshow(
                    blue, extent=(0, columns, rows, 0), aspect="auto", cmap="Blues", vmin=-1, alpha=0.85 * on / on.max()
                )
                below.add_patch(_square(query % columns, query // columns))
                below.set(xticks=[], yticks=[])

    return _figure(4, len(chosen), (2.4 * len(chosen), 9.2), draw)


def _square(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor="red", linewidth=1.6)


def keywords(models: Models, title: str) -> bytes:
    """Shares of word classes by layer, a column a step and a row a model; at the right their means over steps and
    layers, with the share that even attention would give. ``models`` maps a name to ``Keywords``."""
    first = next(iter(models.values()))
    steps = len(first.steps)

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        top = 1.08 * max(float(k.share.mean(0).max()) for k in models.values())
        for row, (name, k) in zip(axes, models.items(), strict=True):
            share, layers = k.share.mean(0), np.arange(k.share.shape[2])
            for s, ax in enumerate(row[:-1]):
                for c, word in enumerate(k.classes):
                    mark = MARKS[c % len(MARKS)]
                    ax.plot(layers, share[s, :, c], marker=mark, markersize=4, color=f"C{c}", label=word)
                t = "" if k.times[s] is None else f", t = {k.times[s]:.2f}"
                ax.set(title=f"step {k.steps[s] + 1}{t}", ylim=(0, top), xlabel="layer")
                ax.set_xticks(layers[:: max(1, len(layers) // 7)])
                ax.grid(alpha=0.25, linewidth=0.6)
                if s:
                    ax.set_yticklabels([])
            row[0].set_ylabel(f"{name}\nshare of attention\nto words, %")
            means, at = share.mean((0, 1)), np.arange(len(k.classes))
            row[-1].bar(at, means, 0.66, color=[f"C{c}" for c in at])
            row[-1].plot(
                at, k.even, linestyle="", marker="_", markersize=18, markeredgewidth=1.6, color="0.15", label="even"
            )
            for x, v in zip(at, means, strict=True):
                row[-1].text(x, 0.6, f"{v:.1f}", ha="center", va="bottom", fontsize=8, color="w")
            row[-1].set_xticks(at, k.classes, rotation=30, ha="right")
            row[-1].set_title("all steps and layers")
            row[-1].legend(frameon=False, fontsize=8)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)

    return _figure(len(models), steps + 1, (2.2 * (steps + 1) + 0.9, 2.5 * len(models) + 0.8), draw)


def gates(models: Models, prompts: Sequence[str], title: str, shown: int = 4, columns: int = 6) -> bytes:
    """Above, by time: how far the gate is open, and how well its size follows the contours of the finished picture.
    Below, one row a picture: the gate's size at some times (one scale a picture), and the picture. ``models`` maps a
    name to ``Gates``; the maps are the first model's."""
    import matplotlib.pyplot as plt

    first = next(iter(models.values()))
    some = range(min(shown, len(first.values)))
    steps = np.unique(np.linspace(0, len(first.times) - 1, columns).round().astype(int))

    def draw(figure: Any, axes: np.ndarray) -> None:
        figure.suptitle(title, fontsize=10)
        grid = axes[0, 0].get_gridspec()
        for ax in axes[0]:
            ax.remove()
        half = (len(steps) + 1) // 2
        opened, followed = figure.add_subplot(grid[0, :half]), figure.add_subplot(grid[0, half:])
        for m, (name, g) in enumerate(models.items()):
            time = 1 - np.asarray(g.times)
            for ax, values in ((opened, g.activity), (followed, g.contours)):
                ax.plot(time, np.nanmean(values, 0), color=f"C{m}", marker="o", markersize=3, label=name)
                low, high = np.nanquantile(values, [0.25, 0.75], axis=0)
                ax.fill_between(time, low, high, color=f"C{m}", alpha=0.15, linewidth=0)
        opened.set(title="mean |gate| (band: half of the pictures)", xlabel="noise  →  data")
        followed.set(title="correlation of |gate| with contours", xlabel="noise  →  data")
        for ax in (opened, followed):
            ax.grid(alpha=0.25, linewidth=0.6)
        if len(models) > 1:
            opened.legend(frameon=False, fontsize=8)
        for row, i in zip(axes[1:], some, strict=True):
            sizes = np.abs(first.values[i])
            for ax, s in zip(row, steps, strict=False):
                ax.imshow(sizes[s], cmap="magma", vmin=0, vmax=float(sizes.max()) or 1.0)
                ax.set_title(f"{1 - first.times[s]:.2f}" if i else f"data share {1 - first.times[s]:.2f}", fontsize=8)
            row[-1].imshow((first.pictures[i].permute(1, 2, 0).numpy() + 1) / 2)
            row[-1].set_title(prompts[i] if len(prompts[i]) < 26 else prompts[i][:24] + " ...", fontsize=7)
            for ax in row:
                ax.set(xticks=[], yticks=[])

    width = len(steps) + 1
    with plt.rc_context({"axes.spines.left": True}):
        return _figure(1 + len(some), width, (1.5 * width, 1.9 + 1.6 * len(some)), draw)
