"""What happens before a request is parsed (host, key, origin, rate, size, depth) and after (headers, log, metrics)."""

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
from diptych.serving.hosts import HostNames
from diptych.serving.metrics import Metrics, log
from diptych.serving.options import Options

KEYLESS = re.compile(r"/|/static/[^/]+|/health|/ready|/version|/metrics|/openapi\.json|/v1/files/[^/]+/content")
PROBES = ("/health", "/ready")  # answered however busy the server is
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
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
    """The API keys that open the server. Without keys everybody may use it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.digests = [hashlib.sha256(k.encode()).digest() for k in keys]

    def __call__(self, authorization: str) -> str | None:
        """A name for the client, derived from its key; None where the key is unknown. Every key is compared, each in
        constant time."""
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        same = [hmac.compare_digest(digest, d) for d in self.digests]
        return f"key {digest.hex()[:8]}" if any(same) and scheme.lower() == "bearer" else None


class Rates:
    """A bucket of ``per_minute`` requests for each client, refilled evenly. At most ``most`` clients are remembered."""

    def __init__(self, per_minute: float | None, most: int = 10_000) -> None:
        self.rate, self.most, self.buckets = per_minute, most, OrderedDict[str, tuple[float, float]]()

    def __call__(self, client: str) -> float:
        """Takes a request from the client's bucket; returns the seconds to wait where it is empty, else 0."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        left, then = self.buckets.pop(client, (self.rate, now))
        left = min(self.rate, left + (now - then) * self.rate / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.rate
        self.buckets[client] = (left - (not wait), now)
        if len(self.buckets) > self.most:
            self.buckets.popitem(last=False)
        return wait


class Denied(Exception):
    """A request that does not reach the application."""

    def __init__(
        self, status: int, message: str, code: str, kind: str = "invalid_request_error", **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, problem(message, code, kind=kind)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Guard:
    """The application behind these checks, as an ASGI application."""

    def __init__(
        self, app: ASGIApp, hosts: HostNames, keys: Keys, rates: Rates, metrics: Metrics, options: Options
    ) -> None:
        self.app, self.hosts, self.keys, self.rates = app, hosts, keys, rates
        self.metrics, self.limits, self.quiet, self.origins = metrics, options.limits, options.quiet, options.origins
        self.requests = self.body_bytes = 0  # in the application's hands, and of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks an HTTP request, passes it to the application, and logs and counts it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, number = time.perf_counter(), 0, secrets.token_hex(8)
        if scope["method"] == "HEAD":  # answered as GET; the HTTP server leaves the body out
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {k.lower() for k, _ in message["headers"]}
                more = {"x-request-id": number, **HEADERS, **self._cross_origin(scope)}
                message["headers"] += [(k.encode(), v.encode()) for k, v in more.items() if k.encode() not in present]
            await send(message)

        try:
            await self._answer(scope, receive, answer)
        except Denied as error:
            await _send_json(answer, error.status, error.body, error.headers)
        finally:
            seconds, route = time.perf_counter() - start, getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, seconds)
            if not self.quiet:
                note = scope.get("state", {}).get("note", "")
                log.info("%s %s %s %d %.3f s %s", number, scope["method"], route, status, seconds, note)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its whole body. Raises ``Denied`` for one that must not reach the application."""
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if size > self.limits.header_bytes:
            raise Denied(431, "the header of the request is too large", "header_too_large")
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:  # a browser's preflight
            self._check_site(headers)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        client = self._client(scope, headers)
        if scope["method"] != "POST":
            await self._run(scope, receive, send)
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        self._check_post(client, kind, headers)
        body = await self._body(headers, receive)
        self.body_bytes += len(body)
        try:
            if kind == "application/json" and (depth := json_depth(body)) > self.limits.json_depth:
                raise Denied(400, f"JSON nested {depth} deep; at most {self.limits.json_depth}", "json_too_deep")
            await self._run(scope, _replayed(body, receive), send)
        finally:
            self.body_bytes -= len(body)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's answer, unless too many requests are being answered."""
        if self.requests >= self.limits.requests and scope["path"] not in PROBES:
            message = f"{self.requests} requests are being answered and at most {self.limits.requests} may; try again"
            raise Denied(503, message, "overloaded", "server_error", retry_after="1")
        self.requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.requests -= 1

    def _client(self, scope: Scope, headers: dict[str, str]) -> str:
        """Who asks: a name of its key, or its address. Raises ``Denied`` for a host that is not this server's, a page
        of another site, and a client without a key."""
        self._check_site(headers)
        if not self.keys.digests or KEYLESS.fullmatch(scope["path"]):
            return (scope.get("client") or ("unknown",))[0]
        given = headers.get("authorization") or ("x-api-key" in headers and f"Bearer {headers['x-api-key']}") or ""
        client = self.keys(given)
        if client is None:
            message = "this API key is not valid" if given else "an API key is needed: Authorization: Bearer KEY"
            raise Denied(401, message, "invalid_api_key", www_authenticate="Bearer")
        return client

    def _check_site(self, headers: dict[str, str]) -> None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and host not in self.hosts:  # HTTP/1.0 may leave it out; no browser does
            message = f"host {host[:100]!r} is not a name of this server; start it with --host-name to use one"
            raise Denied(403, message, "host_not_allowed")
        if origin is not None and urlsplit(origin).netloc != host and not self._allowed(origin):
            message = f"requests from {origin[:100]} are not taken; start the server with --allow-origin to take them"
            raise Denied(403, message, "cross_origin")

    def _allowed(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def _cross_origin(self, scope: Scope) -> dict[str, str]:
        """The headers by which a browser lets the page of an allowed site read the answer."""
        origin = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"origin"), None)
        if origin is None or not self._allowed(origin):
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, content-type, x-api-key",
            "access-control-expose-headers": "warning, retry-after, x-request-id",
            "access-control-max-age": "600",
            "vary": "origin",
        }

    def _check_post(self, client: str, kind: str, headers: dict[str, str]) -> None:
        if wait := self.rates(client):
            message = f"more than {self.rates.rate:g} requests a minute"
            raise Denied(429, message, "rate_limit_exceeded", "requests", retry_after=str(ceil(wait)))
        if kind not in ("application/json", "multipart/form-data"):
            message = f"content-type {kind[:60]!r}: use application/json or multipart/form-data"
            raise Denied(415, message, "content_type")
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise Denied(415, f"content-encoding {coding[:60]!r}: send the body uncompressed", "content_encoding")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises ``Denied``, as early as possible, for one that is too large or too slow."""
        most, length = self.limits.body_bytes, headers.get("content-length", "0")
        too_large = Denied(413, f"the body has more than {most} bytes", "body_too_large")
        if not length.isdigit() or int(length) > most:
            raise too_large
        pieces, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    pieces.append(message.get("body", b""))
                    size, more = size + len(pieces[-1]), message.get("more_body", False)
                    self.body_bytes += len(pieces[-1])
                    if size > most:
                        raise too_large
                    if self.body_bytes > self.limits.bodies_bytes:
                        full = "the server holds as many bytes of requests as it may; try again"
                        raise Denied(503, full, "overloaded", "server_error", retry_after="1")
        except TimeoutError as error:
            raise Denied(408, f"the body took more than {self.limits.body_seconds:g} s", "timeout") from error
        finally:
            self.body_bytes -= size
        return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body again, and afterwards what ``receive`` gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _send_json(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    content = json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    start = {"type": "http.response.start", "status": status}
    await send(start | {"headers": [(k.encode(), v.encode("latin-1")) for k, v in fields.items()]})
    await send({"type": "http.response.body", "body": content})
