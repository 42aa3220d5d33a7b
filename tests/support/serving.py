"""A real server on a real socket, for the tests that ask one."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import httpx

from diptych.serving.options import Options
from diptych.serving.server import listen, make_server

WAIT = 60.0


@contextmanager
def serving(*engines, **options):
    """The running server: ``.url`` and ``.service`` on it."""
    listening = threading.Event()
    options = {"quiet": True, "grace": 10.0, "timeout": WAIT, **options}
    host = options.pop("host", "127.0.0.1")
    sockets = listen(host, 0)
    try:
        server = make_server(engines, Options(**options), host, sockets, lambda url: None)
    except ValueError:
        for opened in sockets:
            opened.close()
        raise

    def announce(url):
        server.url = url
        listening.set()

    server.announce = announce
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        assert listening.wait(WAIT)
        with httpx.Client(base_url=server.url, timeout=WAIT) as server.http:
            yield server
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive(), "the server does not end"
