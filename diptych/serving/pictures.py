"""Pictures in and out: what others send is limited before it is decoded, and leaves without its metadata."""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import io
import ipaddress
import re
import secrets
import socket
import ssl
import time
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

import PIL.Image

from diptych.data.decoding import open_image
from diptych.serving.schemas import Limits

_DATA = re.compile(r"data:image/(?:png|jpeg|webp|gif|bmp);base64,")
FETCH_SECONDS, FETCH_BYTES = 10.0, 16 * 2**20


async def decode(data: bytes, name: str, limits: Limits) -> PIL.Image.Image:
    """The picture upright in RGB. Raises ``ValueError`` naming it and the reason, before decoding where it can."""
    return await asyncio.to_thread(open_image, data, name, limits.pixels)


def encode(image: PIL.Image.Image, kind: str = "png", quality: int | None = None) -> bytes:
    """The file of a picture; its pixels and nothing else."""
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


@dataclass(frozen=True)
class Stored:
    data: bytes
    media: str
    name: str
    until: float


class Store:
    """Uploads, and pictures asked for by url: in memory, under ids that cannot be guessed, for a while. Where there are
    too many the oldest leave first."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.files, self.bytes = limits, OrderedDict[str, Stored](), 0

    def put(self, data: bytes, media: str, name: str) -> str:
        """The id of what has been stored."""
        key = f"file-{secrets.token_hex(16)}"
        self.files[key] = Stored(data, media, name, time.monotonic() + self.limits.stored_seconds)
        self.bytes += len(data)
        now = time.monotonic()
        while self.files and (self.bytes > self.limits.stored_bytes or next(iter(self.files.values())).until < now):
            self.drop(next(iter(self.files)))
        return key

    def get(self, key: str) -> Stored | None:
        """What is stored under an id, if it still is."""
        found = self.files.get(key)
        return found if found and found.until >= time.monotonic() else None

    def drop(self, key: str) -> bool:
        """Forgets it; whether it was there."""
        found = self.files.pop(key, None)
        self.bytes -= len(found.data) if found else 0
        return found is not None


# ---- other people's servers -----------------------------------------------------------------------------------------


def public_address(host: str, port: int) -> str:
    """An address of the host. Raises ``ValueError`` unless every one of them is public."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} cannot be found") from error
    if private := sorted(a for a in found if not _public(a)):
        raise ValueError(f"host {host!r} has the address {private[0]}, which is not public")
    return sorted(found)[0]


def _public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (inner is None or inner.is_global)


def fetch(url: str, hosts: frozenset[str]) -> bytes:
    """The bytes behind a URL of an allowed host ("*": any). The address is looked up once, checked, and connected to;
    a redirect is an error. Raises ``ValueError``."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise ValueError(f"{url[:80]!r} is not a plain http or https URL")
    if parts.hostname not in hosts and "*" not in hosts:
        raise ValueError(f"host {parts.hostname!r} is not allowed; start the server with --allow-host to fetch from it")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address, until = public_address(parts.hostname, port), time.monotonic() + FETCH_SECONDS
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=FETCH_SECONDS)
    try:
        connection.sock = socket.create_connection((address, port), FETCH_SECONDS)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=parts.hostname)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "diptych", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{parts.hostname} answered {answer.status}; redirects are not followed")
        data = b""
        while piece := answer.read(65536):
            data += piece
            if len(data) > FETCH_BYTES or time.monotonic() > until:
                raise ValueError(f"{parts.hostname}: more than {FETCH_BYTES} bytes or {FETCH_SECONDS:g} s")
        return data
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{parts.hostname} cannot be read: {type(error).__name__}") from error
    finally:
        connection.close()
