"""Opening pictures that somebody else made: safely, upright, in RGB, or not at all.

A picture that cannot be read is an error that names it. Nothing here returns a replacement.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_PIXELS = 64_000_000
# what Pillow's readers raise for files that are not what they claim to be; UnidentifiedImageError is an OSError
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning,
)  # fmt: skip


def open_image(source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """The picture as RGB, upright by its EXIF tag, transparency laid on white; the first frame of an animation.

    ``source`` is a path or the bytes of a PNG, JPEG, WEBP, GIF or BMP file; ``name`` is what errors call it (default:
    the path). Sizes are checked before anything is decoded. 16-bit greys keep their upper eight bits.

    Raises ``ValueError`` naming the picture and the reason: missing, not one of the formats, more than ``max_pixels``,
    truncated or corrupt.
    """
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    image = _open(source, name, max_pixels)
    with image:
        try:
            image.load()
            upright = PIL.ImageOps.exif_transpose(image)
            return _rgb(upright)
        except BROKEN as error:
            raise ValueError(f"picture {name!r} is corrupt or truncated: {_reason(error)}") from error


def open_labels(source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(h, w) values of a label picture as stored: uint8 of greys and palette indices, uint16 of 16-bit greys, and of
    colours int32 R + 256 G + 65536 B. Raises ``ValueError`` as ``open_image`` does."""
    name = name or str(source)[:80]
    with _open(source, name, max_pixels) as image:
        try:
            image.load()
        except BROKEN as error:
            raise ValueError(f"picture {name!r} is corrupt or truncated: {_reason(error)}") from error
        if image.mode in ("RGB", "RGBA"):
            return np.asarray(image.convert("RGB")).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        if image.mode not in ("1", "L", "P", "I;16"):
            raise ValueError(f"picture {name!r} has pixels of mode {image.mode!r}; labels are greys, palettes or RGB")
        return np.array(image) if image.mode != "1" else np.array(image).astype(np.uint8)


def open_alpha(source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """The transparency of a picture as greys: 0 transparent, 255 opaque; upright. Raises ``ValueError`` as
    ``open_image`` does, and for a picture without transparency."""
    name = name or str(source)[:80]
    with _open(source, name, max_pixels) as image:
        try:
            image.load()
            upright = PIL.ImageOps.exif_transpose(image)
        except BROKEN as error:
            raise ValueError(f"picture {name!r} is corrupt or truncated: {_reason(error)}") from error
        if "transparency" not in upright.info and upright.mode not in ("RGBA", "LA", "PA"):
            raise ValueError(f"picture {name!r} has no transparency (mode {upright.mode})")
        return upright.convert("RGBA").getchannel("A")


def image_size(source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as stored, without decoding. Raises ``ValueError`` as ``open_image`` does."""
    with _open(source, name or str(source)[:80], max_pixels) as image:
        return image.size


def read_bytes(path: Path, name: str) -> bytes:
    """The file as it is. Raises ``ValueError`` naming the picture."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"picture {name!r} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ValueError(f"picture {name!r} cannot be read: {_reason(error)}") from error


def _open(source: str | Path | bytes, name: str, max_pixels: int) -> PIL.Image.Image:
    if PIL.ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: cut-off pictures would be read as grey")
    data = source if isinstance(source, bytes) else read_bytes(Path(source), name)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"picture {name!r} is not a readable {', '.join(FORMATS)} file") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ValueError(f"picture {name!r} is too large (limit {max_pixels} pixels): {_reason(error)}") from error
    except BROKEN as error:
        raise ValueError(f"picture {name!r} is corrupt or truncated: {_reason(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ValueError(f"picture {name!r} is too large: {width}x{height} pixels; limit {max_pixels}")
    return image


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it at 255
        return PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        raise ValueError(f"unknown pixel mode {image.mode!r}")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
