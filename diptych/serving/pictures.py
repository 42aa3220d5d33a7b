"""Pictures in and out: limited before they are decoded, and written without their metadata."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re

import PIL.Image

from diptych.data.decoding import WEB_FORMATS, open_picture
from diptych.serving.options import Limits

_DATA = re.compile(r"data:image/(?:png|jpeg|webp|gif|bmp);base64,")


async def decode(data: bytes, name: str, limits: Limits) -> PIL.Image.Image:
    """The picture upright in RGB. Raises ``ValueError`` naming it and the reason, before decoding where it can."""
    return await asyncio.to_thread(open_picture, data, name, limits.pixels, known=WEB_FORMATS)


def encode(image: PIL.Image.Image, kind: str = "png", quality: int | None = None) -> bytes:
    """The file of a picture: its pixels without metadata."""
    out = io.BytesIO()
    bare = PIL.Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    bare.save(out, kind.upper(), **({} if quality is None else {"quality": quality}))
    return out.getvalue()


def base64_text(data: bytes) -> str:
    """The bytes as base64."""
    return base64.b64encode(data).decode()


def data_uri(image: PIL.Image.Image) -> str:
    """The picture as a data URI."""
    return f"data:image/png;base64,{base64_text(encode(image))}"


def from_data_uri(uri: str, name: str) -> bytes:
    """The bytes of a data URI. Raises ``ValueError``."""
    head = _DATA.match(uri)
    if not head:
        raise ValueError(f"{name} must be data:image/(png|jpeg|webp|gif|bmp);base64,..., not {uri[:40]!r}")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is not valid base64: {error}") from error
