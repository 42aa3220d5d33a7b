"""The process that serves: its sockets, its connections, and its end."""

from __future__ import annotations

import errno
import functools
import logging
import resource
import socket
from collections.abc import Callable, Sequence

import uvicorn

from diptych.generation.engine import Engine
from diptych.serving.app import create_app
from diptych.serving.connections import Connection, Connections
from diptych.serving.metrics import log
from diptych.serving.options import Options
from diptych.serving.service import Service

BACKLOG = 256  # connections that the system holds until they are accepted; so many may be accepted at once
OTHER_FILES = 2 * BACKLOG + 128  # open files that are kept for anything but connections


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of ``host``; port 0 takes a free one. Raises ``ValueError`` where the port is
    taken or forbidden, or the host is none of this machine's."""
    if not 0 <= port < 65536:
        raise ValueError(f"port must lie between 0 and 65535, not {port}")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} cannot be found") from error
    sockets: list[socket.socket] = []
    for kind, address in dict.fromkeys((f, (a[0], *a[1:])) for f, _, _, _, a in addresses):
        one = socket.socket(kind, socket.SOCK_STREAM)
        sockets.append(one)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port or sockets[0].getsockname()[1], *address[2:]))
            one.listen(BACKLOG)
        except OSError as error:
            for opened in sockets:
                opened.close()
            raise ValueError(_reason(error, host, port)) from error
    return sockets


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken; --port 0 takes a free one"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs rights that this process lacks; take one from 1024 on"
    return f"cannot listen on {host!r}, port {port}: {error.strerror}"


def most_connections(wanted: int) -> int:
    """How many connections may be open, up to ``wanted``: a connection is an open file, and a process may open only so
    many (``ulimit -n``). Raises this process's limit as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft - OTHER_FILES))


class Server(uvicorn.Server):
    """Uvicorn that finishes the requests in hand before it closes connections, and reports its address."""

    def __init__(
        self, config: uvicorn.Config, service: Service, sockets: list[socket.socket], announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self.service, self.sockets, self.announce = service, sockets, announce

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal, or ``should_exit``, ends it."""
        super().run(sockets or self.sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen and announces the address, with the port that was chosen."""
        await super().startup(sockets)
        if self.started:
            host, port = self.sockets[0].getsockname()[:2]
            self.announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes the running requests, then closes the sockets."""
        await self.service.drain()  # requests that come meanwhile are told that the server is shutting down
        await super().shutdown(sockets)


def make_server(
    engines: Sequence[Engine],
    options: Options,
    host: str,
    sockets: list[socket.socket],
    announce: Callable[[str], None],
) -> Server:
    """A server on ``sockets``, which are bound to ``host``; ready to ``run``."""
    service = Service(engines, options)
    crowd = Connections(options.limits, most_connections(options.limits.connections))
    config = uvicorn.Config(
        create_app(service, host),
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        http=functools.partial(Connection, crowd=crowd),  # type: ignore[arg-type]  # called as the class would be
        ws="none",
        backlog=BACKLOG,
        h11_max_incomplete_event_size=options.limits.header_bytes,
        timeout_keep_alive=options.limits.idle_seconds,
        timeout_graceful_shutdown=5,
    )
    return Server(config, service, sockets, announce)


def serve(
    load: Callable[[], Sequence[Engine]], options: Options, host: str, port: int, announce: Callable[[str], None]
) -> None:
    """Takes the port, then loads the models, then serves until a signal ends it.

    ``announce`` is called with the server's address once it answers. Raises ``ValueError`` where the port cannot be
    taken, before anything is loaded."""
    sockets = listen(host, port)
    try:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
        if not options.keys and host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("no API keys: everybody who reaches %s may use this server", host)
        make_server(load(), options, host, sockets, announce).run()
    finally:
        for opened in sockets:
            opened.close()
