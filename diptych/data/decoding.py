"""Opening a picture, whatever it comes as: the one function behind every door, and what it refuses.

The result is what a browser shows: upright by its EXIF tag, in sRGB, transparency laid on white, the first frame of an
animation. A picture that cannot be read is a ``ValueError`` that names it. Nothing here returns a replacement.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote_to_bytes

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageCms
import PIL.ImageFile
import PIL.ImageOps
import torch

from diptych.data.reading import read

PictureSource = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | PIL.Image.Image | np.ndarray | torch.Tensor
)

_SUFFIXES = {  # by Pillow's name of the format
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
}
# pictures that are read nowhere here
UNREADABLE = tuple(".svg .pdf .psd .ico .tga .eps .ppm .pgm .exr .hdr .dng .cr2 .cr3 .nef .arw .raw".split())
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # pixels, JPEG's own limit
MAX_RATIO = 200.0  # of the longer side to the shorter, as Qwen2-VL's smart_resize
MAX_PROFILE = 16 * 2**20  # bytes of an ICC profile
# what Pillow's readers raise for files that are not what they claim to be; UnidentifiedImageError is an OSError
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
    RuntimeError,  # of the AVIF decoder
    UserWarning,  # of damaged TIFF tags, where the caller turns warnings into errors
    PIL.Image.DecompressionBombWarning,
)


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here: those of a plain Pillow, and HEIF and JXL where a plug-in
    (``pillow_heif``, ``pillow_jxl``) has registered them."""
    PIL.Image.init()
    built = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
    return tuple(f for f in _SUFFIXES if f in PIL.Image.OPEN and (f not in built or PIL.features.check(built[f])))


def suffixes() -> tuple[str, ...]:
    """The suffixes of files that ``open_picture`` reads here, lower case."""
    return tuple(suffix for f in formats() for suffix in _SUFFIXES[f])


def picture_suffixes() -> tuple[str, ...]:
    """The suffixes of files that hold a picture, read here or not, lower case."""
    return tuple(suffix for group in _SUFFIXES.values() for suffix in group) + UNREADABLE


def open_picture(
    source: PictureSource,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    *,
    max_side: int = MAX_SIDE,
    max_ratio: float = MAX_RATIO,
    fetch: Callable[[str], bytes] | None = None,
) -> PIL.Image.Image:
    """The picture as RGB without metadata: upright, in sRGB, transparency laid on white, the first frame.

    ``source`` is one of

    - a path (``str`` or ``PathLike``), the bytes of a file, or a file object that is open for reading bytes;
    - a data URI (``data:image/png;base64,...``), or an http(s) URL where ``fetch(url) -> bytes`` is given;
    - a ``PIL.Image``, opened or created by the caller (its current frame);
    - a numpy array H x W, H x W x 1, 3 or 4, or a torch tensor H x W, C x H x W with 1, 3 or 4 channels:
      uint8, bool, or floats in [0, 1].

    ``name`` is what errors call the picture (default: the path, or what ``source`` is). Size and aspect ratio
    are checked before anything is decoded. Damaged metadata (EXIF, colour profile, text) is ignored, as viewers do.
    16-bit greys keep their upper eight bits.

    Raises ``ValueError`` naming the picture and the reason: missing, of a format that is not read here, truncated or
    corrupt, more than ``max_pixels``, a side over ``max_side``, an aspect ratio over ``max_ratio``, or an array of
    another shape, type or range of values.
    """
    name = name or _name(source)
    limits = (max_pixels, max_side, max_ratio)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(source, name)
        _check_size(image.size, name, *limits)
        return _rgb(image, name)
    if isinstance(source, PIL.Image.Image):
        _check_size(source.size, name, *limits)
        if type(source) is PIL.Image.Image and source.mode == "RGB" and not source.info:
            return source
        return _decode(source, name)
    data = _read(source, name, fetch)
    with _open(data, name, *limits) as image:
        return _decode(image, name)


