"""How well a drawn label picture agrees with the truth: region overlap, boundaries, found objects, depth.

A drawing is read by its task (``data.tasks.Task.decode``) and compared with what the target says in the same way, at
the target's size. Ids are (h, w) integers, 0 for nothing.
"""

from __future__ import annotations

from math import log10

import numpy as np
import PIL.Image

from diptych.core.sample import Sample
from diptych.data.canvas import rgb
from diptych.data.tasks.ladder import find

FREE = ("instance", "segment")  # tasks whose ids name nothing: regions are matched by overlap
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # of overlap, as in COCO
STRONG = 64  # grey from which on an edge counts


def overlaps(drawn: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The intersection over union of every region of the truth with every drawn one: ((t, d) floats, the t ids, the d
    ids). Raises ``ValueError`` when the shapes differ."""
    if drawn.shape != truth.shape:
        raise ValueError(f"the drawing is {drawn.shape}, the truth {truth.shape}")
    (a, rows), (b, columns) = (np.unique(x, return_inverse=True) for x in (truth, drawn))
    both = np.bincount(rows.ravel() * len(b) + columns.ravel(), minlength=len(a) * len(b)).reshape(len(a), len(b))
    union = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
    return (both / union)[np.ix_(a != 0, b != 0)], a[a != 0], b[b != 0]


def assign(gain: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column) of a (t, d) matrix, each used once, with the largest total gain: the Hungarian method, by
    shortest augmenting paths."""
    if gain.shape[0] > gain.shape[1]:
        return sorted((i, j) for j, i in assign(gain.T))
    n, m = gain.shape
    cost, u, v = -gain.astype(float), np.zeros(n + 1), np.zeros(m + 1)
    owner, back = np.full(m + 1, -1), np.zeros(m + 1, int)  # column m holds the row that is being placed
    for i in range(n):
        owner[m], at = i, m
        best, done = np.full(m, np.inf), np.zeros(m + 1, bool)
        while owner[at] >= 0:
            done[at] = True
            reduced = cost[owner[at]] - u[owner[at]] - v[:m]
            closer = ~done[:m] & (reduced < best)
            best[closer], back[:m][closer] = reduced[closer], at
            following = int(np.where(done[:m], np.inf, best).argmin())
            step = best[following]
            u[owner[done]] += step
            v[done] -= step
            best[~done[:m]] -= step
            at = following
        while at != m:
            owner[at], at = owner[back[at]], int(back[at])
        owner[m] = -1
    return sorted((int(owner[j]), j) for j in range(m) if owner[j] >= 0)


def mean_iou(drawn: np.ndarray, truth: np.ndarray, free: bool = False) -> float:
    """The mean overlap of regions, 1.0 where there are none at all.

    By class: over the ids of either picture. ``free``: ids name nothing, so the regions are matched one to one for the
    largest total; the mean is over the larger number of regions, so that superfluous ones cost.
    """
    iou, rows, columns = overlaps(drawn, truth)
    if free:
        most = max(iou.shape)
        return sum(float(iou[pair]) for pair in assign(iou)) / most if most else 1.0
    ids = sorted(set(rows.tolist()) | set(columns.tolist()))
    shared = [float(iou[rows == i][:, columns == i].sum()) for i in ids]
    return float(np.mean(shared)) if ids else 1.0


def boundaries(ids: np.ndarray) -> np.ndarray:
    """(h, w) bool: the pixels that differ from their right or lower neighbour."""
    edge = np.zeros(ids.shape, bool)
    edge[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    edge[:-1] |= ids[:-1] != ids[1:]
    return edge


def boundary_f(drawn: np.ndarray, truth: np.ndarray, tolerance: int | None = None) -> float:
    """The F score of boundary pixels, (h, w) bool, that have one of the other picture within ``tolerance`` pixels in
    both directions (default: 0.75 % of the diagonal, at least 1). 1.0 where neither has any."""
    if drawn.shape != truth.shape:
        raise ValueError(f"the drawing is {drawn.shape}, the truth {truth.shape}")
    reach = max(1, round(0.0075 * float(np.hypot(*truth.shape)))) if tolerance is None else tolerance
    if not drawn.any() or not truth.any():
        return float(not drawn.any() and not truth.any())
    precision, recall = (_near(b, reach)[a].mean() for a, b in ((drawn, truth), (truth, drawn)))
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _near(mask: np.ndarray, reach: int) -> np.ndarray:
    """The mask grown by ``reach`` pixels to all sides."""
    for axis in (0, 1):
        padded = np.pad(mask, [(reach, reach) if i == axis else (0, 0) for i in (0, 1)])
        mask = np.any(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis), axis=-1)
    return mask


def recall(iou: np.ndarray) -> float:
    """The share of the truth's regions (or boxes) that are found, averaged over overlaps of 0.5 to 0.95: COCO's average
    recall; drawings have no confidence, so there is no average precision. ``iou`` is (t, d); 1.0 for no truth."""
    if not len(iou):
        return 1.0
    overlaps = np.array([iou[pair] for pair in assign(iou)])
    return float(np.mean([(overlaps >= t).sum() / len(iou) for t in THRESHOLDS]))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) intersection over union of boxes (left, top, right, bottom)."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    both = (high - low).clip(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both)


