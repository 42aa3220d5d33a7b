"""Reads a picture of the shapes world back by exact rules, and judges drawings and edits with it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import PIL.Image
import skia

from diptych.data.canvas import canvas, components, rgb
from diptych.data.worlds.grounds import WHITE, Ground
from diptych.data.worlds.shapes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SIDES,
    TAGS,
    DetectedObject,
    Kind,
    Need,
    Prompt,
    Scene,
    Thing,
    _draw,
    _listing,
    _outline,
    coverage,
    plural,
    random_prompt,
    relations,
    render,
    render_on,
    scene_for,
)


def caption_ok(text: str, scene: Scene) -> bool:
    """Whether a caption names exactly the objects of the scene, in any order: every count, colour and shape."""
    words = "|".join([*NUMBERS[1:], "an", "a"])
    shapes = "|".join([plural(s) for s in SHAPES] + list(SHAPES))
    pattern = rf"({words}) ({'|'.join(COLOURS)}) ({shapes})"
    text = text.lower().strip().rstrip(".")
    parts = re.split(r",? and |, ", text)
    counts: Counter[Kind] = Counter()
    for part in parts:
        match = re.fullmatch(pattern, part.strip())
        if not match:
            return False
        number, colour, noun = match.groups()
        shape = noun if noun in SHAPES else next(s for s in SHAPES if plural(s) == noun)
        counts[colour, shape] += 1 if number in ("a", "an") else NUMBERS.index(number)
    return counts == Counter(t.kind for t in scene.things)


@dataclass(frozen=True)
class PromptVerdict:
    """Whether a picture is right, why not, and what was seen in it."""

    ok: bool
    reason: str
    found: tuple[DetectedObject, ...]


SPECK = 0.004  # of the canvas: smaller spots are ignored (the smallest object covers 0.02)


_PALETTE = np.array(list(COLOURS.values()), np.float32)


def detect(image: PIL.Image.Image, ground: Ground = WHITE) -> list[DetectedObject]:
    """The objects in a picture of the shapes world, largest first; a spot below ``SPECK`` of the area is ignored.

    A pixel is unmixed into its colour on the ground and the ink that explains it best; pixels that are mostly ink form
    connected objects; an object has the ink of its inner pixels, and the shape whose drawing of the same area and
    centroid overlaps most.
    """
    pixels = rgb(image).astype(np.float32)
    height, width = pixels.shape[:2]
    paper = ground.paper((width, height)).astype(np.float32)
    ink = _ink(pixels, paper, [not ground.hides(colour) for colour in COLOURS.values()])
    solid = ink > 0.5
    parts = [p for p in components(solid) if len(p) >= max(3, SPECK * height * width)]
    return [_identify(pixels, paper, solid, part) for part in sorted(parts, key=len, reverse=True)]


def _ink(pixels: np.ndarray, paper: np.ndarray, visible: list[bool]) -> np.ndarray:
    """How much ink a pixel holds, (h, w): the share in [0, 1.2] of the ``visible`` ink that explains the pixel best,
    mixed with its ``paper``."""
    towards = _PALETTE[visible] - paper[:, :, None]
    off, far = (pixels - paper)[:, :, None], (towards**2).sum(-1)
    along = (off * towards).sum(-1)
    share = np.clip(along / far, 0, 1.2)
    error = (off**2).sum(-1) - 2 * share * along + share**2 * far
    return np.take_along_axis(share, error.argmin(-1)[..., None], -1)[..., 0]


def _identify(pixels: np.ndarray, paper: np.ndarray, solid: np.ndarray, part: np.ndarray) -> DetectedObject:
    height, width = solid.shape
    (top, left), (bottom, right) = part.min(0), part.max(0) + 1
    y0, x0, y1, x1 = max(top - 2, 0), max(left - 2, 0), min(bottom + 2, height), min(right + 2, width)
    part_mask = np.zeros((y1 - y0 + 2, x1 - x0 + 2), bool)
    part_mask[part[:, 0] - y0 + 1, part[:, 1] - x0 + 1] = True
    inner = (
        part_mask[1:-1, 1:-1] & part_mask[:-2, 1:-1] & part_mask[2:, 1:-1] & part_mask[1:-1, :-2] & part_mask[1:-1, 2:]
    )
    near = (
        part_mask[1:-1, 1:-1] | part_mask[:-2, 1:-1] | part_mask[2:, 1:-1] | part_mask[1:-1, :-2] | part_mask[1:-1, 2:]
    )
    part_mask = part_mask[1:-1, 1:-1]
    crop = pixels[y0:y1, x0:x1]

    core = crop[inner] if inner.sum() >= 3 else crop[part_mask]
    nearest = ((core[:, None] - _PALETTE) ** 2).sum(-1).argmin(1)
    votes = np.bincount(nearest, minlength=len(_PALETTE))
    best = int(votes.argmax())
    typical = np.median(core, axis=0)
    pure = votes[best] >= 0.7 * len(core) and np.linalg.norm(typical - _PALETTE[best]) < 60
    colour = list(COLOURS)[best] if pure else "unknown"

    ground = paper[y0:y1, x0:x1]
    towards = typical - ground  # the ink as it is, so that a pale object is measured right
    alpha = np.clip(((crop - ground) * towards).sum(-1) / np.maximum((towards**2).sum(-1), 1), 0, 1)
    alpha = np.where(near & (part_mask | ~solid[y0:y1, x0:x1]), alpha, 0)
    area = alpha.sum()
    cy, cx = (np.arange(y1 - y0) + 0.5) @ alpha.sum(1) / area, (np.arange(x1 - x0) + 0.5) @ alpha.sum(0) / area
    side = max(alpha.shape)
    square = np.zeros((side, side), np.float32)
    square[: alpha.shape[0], : alpha.shape[1]] = alpha
    ideals = _ideals(float(area), float(cx), float(cy), side)
    overlap = np.maximum(_overlap(ideals, square), _overlap(_soften(ideals), square))  # sharp or blurred, as it is
    matches = dict(zip(SHAPES, overlap.tolist(), strict=True))
    shape = max(matches, key=matches.__getitem__)
    return DetectedObject(
        shape if matches[shape] >= 0.7 else "unknown",
        colour,
        float(left + right) / 2 / width,
        float(top + bottom) / 2 / height,
        float(right - left) / width,
        float(bottom - top) / height,
        matches[shape],
    )


def _ideals(area: float, cx: float, cy: float, side: int) -> np.ndarray:
    """The coverage of every shape of that area and centroid, in pixels: (shapes, side, side) float32."""
    pixels, paper = canvas(side, (0, 0, 0, 255), height=side * len(SHAPES))
    for i, shape in enumerate(SHAPES):
        _, _, unit_area, (ox, oy) = _outline(shape)
        extent = (area / unit_area) ** 0.5
        paper.save()
        paper.clipRect(skia.Rect.MakeXYWH(0, i * side, side, side))
        thing = Thing(shape, "", (cx - ox * extent) / side, (cy - oy * extent) / side + i, extent / side)
        _draw(paper, thing, (side, side), (255, 255, 255))
        paper.restore()
    return pixels[..., 0].reshape(len(SHAPES), side, side).astype(np.float32) / 255


def _overlap(ideals: np.ndarray, cover: np.ndarray) -> np.ndarray:
    shared = np.minimum(ideals, cover).sum((1, 2))
    return shared / (ideals.sum((1, 2)) + cover.sum() - shared)


def _soften(covers: np.ndarray) -> np.ndarray:
    """A blur by about a pixel."""
    wide = np.pad(covers, ((0, 0), (2, 2), (2, 2)))
    wide = wide[:, :-4] + wide[:, 4:] + 4 * (wide[:, 1:-3] + wide[:, 3:-1]) + 6 * wide[:, 2:-2]
    return (wide[..., :-4] + wide[..., 4:] + 4 * (wide[..., 1:-3] + wide[..., 3:-1]) + 6 * wide[..., 2:-2]) / 256


GROUND = 10.0  # of 255: how far a ground may be off on average


def ground_difference(image: PIL.Image.Image, ground: Ground) -> float:
    """The mean absolute difference, of 255, between a picture and the ground, where no object is. Both are averaged
    over 4 x 4 pixels, so that noise does not count."""
    pixels, paper = rgb(image).astype(np.float32), ground.paper(image.size).astype(np.float32)
    bare = _ink(pixels, paper, [not ground.hides(colour) for colour in COLOURS.values()]) <= 0.5
    height, width = (side // 4 * 4 for side in bare.shape)

    def blocks(values: np.ndarray) -> np.ndarray:
        return values[:height, :width].reshape(height // 4, 4, width // 4, 4, -1).mean((1, 3))

    whole = blocks(bare[..., None].astype(np.float32))[..., 0] == 1
    return float(np.abs(blocks(pixels - paper))[whole].mean()) if whole.any() else 255.0


def check(image: PIL.Image.Image, prompt: Prompt, ground: Ground = WHITE) -> PromptVerdict:
    """Whether a picture shows exactly what a prompt asks for and nothing else, on its ground."""
    objects = tuple(detect(image, ground))
    if ground != WHITE and ground_difference(image, ground) > GROUND:
        return PromptVerdict(False, f"it is not on {ground.text}", objects)
    wanted = [need for need in prompt.needs for _ in range(need.count)]
    if len(objects) != len(wanted):
        return PromptVerdict(False, f"{len(objects)} objects instead of {len(wanted)}", objects)
    related = False
    for order in permutations(objects):
        if all(_meets(need, f) for need, f in zip(wanted, order, strict=True)):
            if prompt.relation is None or prompt.relation in relations(order[0], order[1]):
                return PromptVerdict(True, "", objects)
            related = True
    if related:
        return PromptVerdict(False, f"the objects are right, but not {prompt.relation}", objects)
    seen = ", ".join(f"{f.colour} {f.shape}" for f in objects)
    return PromptVerdict(False, f"found {seen} instead of {_listing(list(prompt.needs))}", objects)


def share_met(verdict: PromptVerdict, prompt: Prompt) -> float:
    """The share of a prompt's clauses that a picture meets: each object, their number, and the relation if any."""
    left, wanted = list(verdict.found), [need for need in prompt.needs for _ in range(need.count)]
    met = int(len(left) == len(wanted))
    for need in wanted:
        if match := next((f for f in left if _meets(need, f)), None):
            left.remove(match)
            met += 1
    if prompt.relation:
        first, second = prompt.needs[:2]
        pairs = ((a, b) for a in verdict.found for b in verdict.found if a is not b)
        met += any(_meets(first, a) and _meets(second, b) and prompt.relation in relations(a, b) for a, b in pairs)
    return met / (len(wanted) + 1 + bool(prompt.relation))


