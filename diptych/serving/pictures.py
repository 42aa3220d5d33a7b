"""Pictures in and out: limited before they are decoded, and written without their metadata."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable

import PIL.Image

from diptych.data.decoding import open_picture
from diptych.parts.images import png_bytes
from diptych.serving.options import Limits


async def decode(
    source: bytes | str, name: str, limits: Limits, fetch: Callable[[str], bytes] | None = None
) -> PIL.Image.Image:
    """The picture of a file's bytes, a data URI, or a URL that ``fetch`` reads: upright, in sRGB. Raises ``ValueError``
    naming it and the reason, before decoding where it can."""
    return await asyncio.to_thread(open_picture, source, name, limits.pixels, fetch=fetch)


def encode(image: PIL.Image.Image, kind: str = "png", quality: int | None = None) -> bytes:
    """The file of a picture: its pixels without metadata. ``kind`` is png, jpeg or webp."""
    if kind == "png":
        return png_bytes(image)
    out = io.BytesIO()
    bare = PIL.Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    bare.save(out, kind.upper(), **({} if quality is None else {"quality": quality}))
    return out.getvalue()


def base64_text(data: bytes) -> str:
    """The bytes as base64."""
    return base64.b64encode(data).decode()