def panoptic_quality(drawn: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Sum of the overlaps of matched segments / (matched + half of the unmatched); a match is of one class and overlaps
    by more than half (arXiv 1801.00868, over all classes at once). An id's class is its rest by ``classes`` + 1."""
    iou, rows, columns = overlaps(drawn, truth)
    same = (rows[:, None] - columns) % (classes + 1) == 0
    matched = iou[(iou > 0.5) & same]
    unmatched = sum(iou.shape) - 2 * len(matched)
    return float(matched.sum() / (len(matched) + unmatched / 2)) if sum(iou.shape) else 1.0


def score(sample: Sample, drawn: PIL.Image.Image) -> dict[str, float]:
    """The scores of a drawing against the target of a sample of ``data.tasks``; it is resized to the target's size.

    =====================  ========================================================================================
    semantic               miou by class, boundary_f
    panoptic               quality, boundary_f
    instance, segment      miou of matched regions, boundary_f, recall
    referring              miou (of the region), boundary_f
    detect                 recall of boxes, precision (at an overlap of 0.5)
    depth                  error: mean absolute difference of nearness, of 1
    edges                  boundary_f of edges of strength 64 and more
    the others             psnr in dB, at most 99
    =====================  ========================================================================================

    Raises ``ValueError`` for a sample of no task.
    """
    task, (photo, target) = find(str(sample.info.get("type"))), (image.pixels for image in sample.images())
    if drawn.size != target.size:
        resampling = PIL.Image.Resampling.NEAREST if task.nearest else PIL.Image.Resampling.BICUBIC
        drawn = drawn.resize(target.size, resampling)
    if task.palette is None:
        error = float(np.mean((rgb(drawn).astype(float) - rgb(target)) ** 2))
        return {"psnr": min(99.0, 10 * log10(255**2 / error)) if error else 99.0}
    count, paper = sample.info["count"], sample.info.get("paper", "dark")
    a, b = (task.decode(image, count, photo, paper) for image in (drawn, target))
    if task.palette == "boxes":
        iou = box_iou(b, a)
        matched = sum(iou[pair] >= 0.5 for pair in assign(iou))
        return {"recall": recall(iou), "precision": float(matched / len(a)) if len(a) else float(not len(b))}
    if task.palette == "inferno":
        return {"error": float(np.abs(a - b).mean() / 255)}
    if task.palette == "grey":
        return {"boundary_f": boundary_f(a >= STRONG, b >= STRONG)}
    outlines = {"boundary_f": boundary_f(boundaries(a), boundaries(b))}
    if task.name == "panoptic":
        return {"quality": panoptic_quality(a, b, sample.info["classes"])} | outlines
    free = task.name in FREE
    more = {"recall": recall(overlaps(a, b)[0])} if free else {}
    return {"miou": mean_iou(a, b, free)} | outlines | more
