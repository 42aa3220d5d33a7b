"""A real server on a real socket, for the tests that ask one."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import httpx

from diptych.serving.app import make_server
from diptych.serving.service import Options

WAIT = 60.0


@contextmanager
def serving(*engines, **options):
    """The running server: ``.url`` and ``.service`` on it."""
    listening = threading.Event()
    options = {"quiet": True, "grace": 10.0, "timeout": WAIT, **options}
    server = make_server(engines, Options(**options), "127.0.0.1", 0, lambda url: None)

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
