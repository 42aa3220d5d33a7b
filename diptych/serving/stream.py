"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from diptych.serving.errors import _told, problem
from diptych.serving.worker import Call, Refused


def _sse(row: dict[str, Any], event: str = "") -> str:
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(row)}\n\n"


class EventStream(Response):
    """Server-sent events of a call, which ends with them: finished, refused, or because the client has left."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, pieces: AsyncIterator[str]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.call, self.pieces = call, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b": in line\n\n", "more_body": True})
            try:
                async for piece in self.pieces:
                    await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
            except (Refused, ValueError) as error:
                told = _told(error) if isinstance(error, Refused) else problem(str(error), "invalid_value")
                body = _sse(told, "error").encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.call.end()
