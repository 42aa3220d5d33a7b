"""The two networks of GenEval through transformers, without mmdet: Mask2Former finds things, CLIP names their colours.

Pictures go in and detections come out as mmdet 2.x does it for the published configuration (Mask2Former Swin-S, COCO
instances): the longer side at most 1333 and the shorter at most 800 pixels, padded to a multiple of 32; the hundred
best (query, class) pairs, whose score is the class's times the mean of the mask inside itself; boxes are the masks'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F

from diptych.data.canvas import rgb
from diptych.machine.extras import install

LONG, SHORT, DIVISOR = 1333, 800, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BEST = 100  # (query, class) pairs of a picture
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {c} {x}", "a photo of a {c}-colored {x}", "a photo of a {c} object")
PAPER = (0x99, 0x99, 0x99)  # what is outside the mask


@dataclass(frozen=True, eq=False)
class Detection:
    """A thing in a picture: class index, score, box (left, top, right, bottom) in pixels and (h, w) bool mask."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


class Detector:
    """Mask2Former of a folder or a name of the hub."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.net: Any = _load("Mask2FormerForUniversalSegmentation", source).to(self.device).eval()

    @torch.inference_mode()
    def find(self, images: Sequence[PIL.Image.Image], least: float = 0.3, batch: int = 1) -> list[list[Detection]]:
        """What is in each picture with a score above ``least``, best first; ``batch`` pictures of one size at once."""
        detections: list[list[Detection]] = [[] for _ in images]
        for group in _alike(images, batch):
            pixels, inner = _prepared([images[i] for i in group])
            mask = torch.zeros(pixels.shape[0], *pixels.shape[-2:], dtype=torch.long)
            mask[:, : inner[0], : inner[1]] = 1
            out = self.net(pixel_values=pixels.to(self.device), pixel_mask=mask.to(self.device))
            for i, classes, masks in zip(group, out.class_queries_logits, out.masks_queries_logits, strict=True):
                detections[i] = _detections(classes, masks, pixels.shape[-2:], inner, images[i].size, least)
        return detections


def _alike(images: Sequence[PIL.Image.Image], batch: int) -> Iterator[list[int]]:
    """Indices of up to ``batch`` pictures of one size."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.size, []).append(i)
    for members in sizes.values():
        yield from (members[k : k + batch] for k in range(0, len(members), batch))


def _prepared(images: Sequence[PIL.Image.Image]) -> tuple[torch.Tensor, tuple[int, int]]:
    """(B, 3, H, W) of the padded pictures, and the (height, width) that they fill."""
    w, h = images[0].size
    scale = min(LONG / max(w, h), SHORT / min(w, h))
    size = (int(h * scale + 0.5), int(w * scale + 0.5))
    x = torch.from_numpy(np.stack([rgb(i) for i in images])).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size, mode="bilinear", align_corners=False).round()  # not antialiased, bytes, as OpenCV's
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return F.pad(x, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)), size


def _detections(
    classes: torch.Tensor,
    masks: torch.Tensor,
    padded: Sequence[int],
    inner: tuple[int, int],
    size: tuple[int, int],
    least: float,
) -> list[Detection]:
    """Of one picture: (Q, classes + 1) logits and (Q, h, w) mask logits. A mask's score is at most 1, so pairs whose
    class alone is not above ``least`` need no mask."""
    scores = classes.float().softmax(-1)[:, :-1]
    n = scores.shape[1]
    best, at = scores.flatten().topk(min(BEST, scores.numel()))
    best, at = best[best > least], at[best > least]
    if not len(at):
        return []
    queries, where = (at // n).unique(return_inverse=True)
    full = F.interpolate(masks[queries][:, None].float(), tuple(padded), mode="bilinear", align_corners=False)
    full = full[..., : inner[0], : inner[1]]
    full = F.interpolate(full, (size[1], size[0]), mode="bilinear", align_corners=False)[:, 0]
    inside = full > 0
    mean = (full.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    detections = []
    for score, label, k in zip((best * mean[where]).tolist(), (at % n).tolist(), where.tolist(), strict=True):
        mask = inside[k].cpu().numpy()
        if score > least and mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            detections.append(Detection(label, score, box, mask))
    return sorted(detections, key=lambda d: -d.score)


class Colourist:
    """CLIP of a folder or a name of the hub: which of ten colours a thing has."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.net: Any = _load("CLIPModel", source).to(self.device).eval()
        self.processor: Any = _load("CLIPProcessor", source)
        self.known: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def name(self, image: PIL.Image.Image, things: Sequence[Detection], noun: str) -> list[str]:
        """The colour of each thing of a picture: zero-shot over crops with all but the thing painted grey."""
        paper = PIL.Image.new("RGB", image.size, PAPER)
        crops = []
        for thing in things:
            mask = PIL.Image.fromarray(thing.mask.astype(np.uint8) * 255)
            left, top, right, bottom = map(int, thing.box)
            crops.append(PIL.Image.composite(image, paper, mask).crop((left, top, right, bottom)))
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.device)
        seen = _pooled(self.net.get_image_features(pixel_values=pixels))
        return [COLOURS[int(i)] for i in (F.normalize(seen.float(), dim=-1) @ self._texts(noun).T).argmax(-1)]

    @torch.inference_mode()
    def fit(self, images: Sequence[PIL.Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosine of each picture's embedding and its text's; texts are cut at CLIP's 77 tokens."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self.device)
        seen = _pooled(self.net.get_image_features(pixel_values=pixels)).float()
        read = _pooled(self.net.get_text_features(**tokens)).float()
        return F.cosine_similarity(seen, read, dim=-1).tolist()

    def _texts(self, noun: str) -> torch.Tensor:
        """(10, D): the mean of the templates' embeddings of each colour of this noun."""
        if noun not in self.known:
            texts = [t.format(c=c, x=noun) for c in COLOURS for t in TEMPLATES]
            tokens = self.processor(text=texts, return_tensors="pt", padding=True).to(self.device)
            out = _pooled(self.net.get_text_features(**tokens)).float()
            each = F.normalize(out, dim=-1).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self.known[noun] = F.normalize(each.mean(1), dim=-1)
        return self.known[noun]


def _pooled(out: Any) -> torch.Tensor:
    """The projected embedding, which transformers returns bare or inside an output, by its version."""
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@cache
def detector(source: str, device: str) -> Detector:
    """The detector of this source, loaded once."""
    return Detector(source, device)


@cache
def colourist(source: str, device: str) -> Colourist:
    """The colourist of this source, loaded once."""
    return Colourist(source, device)


def _load(kind: str, source: str) -> Any:
    """A network or processor of transformers. Raises ``ValueError`` for a missing package or files."""
    try:
        import transformers

        return getattr(transformers, kind).from_pretrained(source)
    except ImportError as error:  # transformers itself, or scipy, which its Mask2Former wants
        raise ValueError(f"GenEval's scorer needs {install('evaluate')}: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{kind} cannot be read from {source!r}: {error}. Name a folder with --detector or --clip, or go online"
        ) from error
