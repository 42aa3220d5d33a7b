"""Where reading and drawing diverge: the same picture's tokens, layer by layer, when it is read to be described and
when it is drawn from its description (SynerGen-VL, arXiv 2412.09604, figures 4 and 5).

``similarity``: u is the output of layer l (the residual stream) at a picture token of the request to describe, g the
same where the picture is the teacher-forced target of its caption. The measure is the mean of cos(u, g) over tokens,
then over pictures. Reading is causal and the question follows the picture, so u depends on the picture alone. Only the
caption before the picture, its positions, and the training objective of these tokens differ.

``locality``: of the attention from picture tokens to picture tokens, averaged over heads and renormalised per query:

    locality   mass within one row and one column of the query
    distance   mean Euclidean distance, in tokens
    lag t      mean weight of the t-th token before; ``periodicity`` is that of one row up over the median of its
               neighbours
    to text    mass that picture tokens put on everything else

``even`` is the value of even causal attention. Both need a family that reads and draws a picture as the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from diptych.analysis import collect
from diptych.core import intervals
from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.tensors import NONE, Float, Tensor
from diptych.models.protocol import UnifiedModel
from diptych.parts.attention import inverse_permutation

INSTRUCTION = "Provide a one-sentence caption for the image"
TASKS = ("understanding", "generation")


@dataclass(frozen=True, eq=False)
class Pair:
    """One picture in its two roles: two layouts, the positions of its tokens in each, and the grid of the tokens."""

    picture: PIL.Image.Image
    caption: str
    sequences: tuple[Layout, Layout]
    places: tuple[Tensor, Tensor]
    grid: tuple[int, int]


def pair(model: UnifiedModel, sample: Sample) -> Pair:
    """The two roles of a sample that asks for a picture and shows it. The picture to read is cropped and resized as for
    drawing. Raises ``ValueError`` for another sample, and where the picture is not the same tokens in both."""
    targets = [p for p in sample.images() if p.role == "target"]
    caption = sample.prompt
    if len(targets) != 1 or not caption or len(list(sample.images())) != 1:
        raise ValueError(f"sample {sample.id!r} does not ask for one picture in words; choose a data set of drawings")
    drawn = model.lay_out(Sample("drawn", (user(caption), assistant(targets[0]))))
    shown = [(s.kind, s.image) for s in drawn.segments if s.image is not None]
    if len(shown) != 1 or shown[0][0] != Kind.CODES:
        raise ValueError(f"family {model.family!r} does not read pictures as the tokens that it draws")
    drawn_image = shown[0][1]
    picture = PIL.Image.fromarray(drawn_image[0].permute(1, 2, 0).numpy())
    read = model.lay_out(Sample("read", (user(Image(picture), INSTRUCTION), assistant())))
    read_image, grid = next((s.image, s.grid) for s in read.segments if s.image is not None)
    assert grid is not None, "a picture's codes lie on a grid"
    if not torch.equal(read_image, drawn_image):
        raise ValueError(
            f"{model.family} draws sample {sample.id!r} as {picture.width} x {picture.height} pixels and would read "
            "these otherwise (in tiles, or stretched); choose pictures of the one side at which it reads"
        )
    places = tuple(
        torch.tensor([i for i, token in enumerate(t for s in layout.segments for t in s.ids) if token == NONE])
        for layout in (read, drawn)
    )
    return Pair(picture, caption, (read, drawn), (places[0], places[1]), grid)


# ---- similarity ------------------------------------------------------------------------------------------------------


def states(model: UnifiedModel, sequence: Layout, places: Tensor) -> Float[Tensor, "L n d"]:
    """The input of the first layer, the output of each layer, and that of the final norm, at the given places of a
    sequence."""
    layers, kept = collect.layers(model), []
    norm = model.get_submodule("decoder.norm")
    modules = {str(i): layer for i, layer in enumerate(layers)} | {"norm": norm}
    first = layers[0].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].detach()))
    try:
        with collect.outputs(modules, lambda name, out: kept.append(out)):
            model.extend([model.open()], [sequence])
    finally:
        first.remove()
    rank = inverse_permutation(torch.cat(pack([sequence], model.routes).routes))[places]
    return torch.stack([x[rank.to(x.device)].float().cpu() for x in kept])


def similarity(model: UnifiedModel, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row for the inputs (layer 0), each layer, and the final norm ("norm"): means over pictures of ``same`` (with
    its 95 % interval), of ``centred`` (each task's mean subtracted) and of the control ``other`` (one picture read,
    another drawn).

    Raises ``ValueError`` for fewer than two samples and as ``pair`` does."""
    if len(samples) < 2:
        raise ValueError("similarity needs two pictures or more")
    pairs = [pair(model, s) for s in samples]
    if len({p.grid for p in pairs}) > 1:
        raise ValueError("similarity needs pictures of one size")
    u, g = (
        torch.stack([states(model, p.sequences[t], p.places[t]) for p in pairs]) for t in (0, 1)
    )  # (pictures, layers, tokens, d)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(a, b, -1).mean(-1)  # (pictures, layers)

    same, other = cosine(u, g), cosine(u, g.roll(1, 0))
    names = [*range(same.shape[1] - 1), "norm"]
    centred = cosine(*(x - x.mean((0, 2), keepdim=True) for x in (u, g)))
    return [
        {
            "layer": name,
            "same": dict(zip(("value", "low", "high"), _rounded(intervals.mean(same[:, i].tolist())), strict=True)),
            "centred": round(float(centred[:, i].mean()), 6),
            "other": round(float(other[:, i].mean()), 6),
        }
        for i, name in enumerate(names)
    ]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(v), 6) for v in values]