def open_labels(source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(h, w) values of a label picture as stored: uint8 of greys and palette indices, uint16 of 16-bit greys, and of
    colours int32 R + 256 G + 65536 B. Raises ``ValueError`` as ``open_picture`` does."""
    name = name or _name(source)
    with _open(_read(source, name), name, max_pixels) as image:
        _load(image, name)
        if image.mode in ("RGB", "RGBA"):
            return np.asarray(image.convert("RGB")).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        if image.mode not in ("1", "L", "P", "I;16"):
            raise ValueError(f"picture {name!r} has pixels of mode {image.mode!r}; labels are greys, palettes or RGB")
        return np.array(image) if image.mode != "1" else np.array(image).astype(np.uint8)


def open_mask(source: PictureSource, name: str = "", max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Where a picture may be edited: 255 there, else 0; upright. That is where a mask with transparency is transparent
    (OpenAI's convention), and where a grey mask without is lighter than half (that of inpainting). Raises
    ``ValueError`` as ``open_picture`` does, and for colours without transparency."""
    name = name or _name(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source, name)
    opened = source.copy() if isinstance(source, PIL.Image.Image) else _open(_read(source, name), name, max_pixels)
    with opened as image:
        _load(image, name)
        upright = _upright(image)
        if _transparent(upright):
            return upright.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)
        if upright.mode not in ("1", "L"):
            raise ValueError(f"picture {name!r} has no transparency (mode {upright.mode}), and is not grey either")
        return upright.convert("L").point(lambda grey: 255 if grey > 127 else 0)