def _meets(need: Need, object: DetectedObject) -> bool:
    if "unknown" in object.kind:
        return False
    return need.shape in (None, object.shape) and need.colour in (None, object.colour)


def chance(n: int = 500, seed: int = 0, size: int = 64) -> dict[str, float]:
    """How often a picture drawn for another prompt of the same tag passes, for each of GenEval's tags."""
    rates = {}
    for tag in TAGS:
        rng = np.random.default_rng((seed, TAGS.index(tag)))
        asked = [random_prompt(rng, tag) for _ in range(n)]
        pictures = [render(scene_for(rng, prompt), size) for prompt in asked]
        order = rng.permutation(n)
        rates[tag] = sum(check(pictures[i], asked[j]).ok for i, j in zip(order, range(n), strict=True)) / n
    return rates


@dataclass(frozen=True)
class EditVerdict:
    """Whether an instruction was followed (``done``), whether the rest stayed (``kept``), and both (``ok``).

    ``difference`` is the mean absolute pixel difference, of 255, outside the changed objects.
    """

    ok: bool
    done: bool
    kept: bool
    difference: float
    reason: str
    found: tuple[DetectedObject, ...]


def check_edit(
    image: PIL.Image.Image, before: Scene, after: Scene, side: str | None = None, ground: Ground = WHITE
) -> EditVerdict:
    """Whether a picture is ``before`` changed into ``after``, on the same ground.

    An untouched object must be found with its colour and shape within a twelfth of the canvas of its place, and so must
    a recoloured or replaced one. A purely added object may lie anywhere, or anywhere on its ``side``; a removed one
    must be gone; nothing else may appear.
    """
    if side is not None and side not in SIDES:
        raise ValueError(f"side is {side!r}; choose from {', '.join(SIDES)}")
    objects = detect(image, ground)
    left = list(objects)
    untouched = [t for t in after.things if t in before.things]
    new = [t for t in after.things if t not in before.things]
    gone = [t for t in before.things if t not in after.things]

    def take(thing: Thing, anywhere: bool = False) -> bool:
        fits = (f for f in left if f.kind == thing.kind and (on_side(f, side) if anywhere else _near(f, thing)))
        match = next(fits, None)
        if match:
            left.remove(match)
        return match is not None

    lost = [t for t in untouched if not take(t)]
    missing = [t for t in new if not take(t, anywhere=not gone)]
    still = [f for f in left if any(_near(f, t) for t in gone)]
    extra = [f for f in left if f not in still]
    done, kept = not missing and not still, not lost and not extra
    reasons = [f"no {' '.join(t.kind)}" for t in missing] + [f"still a {' '.join(f.kind)}" for f in still]
    reasons += [f"lost the {' '.join(t.kind)}" for t in lost] + [f"an extra {' '.join(f.kind)}" for f in extra]
    difference = _difference(image, gone, new, after, ground)
    return EditVerdict(done and kept, done, kept, difference, "; ".join(reasons), tuple(objects))


def _near(object: DetectedObject, thing: Thing) -> bool:
    return max(abs(object.x - thing.x), abs(object.y - thing.y)) < 1 / 12


def on_side(a: DetectedObject | Thing, side: str | None) -> bool:
    """Whether a thing is in the outer two fifths of the canvas on that side; None is true."""
    return {None: True, "left": a.x < 0.4, "right": a.x > 0.6, "top": a.y < 0.4, "bottom": a.y > 0.6}[side]


def _difference(image: PIL.Image.Image, gone: list[Thing], new: list[Thing], after: Scene, ground: Ground) -> float:
    changed = coverage(Scene((*gone, *new)), image.size).max(0, initial=0) > 0
    truth = render_on(np.random.default_rng(0), ground, after, image.size)
    return float(np.abs(rgb(image).astype(np.float32) - rgb(truth).astype(np.float32))[~changed].mean())
