"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from diptych.serving.errors import Refused, refusal, wrong_value
from diptych.serving.worker import Call


def server_sent(data: dict[str, Any], event: str = "") -> str:
    """One event with its data as JSON."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data)}\n\n"


class EventStream(Response):
    """The server-sent events of a call. The call ends with them: finished, refused, or because the client has left."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, pieces: AsyncIterator[str], headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.call, self.pieces = call, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events. Ends the call also where the client disconnects."""

        async def write(text: str) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(": in line\n\n")
            try:
                async for piece in self.pieces:
                    await write(piece)
            except Refused as error:
                await write(server_sent(refusal(error), "error"))
            except ValueError as error:
                await write(server_sent(wrong_value(error), "error"))
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.call.end()
