"""Connections that are bounded in number and in time, so that slow or silent clients cannot lock others out.

A connection *waits* while the server waits for its client: for a header, for a body, or for the next request. Waiting
connections end after a while, and where there are too many (of one address, or of all) the oldest of them make room.
What is being answered is never ended to make room.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from diptych.serving.errors import problem
from diptych.serving.options import Limits


class Connections:
    """The open connections of a server, oldest first."""

    def __init__(self, limits: Limits, most: int) -> None:
        self.limits, self.most = limits, most
        self.open: dict[Connection, None] = {}
        self.addresses: Counter[str] = Counter()

    def enter(self, connection: Connection) -> None:
        """Takes a new connection in, and ends the oldest waiting ones where there are too many."""
        self.open[connection] = None
        self.addresses[connection.address] += 1
        if self.addresses[connection.address] > self.limits.connections_per_address:
            self._end_oldest(connection, connection.address)
        elif len(self.open) > self.most:
            self._end_oldest(connection, None)

    def leave(self, connection: Connection) -> None:
        """Forgets a connection that has ended."""
        if connection in self.open:
            del self.open[connection]
            self.addresses[connection.address] -= 1
            if not self.addresses[connection.address]:
                del self.addresses[connection.address]

    def _end_oldest(self, newest: Connection, address: str | None) -> None:
        for connection in self.open:
            if connection.waiting and connection is not newest and address in (None, connection.address):
                self.leave(connection)
                connection.transport.abort()
                return


class Connection(H11Protocol):
    """HTTP/1.1 of one client."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        crowd: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.crowd, self.limits = crowd, crowd.limits
        self.header_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.address = ""

    @property
    def waiting(self) -> bool:
        """Whether the server waits for the client."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Registers the connection and starts the time limit of its first header."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.crowd.enter(self)
        self._time_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Removes the connection and cancels its timers."""
        super().connection_lost(exc)
        self.crowd.leave(self)
        self._unset_keepalive_if_required()
        for timer in (self.header_timer, self.write_timer):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Passes bytes on; the first byte of a further request starts its header's time limit."""
        if self.header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._time_header()  # the first byte of a further request
        super().data_received(data)

    def handle_events(self) -> None:
        """Handles what was parsed; a complete header ends its time limit."""
        super().handle_events()
        if self.header_timer and self.cycle and not self.cycle.response_complete:
            self.header_timer.cancel()  # the header has arrived
            self.header_timer = None

    def _time_header(self) -> None:
        self.header_timer = self.loop.call_later(self.limits.header_seconds, self._header_is_late)

    def _header_is_late(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            seconds = f"{self.limits.header_seconds:g} s"
            self._send_error(408, f"the header of the request took more than {seconds}", "timeout")
        else:
            self.transport.close()  # nothing was asked

    # ---- clients that do not read --------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Starts the time limit for a client that does not read its response."""
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Ends that time limit."""
        super().resume_writing()
        if self.write_timer:
            self.write_timer.cancel()
            self.write_timer = None

    # ---- errors before there is a request ------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP. Uvicorn calls this while it handles h11's error, which knows the status."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            self._send_error(431, "the header of the request is too large", "header_too_large")
        else:
            self._send_error(status, f"this is not an HTTP request: {error or msg}", "invalid_request")

    def _send_error(self, status: int, message: str, code: str) -> None:
        """Writes an error in OpenAI's shape and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(problem(message, code)).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(content)))]
            response = h11.Response(
                status_code=status, headers=[*headers, ("connection", "close")], reason=STATUS_PHRASES[status]
            )
            for event in (response, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
