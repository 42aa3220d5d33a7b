"""From a decoded picture to the tensor a family reads: sizes, resizing, patches of latents."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from einops import rearrange

from diptych.core.tensors import Float, Tensor, UInt8, to_uint8


@dataclass(frozen=True)
class SizeRule:
    """A size as multiples of ``stride``: BAGEL's rule (arXiv 2505.14683, ``MaxLongEdgeMinShortEdgeResize``).

    Scale so that the long side is at most ``longest``, then so that the short side is at least ``shortest``, round each
    side to the stride, then shrink when there are more than ``pixels`` or the long side exceeds ``longest`` again.
    ``over`` says how a picture with too many pixels is shrunk: ``root`` scales the original sides by the root of
    ``pixels`` over their product, so that about ``pixels`` remain (SGT's fork); ``ratio`` scales the rounded sides by
    ``pixels`` over their product (BAGEL).
    """

    longest: int
    shortest: int
    stride: int
    pixels: int = 14 * 14 * 9 * 1024
    over: Literal["root", "ratio"] = "root"

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to resize a picture of this size to."""
        scale = min(self.longest / max(width, height), 1.0)
        scale = max(scale, self.shortest / min(width, height))
        w, h = self._apply(width, height, scale)
        if w * h > self.pixels:
            root = (self.pixels / (width * height)) ** 0.5
            w, h = self._apply(width, height, root) if self.over == "root" else self._apply(w, h, self.pixels / (w * h))
        if max(w, h) > self.longest:
            w, h = self._apply(w, h, self.longest / max(w, h))
        return w, h

    def _apply(self, width: int, height: int, scale: float) -> tuple[int, int]:
        return self._round(round(width * scale)), self._round(round(height * scale))

    def _round(self, side: int) -> int:
        return max(self.stride, round(side / self.stride) * self.stride)


@dataclass(frozen=True)
class ShrinkRule:
    """How a picture is shrunk to multiples of ``stride``: to at most ``pixels`` and a long side of at most ``longest``.
    Sides are rounded down, to one stride at least, and a picture is never enlarged (OmniGen2's image processor)."""

    pixels: int
    longest: int
    stride: int

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to resize a picture of this size to."""
        scale = min((self.pixels / (width * height)) ** 0.5, self.longest / max(width, height), 1.0)
        w, h = (max(self.stride, int(side * scale) // self.stride * self.stride) for side in (width, height))
        return w, h


@dataclass(frozen=True)
class AreaRule:
    """How a picture is brought to multiples of ``stride`` with ``least`` to ``most`` pixels: the rule of transformers'
    Qwen2-VL image processor (``smart_resize``), which also enlarges."""

    least: int
    most: int
    stride: int

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to resize a picture of this size to."""
        w, h = (max(self.stride, round(side / self.stride) * self.stride) for side in (width, height))
        if w * h > self.most:
            scale = (width * height / self.most) ** 0.5
            w, h = (max(self.stride, int(side / scale / self.stride) * self.stride) for side in (width, height))
        elif w * h < self.least:
            scale = (self.least / (width * height)) ** 0.5
            w, h = (ceil(side * scale / self.stride) * self.stride for side in (width, height))
        return w, h


@dataclass(frozen=True)
class Tiling:
    """InternVL 1.5's dynamic resolution (arXiv 2404.16821, section 3.3): a picture as up to ``most`` square
    tiles of ``side`` pixels, stretched to the nearest aspect ratio, and as a whole once more if there are several."""

    side: int
    most: int = 1
    thumbnail: bool = False

    def __post_init__(self) -> None:
        if self.side < 1 or self.most < 1:
            raise ValueError(f"tiles need a side and a number of at least 1, not {self.side} and {self.most}")

    def grid(self, width: int, height: int, most: int | None = None) -> tuple[int, int]:
        """(columns, rows) of tiles whose ratio is nearest to width / height. Of two that are equally near, the larger
        where the picture covers more than half of it."""
        most = self.most if most is None else most
        pairs = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
        best, nearest = (1, 1), float("inf")
        for c, r in sorted(pairs, key=lambda p: (p[0] * p[1], p)):
            off = abs(width / height - c / r)
            if off < nearest or (off == nearest and width * height > 0.5 * self.side**2 * c * r):
                best, nearest = (c, r), off
        return best

    def count(self, width: int, height: int, most: int | None = None) -> int:
        """How many tiles a picture of this size becomes, the whole included."""
        c, r = self.grid(width, height, most)
        return c * r + (self.thumbnail and c * r > 1)

    def __call__(
        self, image: PIL.Image.Image, most: int | None = None, nearest: bool = False
    ) -> UInt8[Tensor, "t 3 S S"]:
        """The tiles row by row, then the whole; ``most`` replaces the rule's own limit (pictures share it)."""
        (c, r), side = self.grid(*image.size, most), self.side
        whole = to_tensor(image, (c * side, r * side), nearest)
        tiles = rearrange(whole, "k (r h) (c w) -> (r c) k h w", r=r, c=c)
        if self.thumbnail and c * r > 1:
            tiles = torch.cat([tiles, to_tensor(image, (side, side), nearest)[None]])
        return tiles.contiguous()


def fit(image: PIL.Image.Image, size: tuple[int, int], nearest: bool = False) -> UInt8[Tensor, "3 H W"]:
    """The picture scaled to cover (width, height) and cut to it around its centre, as uint8."""
    if image.size != size:
        resampling = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.BICUBIC
        image = PIL.ImageOps.fit(image, size, resampling)
    return to_tensor(image, size)


def to_tensor(image: PIL.Image.Image, size: tuple[int, int], nearest: bool = False) -> UInt8[Tensor, "3 H W"]:
    """The picture resized to (width, height), bicubic (nearest for label pictures), as uint8."""
    image = resized(image, [size], nearest)
    return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())


