"""Tensor annotations, the legend of axis names, and the value conventions that hold everywhere.

Axes: ``T`` tokens of a packed row, ``N`` pictures of one group, ``n`` tokens of one picture, ``d`` model width,
``H`` query heads, ``K`` key/value heads, ``c h w`` channels, rows, columns, ``B`` documents or requests of one group.

Values:

- time runs from 0 (data) to 1 (noise); ``x_t = (1 - t) data + t noise``; velocity = noise - data
- pictures are float in [-1, 1], channels first; a uint8 picture is converted by ``to_float`` and nowhere else
- latents are already scaled; families convert published weights that use another sign or scale
- an id or target of ``NONE`` means "no token here" / "nothing to predict here"

The tests check shapes and dtypes at run time: ``tests/conftest.py`` installs jaxtyping's import hook with beartype.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

__all__ = ["NONE", "Bool", "Float", "Int", "Tensor", "UInt8", "to_float", "to_uint8"]

NONE = -1


def to_float(images: Tensor) -> Tensor:
    """Pictures in [-1, 1]: uint8 values are mapped by ``x / 127.5 - 1``, float pictures pass."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8, clamped and rounded."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