def image_size(source: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as stored, without decoding. Raises ``ValueError`` as ``open_picture`` does."""
    name = name or _name(source)
    with _open(_read(source, name), name, max_pixels) as image:
        return image.size


def read_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    """The file as it is. Raises ``ValueError`` naming the picture."""
    try:
        return read(Path(path) if isinstance(path, str) else cast(Path, path))
    except ConnectionError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"picture {name!r} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ValueError(f"picture {name!r} cannot be read: {_reason(error)}") from error


def data_uri_bytes(uri: str, name: str = "") -> bytes:
    """The bytes of a data URI (RFC 2397): any image type, base64 with or without line breaks and padding, or
    percent-encoded. Raises ``ValueError`` naming the picture."""
    name = name or _name(uri)
    head = re.match(r"data:(image/[\w.+-]+|application/octet-stream)?((?:;[\w-]+=[^;,]*)*)(;base64)?,", uri, re.I)
    if not head:
        raise ValueError(
            f"picture {name!r} must be a data URI of an image, data:image/png;base64,..., not {uri[:40]!r}"
        )
    body = unquote_to_bytes(uri[head.end() :])
    if not head.group(3):
        return body
    body = b"".join(body.split()).rstrip(b"=")
    try:
        return base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"picture {name!r} is not valid base64: {error}") from error


# ---- what it comes as -----------------------------------------------------------------------------------------------


def _name(source: object) -> str:
    """What errors call a picture that its caller gave no name."""
    if isinstance(source, str):
        return f"{source[:40]}..." if source[:5].lower() == "data:" else source[:200]
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if isinstance(source, PIL.Image.Image):
        return str(getattr(source, "filename", "") or f"a {source.mode} image of {source.width}x{source.height} pixels")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        kind = "a tensor" if isinstance(source, torch.Tensor) else "an array"
        return f"{kind} of shape {tuple(source.shape)}"
    return str(getattr(source, "name", "") or f"a {type(source).__name__}")


def _read(source: object, name: str, fetch: Callable[[str], bytes] | None = None) -> bytes:
    """The bytes of the picture's file. Raises ``ValueError`` naming it."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return data_uri_bytes(source, name)
    if isinstance(source, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", source)):
        if fetch is None or scheme.group(1).lower() not in ("http", "https"):
            taken = "only http and https are fetched" if fetch else "no URLs are fetched here; download it first"
            raise ValueError(f"picture {name!r} is a URL, and {taken}")
        return fetch(source)
    if isinstance(source, (str, os.PathLike)):
        return read_bytes(source, name)
    if callable(read := getattr(source, "read", None)):
        try:
            data = read()
        except (OSError, ValueError) as error:
            raise ValueError(f"picture {name!r} cannot be read: {_reason(error)}") from error
        if isinstance(data, bytes):
            return data
        raise ValueError(f"picture {name!r} is open as text; open its file with mode 'rb'")
    raise ValueError(
        f"picture {name!r} is a {type(source).__name__}; a picture is a path, bytes, a file object, a data URI, "
        "a PIL.Image, a numpy array or a torch tensor"
    )


def _from_array(source: np.ndarray | torch.Tensor, name: str) -> PIL.Image.Image:
    """The image of an array H x W x C or a tensor C x H x W. Raises ``ValueError`` for other shapes, types, values."""
    if isinstance(source, torch.Tensor):
        layout, detached = "C x H x W", source.detach().cpu()
        values = (detached.float() if detached.is_floating_point() else detached).numpy()
        values = values.transpose(1, 2, 0) if values.ndim == 3 else values
    else:
        layout, values = "H x W x C", source
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise ValueError(f"picture {name!r} has shape {tuple(source.shape)}; it must be H x W or {layout}, C 1, 3 or 4")
    if np.issubdtype(values.dtype, np.floating):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ValueError(
                f"picture {name!r} has floats from {low:g} to {high:g}; they must lie in [0, 1] "
                "((x + 1) / 2 brings [-1, 1] there, x / 255 brings [0, 255])"
            )
        values = (values.astype(np.float64) * 255).round().astype(np.uint8)
    elif values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        raise ValueError(f"picture {name!r} has values of type {values.dtype}; use uint8, bool, or floats in [0, 1]")
    return PIL.Image.fromarray(np.ascontiguousarray(values))


def _open(
    data: bytes,
    name: str,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    max_ratio: float = MAX_RATIO,
) -> PIL.Image.Image:
    """The file's picture, not decoded yet, its size within the limits. Raises ``ValueError`` naming it."""
    if PIL.ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: cut-off pictures would be read as grey")
    known, profile = formats(), None
    if not data:
        raise ValueError(f"picture {name!r} is not a readable {', '.join(known)} file: it is empty")
    if data.startswith(_PNG):
        data, profile = _without_texts(data)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=known)
    except PIL.UnidentifiedImageError as error:
        kind = _kind(data)
        unknown = kind and kind not in known
        reason = f": it is {kind}, which this Pillow does not read; convert it to PNG or JPEG" if unknown else ""
        raise ValueError(f"picture {name!r} is not a readable {', '.join(known)} file{reason}") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ValueError(f"picture {name!r} is too large (limit {max_pixels} pixels): {_reason(error)}") from error
    except BROKEN as error:
        raise ValueError(f"picture {name!r} is corrupt or truncated: {_reason(error)}") from error
    if profile:
        image.info["icc_profile"] = profile
    try:
        _check_size(image.size, name, max_pixels, max_side, max_ratio)
    except ValueError:
        image.close()
        raise
    return image


def _check_size(size: tuple[int, int], name: str, max_pixels: int, max_side: int, max_ratio: float) -> None:
    """Raises ``ValueError`` for a size beyond a limit."""
    (width, height), shown = size, f"{size[0]}x{size[1]} pixels"
    if min(size) < 1:
        raise ValueError(f"picture {name!r} is empty: {shown}")
    if width * height > max_pixels:
        raise ValueError(f"picture {name!r} is too large: {shown}; limit {max_pixels}")
    if max(size) > max_side:
        raise ValueError(f"picture {name!r} is too large: {shown}; limit {max_side} a side")
    if max(size) > max_ratio * min(size):
        raise ValueError(f"picture {name!r} is too narrow: {shown}; its sides may be at most {max_ratio:g} to 1")


_PNG = b"\x89PNG\r\n\x1a\n"
_TURNS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")  # texts that hold the orientation


def _without_texts(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG file without its text chunks, and its colour profile: Pillow refuses the whole file where one of them
    unpacks to more than a megabyte. Texts that hold the orientation stay while they are small."""
    kept, profile, at = [_PNG], None, len(_PNG)
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + size
        key, _, body = data[at + 8 : end - 4].partition(b"\0")
        if kind == b"iCCP":
            profile = _unpacked(kind, body, MAX_PROFILE)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt") or (key in _TURNS and _unpacked(kind, body, 2**20) is not None):
            kept.append(data[at:end])
        at = end
    return b"".join(kept), profile


def _unpacked(kind: bytes, body: bytes, most: int) -> bytes | None:
    """The content of a PNG text or profile chunk behind its key (PNG specification, 11.3.2.3 and 11.3.3): None where
    that is longer than ``most`` bytes or damaged."""
    if kind == b"tEXt" or (kind == b"iTXt" and body[:1] == b"\0"):
        return body if len(body) <= most else None
    stream = body[1:] if kind != b"iTXt" else body[2:].split(b"\0", 2)[-1]
    unpack = zlib.decompressobj()
    try:
        content = unpack.decompress(stream, most)
    except zlib.error:
        return None
    return content if unpack.eof else None


_HEADS = {  # how files of a picture format begin, and its name (Pillow's, where it has one)
    b"\xff\x0a": "JXL",
    b"\0\0\0\x0cJXL ": "JXL",
    b"\0\0\0\x0cjP": "JPEG2000",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"v/1\x01": "OpenEXR",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"<!DOCTYPE html": "HTML",
    b"<html": "HTML",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"hevc": "HEIF", b"mif1": "HEIF"}


def _kind(data: bytes) -> str:
    """The name of the format that a file seems to have, or ""."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "")
    return next((kind for head, kind in _HEADS.items() if data[:64].lstrip(b" \n\r\t").startswith(head)), "")


# ---- what it becomes ------------------------------------------------------------------------------------------------


def _decode(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    _load(image, name)
    return _rgb(_upright(image), name)


def _load(image: PIL.Image.Image, name: str) -> None:
    """Decodes the pixels. Raises ``ValueError`` naming the picture."""
    try:
        file = _file(image) if image.format == "PNG" else b""
        image.load()
        if file and _ends_blank(image) and not _holds_all_rows(file):
            raise EOFError("its pixels end early")
    except BROKEN as error:
        raise ValueError(f"picture {name!r} is corrupt or truncated: {_reason(error)}") from error
    except AttributeError as error:  # Pillow, for an image whose file the caller has closed
        raise ValueError(f"picture {name!r} cannot be read: its file is closed") from error


def _file(image: PIL.Image.Image) -> bytes:
    """The file of an image that has not been decoded yet; empty afterwards."""
    stream = getattr(image, "fp", None)
    if stream is None or not getattr(image, "tile", None):
        return b""
    at = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(at)
    return data


def _ends_blank(image: PIL.Image.Image) -> bool:
    """Whether the last row is zero, as Pillow leaves rows for which a PNG file has no data, or rows come interlaced."""
    last = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or not any(last.tobytes())


def _holds_all_rows(data: bytes) -> bool:
    """Whether a PNG file holds as much pixel data as its size takes (PNG specification, 7.2 and 8.2: a filter byte and
    the pixels for each row, of each of seven passes where it is interlaced). Pillow does not ask."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    grids = [(0, 0, 1, 1)]  # first column and row, and the steps to the next ones
    if interlaced:
        grids = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    needed = 0
    for left, top, across, down in grids:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        needed += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    unpack, at = zlib.decompressobj(), len(_PNG)
    while at + 8 <= len(data) and needed > 0:
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        packed = data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        while packed and needed > 0 and not unpack.eof:
            needed -= len(unpack.decompress(packed, 2**20))
            packed = unpack.unconsumed_tail
        at += 12 + size
    return needed <= 0


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture turned as its EXIF tag says; as it is where the tag cannot be read."""
    try:
        return PIL.ImageOps.exif_transpose(image)
    except BROKEN:
        return image


def _transparent(image: PIL.Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")


def _rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """The decoded, upright picture in sRGB on white, without metadata. Raises ``ValueError`` for unknown pixels."""
    try:
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        alpha = None
        profile = image.info.get("icc_profile")
        if _transparent(image):
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
            image = image.convert("RGB")
        if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
            raise ValueError(f"pixels of mode {image.mode!r} have no known range")
        if isinstance(profile, bytes) and profile:
            image = _in_srgb(image, profile)
        image = image.convert("RGB")
        if alpha is not None:
            image.putalpha(alpha)
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"picture {name!r} cannot be converted to RGB: {_reason(error)}") from error
    image.info = {}
    return image


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """A 16-bit grey picture in eight bits (Pillow would clip it at 255), its transparent value as an alpha channel."""
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
        raise ValueError(f"greys from {values.min()} to {values.max()}; at most 16 bits are read")
    grey = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey = PIL.Image.merge("LA", (grey, PIL.Image.fromarray((values != clear).astype(np.uint8) * 255)))
    grey.info = {"icc_profile": image.info.get("icc_profile")}
    return grey


def _in_srgb(image: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    """The picture in sRGB; as it is where the profile is that, or is damaged, or belongs to other pixels."""
    if image.mode in ("1", "P", "RGBX"):
        image = image.convert("RGB" if image.mode != "1" else "L")
    transform = _to_srgb(profile, image.mode)
    converted = None if transform is None else PIL.ImageCms.applyTransform(image, transform)
    return image if converted is None else converted


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> PIL.ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB, or None where there is nothing to do (within one level of 255)."""
    flags = PIL.ImageCms.Flags.NOCACHE  # pictures are opened in threads
    try:
        opened = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}.get(mode) != opened.profile.xcolor_space:
            return None
        transform = PIL.ImageCms.buildTransform(opened, PIL.ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (*BROKEN, PIL.ImageCms.PyCMSError):
        return None
    if mode not in ("RGB", "L"):
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    ramp = (
        np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, levels.size, 3) if mode == "RGB" else levels[None]
    )
    probe = PIL.Image.fromarray(np.ascontiguousarray(ramp))
    changed = np.asarray(PIL.ImageCms.applyTransform(probe, transform), np.int16) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(changed).max() > 1 else None


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