def resized(image: PIL.Image.Image, sizes: Sequence[tuple[int, int]], nearest: bool = False) -> PIL.Image.Image:
    """The picture resized to each (width, height) in turn, as ``to_tensor`` does."""
    for size in sizes:
        how = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.BICUBIC
        image = image.resize(size, how) if image.size != size else image
    return image


def lanczos(image: PIL.Image.Image, size: tuple[int, int], nearest: bool = False) -> Tensor:
    """The picture resized to (width, height) by Pillow's Lanczos filter (nearest for label pictures), as uint8."""
    if image.size != size and not nearest:
        image = image.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)
    return to_tensor(image, size, nearest)


def letterbox(image: PIL.Image.Image, size: tuple[int, int], nearest: bool = False) -> PIL.Image.Image:
    """The whole picture as large as it fits into (width, height), centred on black: Cheers' edit sources and
    pictures to read (arXiv 2603.12793, published processor)."""
    scale = min(size[0] / image.width, size[1] / image.height)
    fitted = _resize(image, scale, nearest)
    out = PIL.Image.new("RGB", size)
    out.paste(fitted.convert("RGB"), ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
    return out


def crop(image: PIL.Image.Image, size: tuple[int, int], nearest: bool = False) -> PIL.Image.Image:
    """The middle (width, height) of the picture made just large enough to cover it: Cheers'
    targets (arXiv 2603.12793, published processor)."""
    covering = _resize(image, max(size[0] / image.width, size[1] / image.height), nearest)
    left, top = (covering.width - size[0]) // 2, (covering.height - size[1]) // 2
    return covering.crop((left, top, left + size[0], top + size[1]))


def _resize(image: PIL.Image.Image, scale: float, nearest: bool) -> PIL.Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.BICUBIC)


def to_pil(image: Float[Tensor, "3 H W"]) -> PIL.Image.Image:
    """A picture in [-1, 1] as an RGB image."""
    return PIL.Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def png_bytes(image: PIL.Image.Image, compress_level: int = 6) -> bytes:
    """The PNG file of a picture: its pixels as RGB and no metadata. ``compress_level`` is zlib's, 0 to 9."""
    file, bare = io.BytesIO(), image.convert("RGB")
    bare.info = {}
    bare.save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def keep_outside(region: PIL.Image.Image, source: PIL.Image.Image, edited: PIL.Image.Image) -> PIL.Image.Image:
    """The edited picture where the mask ``region`` is white, and the source, resized to it, where the mask is black."""
    return PIL.Image.composite(edited, source.resize(edited.size), region.resize(edited.size))


def data_uri(image: PIL.Image.Image | bytes, media: str = "image/png") -> str:
    """A picture as a data URI: a PNG of it, or the bytes of a file of the media type ``media``."""
    data = image if isinstance(image, bytes) else png_bytes(image)
    return f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"


def latents_to_tokens(latents: Float[Tensor, "N c h w"], patch: int) -> Float[Tensor, "N n f"]:
    """Square patches of latents as tokens, row-major, features ordered (row in patch, column in patch, channel)."""
    return rearrange(latents, "N c (h p) (w q) -> N (h w) (p q c)", p=patch, q=patch)


def tokens_to_latents(tokens: Float[Tensor, "N n f"], grid: tuple[int, int], patch: int) -> Float[Tensor, "N c h w"]:
    """The inverse of ``latents_to_tokens`` for a grid of (rows, columns) tokens."""
    return rearrange(tokens, "N (h w) (p q c) -> N c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)
