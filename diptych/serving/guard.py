"""Before anything is parsed: keys, origins, rates, sizes, depth; and afterwards: headers, log, measures."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from math import ceil
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.serving.errors import problem
from diptych.serving.metrics import Metrics, log
from diptych.serving.schemas import Limits

OPEN = re.compile(r"/|/static/[^/]+|/health|/ready|/metrics|/openapi\.json|/v1/files/[^/]+/content")  # no key needed


_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


BODY_SECONDS = 60.0


HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
}


def json_depth(body: bytes) -> int:
    """How deeply lists and objects are nested, without parsing."""
    depth = deepest = 0
    for mark in re.findall(rb"[\[\]{}]", _STRINGS.sub(b"", body)):
        depth += 1 if mark in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


class Keys:
    """The API keys that open the server; none: everybody may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.digests = [hashlib.sha256(k.encode()).digest() for k in keys]

    def __call__(self, authorization: str) -> str | None:
        """A name for who asks: of a key that is one of ours, never the key; None for a stranger. Every key is
        compared, each in constant time."""
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        same = [hmac.compare_digest(digest, d) for d in self.digests]
        return f"key {digest.hex()[:8]}" if any(same) and scheme.lower() == "bearer" else None


class Rates:
    """A bucket of ``per_minute`` requests for everybody who asks, refilled evenly."""

    def __init__(self, per_minute: float | None, most: int = 10_000) -> None:
        self.rate, self.most, self.buckets = per_minute, most, OrderedDict[str, tuple[float, float]]()

    def __call__(self, who: str) -> float:
        """Seconds to wait; 0: go ahead."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        left, then = self.buckets.pop(who, (self.rate, now))
        left = min(self.rate, left + (now - then) * self.rate / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.rate
        self.buckets[who] = (left - (not wait), now)
        if len(self.buckets) > self.most:
            self.buckets.popitem(last=False)
        return wait


class Guard:
    """The application behind all of this, as ASGI."""

    def __init__(self, app: ASGIApp, keys: Keys, rates: Rates, limits: Limits, metrics: Metrics, quiet: bool) -> None:
        self.app, self.keys, self.rates, self.limits, self.metrics = app, keys, rates, limits, metrics
        self.quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, number = time.perf_counter(), 0, secrets.token_hex(8)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {k.lower() for k, _ in message["headers"]}
                more = {"x-request-id": number, **HEADERS}
                message["headers"] += [(k.encode(), v.encode()) for k, v in more.items() if k.encode() not in own]
            await send(message)

        try:
            await self._through(scope, receive, answer)
        finally:
            seconds, route = time.perf_counter() - start, getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, seconds)
            if not self.quiet:
                note = scope.get("state", {}).get("note", "")
                log.info("%s %s %s %d %.3f s %s", number, scope["method"], route, status, seconds, note)

    async def _through(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        who = (scope.get("client") or ("unknown",))[0]
        if self.keys.digests and not OPEN.fullmatch(scope["path"]):
            who = self.keys(headers.get("authorization", ""))
            if who is None:
                refused = problem("an API key is needed: Authorization: Bearer KEY", "invalid_api_key")
                await _refuse(send, 401, refused, {"www-authenticate": "Bearer"})
                return
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            await _refuse(send, 403, problem(f"requests from {origin[:100]} are not taken", "cross_origin"))
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if wait := self.rates(who):
            told = problem(f"more than {self.rates.rate:g} requests a minute", "rate_limit_exceeded", kind="requests")
            await _refuse(send, 429, told, {"retry-after": str(ceil(wait))})
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", "multipart/form-data"):
            told = problem(f"content-type {kind[:60]!r}: use application/json or multipart/form-data", "content_type")
            await _refuse(send, 415, told)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(headers, receive)
        except TimeoutError:
            await _refuse(send, 408, problem(f"the body took more than {BODY_SECONDS:g} s", "timeout"))
            return
        if body is None:
            most = self.limits.body_bytes
            await _refuse(send, 413, problem(f"the body has more than {most} bytes", "body_too_large"))
            return
        if kind == "application/json" and (depth := json_depth(body)) > self.limits.json_depth:
            told = problem(f"JSON nested {depth} deep; at most {self.limits.json_depth}", "json_too_deep")
            await _refuse(send, 400, told)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The whole body; None where it is too large, found out as early as possible."""
        most, length = self.limits.body_bytes, headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            return None
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            pieces.append(message.get("body", b""))
            size, more = size + len(pieces[-1]), message.get("more_body", False)
            if size > most:
                return None
        return b"".join(pieces)


async def _refuse(send: Send, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    content = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    start = {"type": "http.response.start", "status": status}
    await send(start | {"headers": [(k.encode(), v.encode("latin-1")) for k, v in fields.items()]})
    await send({"type": "http.response.body", "body": content})