# ---- locality --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Local:
    """Measures by task and layer, means over pictures; ``maps`` are the first picture's whole attention by task,
    (layers, T, T)."""

    rows: dict[str, list[dict[str, float]]]
    even: dict[str, float]
    lags: dict[str, np.ndarray]  # (layers, tokens)
    maps: dict[str, np.ndarray]
    first: Pair

    def to_json(self) -> dict[str, Any]:
        """Rows by task, and the values of even causal attention."""
        return {
            "grid": list(self.first.grid),
            "even": self.even,
            "tasks": {
                task: [
                    {"layer": i + 1} | row | {"lags": _rounded(self.lags[task][i].tolist())}
                    for i, row in enumerate(self.rows[task])
                ]
                for task in TASKS
            },
        }


def locality(model: UnifiedModel, samples: Sequence[Sample]) -> Local:
    """How local the attention among a picture's tokens is, in reading and in drawing. Raises ``ValueError`` for no
    samples, for pictures of several sizes, and as ``pair`` does."""
    if not samples:
        raise ValueError("locality needs pictures")
    pairs = [pair(model, s) for s in samples]
    if len({p.grid for p in pairs}) > 1:
        raise ValueError("locality needs pictures of one size")
    rows, columns = pairs[0].grid
    n = rows * columns
    at = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1).float()
    near = (at[:, None] - at[None]).abs().amax(-1) <= 1
    far = torch.cdist(at[None], at[None])[0]
    causal = torch.ones(n, n).tril()
    even = _measure((causal / causal.sum(1, keepdim=True)).double(), near, far, columns)
    by_task: dict[str, list[list[dict[str, float]]]] = {t: [] for t in TASKS}
    lags: dict[str, list[list[np.ndarray]]] = {t: [] for t in TASKS}
    maps: dict[str, np.ndarray] = {}
    for number, p in enumerate(pairs):
        for task, sequence, places in zip(TASKS, p.sequences, p.places, strict=True):
            calls: list[Tensor] = []
            collect.read(model, sequence, lambda layer, call, calls=calls: calls.append(call.weights().mean(0).cpu()))  # type: ignore[misc]
            if not number:
                maps[task] = torch.stack(calls).numpy()
            inside = [w[places][:, places].double() for w in calls]
            mass = [w.sum(1) for w in inside]
            each = [w / m[:, None] for w, m in zip(inside, mass, strict=True)]
            measured = [_measure(w, near, far, columns) for w in each]
            by_task[task].append([m | {"to text": float(1 - k.mean())} for m, k in zip(measured, mass, strict=True)])
            lags[task].append([_lags(w) for w in each])
    means = {
        task: [
            {k: round(float(np.mean([p[i][k] for p in pictures])), 6) for k in pictures[0][i]}
            for i in range(len(pictures[0]))
        ]
        for task, pictures in by_task.items()
    }
    spectrum = {task: np.mean(np.array(pictures), 0) for task, pictures in lags.items()}
    return Local(means, {k: round(v, 6) for k, v in even.items()}, spectrum, maps, pairs[0])


def _measure(w: Tensor, near: Tensor, far: Tensor, columns: int) -> dict[str, float]:
    """Locality, distance and periodicity of (n, n) weights whose rows sum to 1."""
    lags = _lags(w)
    around = [lags[t] for t in (columns - 2, columns - 1, columns + 1, columns + 2) if 0 < t < len(lags)]
    up = lags[columns] if columns < len(lags) else 0.0
    return {
        "locality": float((w * near).sum(1).mean()),
        "distance": float((w * far).sum(1).mean()),
        "periodicity": float(up / np.median(around)) if around and np.median(around) > 0 else 0.0,
    }


def _lags(w: Tensor) -> np.ndarray:
    """(n,) mean weight of the t-th token before the query, over the queries that have one."""
    return np.array([float(torch.diagonal(w, -t).mean()) for t in range(len(w))])
