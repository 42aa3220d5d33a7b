"""A small network that finds the forty emoji of ``data.worlds.emoji.NOUNS`` in a picture: the judge of GenEval-emoji.

It is a centre-point detector (arXiv 1904.07850): every cell of a 16 x 16 grid over the picture says how surely a thing
of each kind has its centre there, and how wide and high it is. ``scripts/train_recogniser.py`` made the weights that
ship, in minutes on one core; how often it reads pictures drawn by rules right is printed beside every score.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

from diptych.data.canvas import rgb
from diptych.data.worlds.emoji import NOUNS
from diptych.data.worlds.shapes import DetectedObject

SIDE, STRIDE = 64, 4  # pixels of the input; pixels of a cell
CLASSES = (*NOUNS, "other")  # "other": any other emoji, so that what it does not know is not mistaken
SURE = 0.4  # how sure a find must be


class Recogniser(nn.Module):
    """(B, 3, 64, 64) pictures in [0, 1] to (B, 41 + 2, 16, 16): the kinds' logits, then width and height of 1."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, d, d), nn.BatchNorm2d(width)) for d in (1, 2, 1, 2)
        )
        self.head = nn.Conv2d(width, len(CLASSES) + 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, classes + 2, h, w) of (N, 3, H, W) pictures: class logits, then width and height."""
        x = self.stem(images)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x)

    @torch.no_grad()
    def find(self, images: Sequence[PIL.Image.Image]) -> list[list[DetectedObject]]:
        """What is in each picture, surest first: ``DetectedObject`` with the emoji's id as its shape and no colour."""
        x = torch.stack([_tensor(image) for image in images])
        out = self(x.to(self.head.weight.device)).float().cpu()
        heat = out[:, :-2].sigmoid()
        peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat >= SURE)
        # two kinds are not found at one place: the surer one is
        best = F.max_pool2d(heat.amax(1, keepdim=True), 3, 1, 1)
        detections: list[list[DetectedObject]] = []
        for i in range(len(images)):
            some = []
            for kind, y, x_ in (peaks[i] & (heat[i] >= best[i])).nonzero().tolist():
                w, h = out[i, -2:, y, x_].clamp(0.05, 1).tolist()
                place = ((x_ + 0.5) * STRIDE / SIDE, (y + 0.5) * STRIDE / SIDE)
                some.append(DetectedObject(CLASSES[kind], "", *place, w, h, float(heat[i, kind, y, x_])))
            detections.append(sorted(some, key=lambda f: -f.match))
        return detections


def _tensor(image: PIL.Image.Image) -> torch.Tensor:
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
    return torch.from_numpy(rgb(image).astype(np.float32) / 255).permute(2, 0, 1)


@cache
def recogniser() -> Recogniser:
    """The one that ships, on the CPU."""
    net = Recogniser()
    weights = load((files("diptych.evaluation.judges") / "recogniser.safetensors").read_bytes())
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return net.eval()
