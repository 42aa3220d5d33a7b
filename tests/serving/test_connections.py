"""Who may address the server, slow and silent clients, busy ports, and errors before there is a request."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diptych.generation.engine import Engine
from diptych.serving import server as server_
from diptych.serving.hosts import HostNames, host_name
from diptych.serving.options import Limits, Options
from diptych.serving.server import listen, most_connections
from tests.support import tiny
from tests.support.serving import WAIT, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's libraries
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-le"
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.shake(tiny.model("bagel")).requires_grad_(False), "tiny")


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, host_names=("pictures.example", "Box.Local.")) as running:
        yield running


def connect(server) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    raw.settimeout(WAIT)
    return raw


def answer(raw: socket.socket) -> tuple[int, dict]:
    """Status and JSON of the next answer; (0, {}) where the connection was closed without one."""
    with contextlib.closing(raw.makefile("rb")) as file:
        try:
            head = file.readline()
            if not head:
                return 0, {}
            headers = {}
            while line := file.readline().strip():
                name, _, value = line.decode().partition(": ")
                headers[name.lower()] = value
            return int(head.split()[1]), json.loads(file.read(int(headers["content-length"])))
        except ConnectionResetError:
            return 0, {}


def ask(server, data: bytes) -> tuple[int, dict]:
    with connect(server) as raw:
        raw.sendall(data)
        return answer(raw)


# ---- names of the server --------------------------------------------------------------------------------------------


def request_as(server, host: str, path="/v1/models", **headers):
    return server.http.get(path, headers={"host": host, **headers})


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8000",
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "localhost.:80",
        "[::1]:8000",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "pictures.example",
        "Pictures.Example.:443",
        "box.local",
    ],
)
def test_the_server_answers_to_its_names(server, host):
    assert request_as(server, host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "10.0.0.1",
        "[::2]",
        "169.254.169.254",
        "user@localhost",
        "localhost:port",
        "localhost:1:2",
        "localhost..",
        "..",
        "",
        "[::1",
        "::1",
        "localhost/x",
        "localhost#x",
        "sub.pictures.example",
        "127.1",
        "2130706433",
        "0.0.0.0",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/", "/v1/diptych/runs", "/health"])
def test_other_names_are_refused(server, host, path):
    refused = request_as(server, host, path)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed"


def test_a_page_whose_name_was_re_pointed_cannot_use_the_server(server):
    """DNS rebinding: host and origin agree, for the browser takes the page and the server for one site."""
    for method, path in (("POST", "/v1/images/generations"), ("GET", "/v1/models"), ("DELETE", "/v1/files/x")):
        headers = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
        assert server.http.request(method, path, headers=headers).status_code == 403
    upgrade = {"host": "evil.example", "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    assert server.http.get("/", headers={**upgrade, "sec-websocket-key": "x" * 22 + "=="}).status_code == 403
    same = {"host": "pictures.example:8000", "origin": "https://pictures.example:8000"}
    assert server.http.get("/v1/models", headers=same).status_code == 200
    other = same | {"origin": "https://evil.example"}
    assert server.http.get("/v1/models", headers=other).json()["error"]["code"] == "cross_origin"


def test_names_of_a_server_on_every_address():
    open_to_all = HostNames("0.0.0.0", ("box",))
    assert all(h in open_to_all for h in ("192.168.1.5:8000", "[fe80::1]", "localhost", "box", "BOX:1"))
    assert "evil.example" not in open_to_all and "box.evil.example" not in open_to_all
    assert "192.168.1.5" in HostNames("::") and "10.0.0.2" in HostNames("10.0.0.2") and "fd00::1" not in HostNames("::")
    assert "[fd00::1]:80" in HostNames("fd00::1") and "10.0.0.3" not in HostNames("10.0.0.2")
    assert host_name("[0:0::1]") == "::1" and host_name("[a]") is None
    for name in ("a b", "http://a", "a/b", ""):
        with pytest.raises(ValueError, match="is not a host name or an address"):
            HostNames("127.0.0.1", (name,))


# ---- slow and silent clients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models"])
def test_half_open_connections_do_not_keep_others_out(engine, path):
    """Three hundred of them where sixty may be open; ``benchmarks/serve.py --half-open 2000`` is the large form."""
    limits = Limits(connections=60, connections_per_address=50, header_seconds=WAIT)
    with serving(engine, limits=limits) as server, contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(server)).sendall(HALF)
        start = time.monotonic()
        status, _ = ask(server, b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode())
        assert status == 200 and time.monotonic() - start < 5
        assert len(server.server_state.connections) <= 60


def test_the_oldest_waiting_connection_makes_room_and_none_that_is_answered(engine):
    with serving(engine, limits=Limits(connections=4, connections_per_address=4)) as server:
        body = json.dumps({"prompt": "a star", "steps": 60, "n": 4, "seed": 0, "size": "32x32"}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with contextlib.ExitStack() as stack:
            drawing = stack.enter_context(connect(server))
            drawing.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            first = stack.enter_context(connect(server))
            first.sendall(HALF)
            time.sleep(0.2)
            others = [stack.enter_context(connect(server)) for _ in range(3)]
            assert answer(first) == (0, {})
            for other in others:
                other.sendall(GET)
                assert answer(other)[0] == 200
            assert answer(drawing)[0] == 200


def test_headers_and_pauses_are_timed(engine):
    limits = Limits(header_seconds=0.5, idle_seconds=1, body_seconds=0.5)
    with serving(engine, limits=limits) as server, contextlib.ExitStack() as stack:
        silent, half, slow, used, drip = (stack.enter_context(connect(server)) for _ in range(5))
        half.sendall(HALF)
        slow.sendall(HALF + b"ngth: 100\r\ncontent-type: application/json\r\n\r\n{")
        used.sendall(GET)
        assert answer(used)[0] == 200
        start = time.monotonic()
        for byte in HALF:  # a byte at a time does not put the end off
            with contextlib.suppress(OSError):
                drip.sendall(bytes([byte]))
            time.sleep(0.02)
        for raw, status in ((silent, 0), (half, 408), (slow, 408), (drip, 408)):
            got, told = answer(raw)
            assert got == status, raw
            assert not status or told["error"]["code"] == "timeout"
        assert answer(used) == (0, {})  # idle for a second
        assert time.monotonic() - start < 10
        assert server.http.get("/health").status_code == 200
        again = stack.enter_context(connect(server))
        for _ in range(3):  # a connection lives as long as it is used
            again.sendall(GET)
            assert answer(again)[0] == 200
            time.sleep(0.6)


def test_a_client_that_does_not_read_is_let_go(engine):
    with serving(engine, limits=Limits(write_seconds=0.5)) as server, connect(server) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                raw.sendall(b"GET /static/app.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20)
        end = time.monotonic() + WAIT
        while server.server_state.connections:
            assert time.monotonic() < end, "the connection is still there"
            time.sleep(0.02)


def test_overload_is_told_and_probes_are_answered(engine):
    with serving(engine, limits=Limits(requests=1)) as server, connect(server) as raw:
        body = json.dumps({"prompt": "a star", "steps": 200, "n": 4, "seed": 0}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        raw.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        [worker] = server.service.workers.values()
        end = time.monotonic() + WAIT
        while not worker.calls:
            assert time.monotonic() < end
            time.sleep(0.01)
        refused = server.http.get("/v1/models")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == {
            "message": "1 requests are being answered and at most 1 may; try again",
            "type": "server_error",
            "param": None,
            "code": "overloaded",
        }
        assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200


def test_all_bodies_together_are_bounded(engine):
    with serving(engine, limits=Limits(bodies_bytes=5000)) as server, connect(server) as raw:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        raw.sendall(head + b"content-length: 4000\r\n\r\n" + b" " * 3999)
        time.sleep(0.2)
        refused = server.http.post("/v1/chat/completions", json={"prompt": "x" * 3000})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        raw.sendall(b" ")
        assert answer(raw)[0] == 400
        assert server.http.post("/v1/chat/completions", json={"prompt": "x" * 3000}).status_code == 400


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, status, code",
    [
        (b"hello\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_request"),  # no host
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", 431, "header_too_large"),
        (b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431, "header_too_large"),
        (b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n", 404, "not_found"),
        (b"PUT /health HTTP/1.1\r\nhost: localhost\r\n\r\n", 405, "method_not_allowed"),
        (b"BREW /health HTTP/1.1\r\nhost: localhost\r\n\r\n", 405, "method_not_allowed"),
    ],
    ids=lambda x: x[:20] if isinstance(x, bytes) else str(x),
)
def test_every_error_has_openais_shape(server, data, status, code):
    got, told = ask(server, data)
    assert got == status and set(told["error"]) == {"message", "type", "param", "code"}
    assert told["error"]["code"] == code and told["error"]["message"]


def test_errors_name_what_is_there(server):
    told = server.http.post("/v1/responses", json={}).json()["error"]["message"]
    assert told.startswith("no endpoint POST /v1/responses; endpoints: ") and "/v1/chat/completions" in told
    told = server.http.get("/v1/files").json()["error"]["message"]
    assert told == "GET /v1/files does not exist; POST does"
    headers = {"content-type": "application/json"}
    error = server.http.post("/v1/chat/completions", content=b'{"a": 1,,}', headers=headers).json()["error"]
    assert error["code"] == "invalid_json" and error["param"] is None
    assert error["message"].startswith("the body is not JSON: ") and error["message"].endswith("at character 8")
    told = server.http.post("/v1/chat/completions", content=b"[]", headers=headers).json()["error"]
    assert told["message"] == "the body must be a JSON object"
    zipped = server.http.post("/v1/chat/completions", content=b"x", headers=headers | {"content-encoding": "gzip"})
    assert zipped.status_code == 415 and "content-encoding 'gzip'" in zipped.json()["error"]["message"]
    form = {"content-type": "multipart/form-data; boundary=y"}
    told = server.http.post("/v1/images/edits", content=b"--x--", headers=form)
    assert told.status_code == 400 and told.json()["error"]["code"] == "invalid_body" and "multipart" in told.text


# ---- ports ---------------------------------------------------------------------------------------------------------


def test_a_busy_port_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(server_, "make_server", lambda *_: pytest.fail("went on"))
    [taken] = listen("127.0.0.1", 0)
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken; --port 0 takes a free one"):
            server_.serve(lambda: pytest.fail("loaded"), Options(), "127.0.0.1", port, print)
    with pytest.raises(ValueError, match=r"cannot listen on '192\.0\.2\.1', port 0"):
        listen("192.0.2.1", 0)
    with pytest.raises(ValueError, match="host 'no such host' cannot be found"):
        listen("no such host", 0)
    with pytest.raises(ValueError, match="port must lie between 0 and 65535, not 70000"):
        listen("127.0.0.1", 70000)


def test_the_port_is_free_again_when_loading_fails():
    [free] = listen("127.0.0.1", 0)
    port = free.getsockname()[1]
    free.close()

    def fails():
        raise ValueError("no such model")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such model"):
            server_.serve(fails, Options(), "127.0.0.1", port, print)


def test_the_verb_ends_with_two_on_a_busy_port(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    [taken] = listen("127.0.0.1", 0)
    with taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "diptych", "serve", "bagel/tiny", "--port", port]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 2 and f"port {port} is taken; --port 0 takes a free one" in done.stderr
    assert "Traceback" not in done.stderr


def test_connections_stay_below_the_limit_of_open_files(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for files, most in (((1024, 1024), 384), ((256, 4096), 3456), ((1024, 10**6), 4096), ((10**6, 10**6), 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: files)
        assert most_connections(4096) == most, files
    assert asked == [(1024, 1024), (4096, 4096), (4736, 10**6)]
