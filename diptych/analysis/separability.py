"""How well look-alikes are separated by their features: after the vision encoder, after the projector, in the decoder
(the separability analysis of SGT, arXiv 2605.18714).

A picture's feature is the mean over its tokens, divided by its length. On labelled pictures:

- ``accuracy``: logistic regression, stratified five-fold cross-validation, with Wilson's interval over the pictures
- ``ratio``: linear discriminant ratio trace(S_b) / trace(S_w) (Fisher 1936; between over within classes)
- ``silhouette``: mean over pictures of (b - a) / max(a, b) (Rousseeuw 1987)
- ``tsne``: a map in two dimensions (van der Maaten and Hinton 2008), exact, fixed seed, perplexity 30

The formulas are short, so they are written out here, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from diptych.analysis import collect
from diptych.core import intervals
from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.sample import Image, Sample, user
from diptych.core.tensors import NONE, Float, Int, Tensor
from diptych.models.protocol import UnifiedModel

PERPLEXITY, FOLDS = 30.0, 5

# ---- labelled pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Labelled:
    """Pictures, and the index of each one's class in ``classes``."""

    pictures: tuple[PIL.Image.Image, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def labels_tensor(self) -> Int[Tensor, " N"]:
        """The class number of every picture, (N,) int64."""
        return torch.tensor(self.labels)


def _emoji(rng: np.random.Generator, name: str, size: int) -> PIL.Image.Image:
    """The emoji at a random size and place on white."""
    from diptych.data.worlds import emoji

    side = int(rng.integers(size // 2, size * 7 // 8 + 1))
    left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
    paper = PIL.Image.new("RGB", (size, size), "white")
    paper.paste(emoji.render(emoji.find(name), side), (left, top))
    return paper


def _scene(rng: np.random.Generator, name: str, size: int) -> PIL.Image.Image:
    """The named kinds ("blue circle, red star"), one extra object at most, in random places."""
    from diptych.data.worlds import shapes

    kinds = [tuple(k.split()) for k in name.split(", ")]
    if len(kinds) == 1 and rng.random() < 0.5:
        kinds.append(("green", "cross"))
    cells = [((i % 3 + 0.5) / 3, (i // 3 + 0.5) / 3) for i in rng.permutation(9)[: len(kinds)]]
    things = []
    for (colour, shape), (x, y) in zip(kinds, cells, strict=True):
        dx, dy = rng.uniform(-0.02, 0.02, 2)
        things.append(shapes.Thing(shape, colour, x + dx, y + dy, float(rng.uniform(0.23, 0.29))))
    return shapes.render(shapes.Scene(tuple(things)), size)


Maker = Callable[[np.random.Generator, str, int], PIL.Image.Image]
SETS: dict[str, tuple[Maker, tuple[str, ...]]] = {  # look-alike classes of the embedded worlds
    "emoji/fruit": (_emoji, ("red-apple", "tomato", "peach", "cherries", "tangerine")),
    "emoji/animals": (_emoji, ("dog-face", "wolf", "fox", "bear", "koala", "panda")),
    "emoji/clocks": (_emoji, ("one-oclock", "two-oclock", "three-oclock", "nine-oclock", "ten-oclock")),
    "shapes/colours": (_scene, ("blue circle", "purple circle", "black circle")),
    "shapes/outlines": (_scene, ("red circle", "red square", "red triangle", "red star", "red cross")),
    "shapes/swapped": (_scene, ("blue circle, red star", "red circle, blue star")),
}


def labelled(name: str, each: int = 40, size: int = 64, seed: int = 0) -> Labelled:
    """``each`` pictures of every class of an embedded set (``SETS``), ``size`` pixels square; a function of the seed.

    No two are equal, so that no test picture has a copy in the training folds.
    Raises ``ValueError`` for an unknown set."""
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; choose from {', '.join(SETS)}, or give a folder of your own pictures")
    make, classes = SETS[name]
    rng = np.random.default_rng((seed, list(SETS).index(name)))
    labels = tuple(i for i in range(len(classes)) for _ in range(each))
    pictures: dict[bytes, PIL.Image.Image] = {}
    for i in labels:
        while (picture := make(rng, classes[i], size)).tobytes() in pictures:
            pass
        pictures[picture.tobytes()] = picture
    return Labelled(tuple(pictures.values()), labels, classes)


def folder(path: str | Path, each: int | None = None) -> Labelled:
    """Pictures of your own: one sub-folder a class, its name the class; the first ``each`` of every class by path.

    Raises ``ValueError`` for a folder with fewer than two classes."""
    from diptych.data import sources

    classes = sorted(p.name for p in Path(path).iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(
            f"{str(path)!r} needs two or more sub-folders, one a class; it has {', '.join(classes) or 'none'}"
        )
    pictures: list[PIL.Image.Image] = []
    labels: list[int] = []
    for i, name in enumerate(classes):
        source = sources.images(name, Path(path) / name)
        some = range(len(source) if each is None else min(each, len(source)))
        pictures += [image.pixels for k in some for image in source[k].images()]
        labels += [i] * len(some)
    return Labelled(tuple(pictures), tuple(labels), tuple(classes))


# ---- features --------------------------------------------------------------------------------------------------------


def points(model: UnifiedModel) -> tuple[str, ...]:
    """The default points: ``vision`` and ``projector`` where the family has them, and the first, middle and last
    layer."""
    last = len(collect.layers(model)) - 1
    parts = [p for p in ("vision", "projector") if collect.is_point(model, p)]
    return (*parts, *(f"layer.{i}" for i in sorted({0, last // 2, last})))


def features(
    model: UnifiedModel, pictures: Sequence[PIL.Image.Image], at: Sequence[str], batch_size: int = 16
) -> dict[str, Float[Tensor, "N d"]]:
    """L2-normalised means over each picture's tokens at every point (``collect.module`` says which there are), float64.

    A part's output is averaged over all its tokens; a layer's over the picture's tokens without markers. Raises
    ``ValueError`` for an unknown point, and for a module that does not run once (a part may run once for each picture).
    """
    modules = {name: collect.module(model, name) for name in at}
    groups: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture.size, []).append(i)
    by_point: dict[str, dict[int, Tensor]] = {name: {} for name in at}
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            some = members[start : start + batch_size]
            for name, means in _read(model, [pictures[i] for i in some], modules).items():
                by_point[name] |= zip(some, means, strict=True)
    every = range(len(pictures))
    return {
        name: F.normalize(torch.stack([rows[i] for i in every]).double(), dim=-1) for name, rows in by_point.items()
    }


def _read(
    model: UnifiedModel, pictures: Sequence[PIL.Image.Image], modules: Mapping[str, torch.nn.Module]
) -> dict[str, Tensor]:
    """(pictures, d) means at every point, for pictures of one size read together."""
    sequences = [model.lay_out(Sample(f"picture/{i}", (user(Image(p)),))) for i, p in enumerate(pictures)]
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    with collect.outputs(modules, lambda name, out: kept[name].append(out.float().cpu())):
        model.extend([model.open() for _ in sequences], sequences)
    batch = pack(sequences, model.routes)
    order, n = torch.cat(batch.routes), len(pictures)
    kind = torch.tensor([s.kind != Kind.TEXT for q in sequences for s in q.segments for _ in s.ids])
    member = torch.stack([(batch.document == i) & (batch.ids == NONE) & kind for i in range(n)])[:, order]
    out: dict[str, Tensor] = {}
    for name, calls in kept.items():
        layer = name.startswith("layer.")
        if len(calls) != 1 and (layer or len(calls) != n):
            raise ValueError(f"reading {n} pictures of one size runs {name!r} {len(calls)} times, not once")
        rows = torch.cat([c.flatten(0, -2) for c in calls])
        if len(rows) != member.shape[1] if layer else len(rows) % n:
            raise ValueError(
                f"{name!r} gives {len(rows)} tokens for {n} pictures of one size, which do not divide evenly"
            )
        if layer:
            out[name] = member.float() / member.sum(1, keepdim=True) @ rows
        else:
            out[name] = rows.unflatten(0, (n, -1)).mean(1)
    return out


# ---- measures --------------------------------------------------------------------------------------------------------


def folds(labels: Int[Tensor, " N"], k: int = FOLDS, seed: int = 0) -> Int[Tensor, " N"]:
    """The fold of each item: every class is dealt out evenly, in a random order. Raises ``ValueError`` for a class of
    fewer than ``k``."""
    generator, fold = torch.Generator().manual_seed(seed), torch.empty_like(labels)
    for c in labels.unique():
        members = (labels == c).nonzero()[:, 0]
        if len(members) < k:
            raise ValueError(f"class {int(c)} has {len(members)} pictures; {k}-fold cross-validation needs {k}")
        fold[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % k
    return fold


def logistic(
    x: Float[Tensor, "N d"], labels: Int[Tensor, " N"], penalty: float = 1.0
) -> Callable[[Tensor], Int[Tensor, " M"]]:
    """A classifier of (M, d) rows: softmax regression that minimises the summed cross-entropy + penalty/2 |W|^2.

    Columns are standardised with the training rows' mean and deviation; the offset is not penalised. Convex, so LBFGS
    from zero finds the one minimum."""
    x = x.double()
    centre, spread = x.mean(0), x.std(0).clamp_min(1e-12)
    classes = int(labels.max()) + 1
    with torch.inference_mode(False), torch.enable_grad():
        rows = ((x - centre) / spread).clone()
        W = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(rows @ W + b, labels, reduction="sum") + penalty / 2 * W.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    W, b = W.detach(), b.detach()
    return lambda new: ((new.double() - centre) / spread @ W + b).argmax(-1)


def accuracy(
    x: Float[Tensor, "N d"], labels: Int[Tensor, " N"], k: int = FOLDS, seed: int = 0
) -> tuple[float, float, float]:
    """(share right, low, high): each item is judged by a classifier that has not seen it."""
    fold, right = folds(labels, k, seed), 0
    for i in range(k):
        held = fold == i
        right += int((logistic(x[~held], labels[~held])(x[held]) == labels[held]).sum())
    return intervals.wilson(right, len(labels))


def discriminant_ratio(x: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> float:
    """trace(S_b) / trace(S_w): squared distances of class means from the mean (once for each item), over squared
    distances of items from their class mean."""
    x = x.double()
    means = torch.stack([x[labels == c].mean(0) for c in range(int(labels.max()) + 1)])[labels]
    return float((means - x.mean(0)).square().sum() / (x - means).square().sum())


def silhouette(x: Float[Tensor, "N d"], labels: Int[Tensor, " N"]) -> float:
    """Mean of (b - a) / max(a, b): a is the mean distance to the own class (itself left out), b to the nearest other
    class. A class of one item counts 0."""
    x = x.double()
    member = F.one_hot(labels).double()
    sums, sizes = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") @ member, member.sum(0)
    same_class = member.bool()
    a = sums[same_class] / (sizes[labels] - 1).clamp_min(1)
    b = (sums / sizes).masked_fill(same_class, torch.inf).amin(1)
    score = torch.where(sizes[labels] > 1, (b - a) / torch.maximum(a, b).clamp_min(1e-300), torch.zeros_like(a))
    return float(score.mean())


def tsne(
    x: Float[Tensor, "N d"], perplexity: float = PERPLEXITY, seed: int = 0, steps: int = 750
) -> Float[Tensor, "N 2"]:
    """Exact t-SNE: Gaussian neighbourhoods of the given perplexity, Student-t in the plane, gradient descent with
    momentum and gains, early exaggeration 12 for a third of the steps. Raises ``ValueError`` for too few points."""
    n = len(x)
    if n <= 3 * perplexity:
        raise ValueError(f"t-SNE of perplexity {perplexity:g} needs more than {3 * perplexity:g} points, not {n}")
    P = _neighbours(x.double().numpy(), perplexity)
    y = np.random.default_rng(seed).normal(0, 1e-4, (n, 2))
    move, gain, rate = np.zeros_like(y), np.ones_like(y), max(n / 48, 50.0)
    for step in range(steps):
        early = step < steps // 3
        student = 1 / (1 + _squared(y))
        np.fill_diagonal(student, 0)
        pull = (P * (12 if early else 1) - student / student.sum()) * student
        gradient = 4 * (pull.sum(1)[:, None] * y - pull @ y)
        gain = np.where(np.sign(gradient) == np.sign(move), gain * 0.8, gain + 0.2).clip(0.01)
        move = (0.5 if early else 0.8) * move - rate * gain * gradient
        y = y + move - (y + move).mean(0)
    return torch.from_numpy(y)


def _squared(x: np.ndarray) -> np.ndarray:
    """(N, N) squared distances."""
    length = (x * x).sum(1)
    return np.maximum(length[:, None] + length[None] - 2 * x @ x.T, 0)


def _neighbours(x: np.ndarray, perplexity: float) -> np.ndarray:
    """(N, N) symmetric neighbour probabilities that sum to 1; every row's precision is found by bisection."""
    D, n = _squared(x), len(x)
    D = D / D.mean()
    np.fill_diagonal(D, np.inf)
    low, high = np.full(n, -30.0), np.full(n, 30.0)  # of the precision's logarithm
    for _ in range(60):
        middle = (low + high) / 2
        p = np.exp(-(D - D.min(1, keepdims=True)) * np.exp(middle)[:, None])
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        flat = entropy > np.log(perplexity)
        low, high = np.where(flat, middle, low), np.where(flat, high, middle)
    return (p + p.T) / (2 * n)


def separability(
    model: UnifiedModel, data: Labelled, at: Sequence[str] | None = None, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, Float[Tensor, "N d"]]]:
    """(measures, features) by point. Measures: accuracy (value, low, high), chance (the largest class's share),
    discriminant_ratio and silhouette."""
    vectors, labels = features(model, data.pictures, at or points(model)), data.labels_tensor()
    chance = float(labels.bincount().max() / len(labels))
    named = partial(zip, ("value", "low", "high"), strict=True)
    measures = {
        name: {
            "accuracy": {k: round(v, 6) for k, v in named(accuracy(x, labels, seed=seed))},
            "chance": round(chance, 6),
            "discriminant_ratio": round(discriminant_ratio(x, labels), 6),
            "silhouette": round(silhouette(x, labels), 6),
        }
        for name, x in vectors.items()
    }
    return measures, vectors
