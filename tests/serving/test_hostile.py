"""What nobody should send: refused with a reason, at little cost, and without telling what others sent."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.data.decoding import MAX_PIXELS
from diptych.generation.engine import Engine
from diptych.models import store as store_
from diptych.serving import fetch as fetch_
from diptych.serving import store as files
from diptych.serving.guard import Keys, Rates, json_depth
from diptych.serving.options import Limits, Options
from diptych.serving.pictures import encode
from diptych.serving.store import FileStore
from tests.support import tiny
from tests.support.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's libraries
LIMITS = Limits(body_bytes=200_000, pixels=100_000, prompt=100, stored_bytes=3_000)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.shake(tiny.model("bagel")).requires_grad_(False), "tiny")


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "mine" / "samples").mkdir(parents=True)
    (root / "mine" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"ste')
    tiny.picture(0).save(root / "mine" / "samples" / "step-00000001.png")
    secret = tmp_path_factory.mktemp("secret")
    (secret / "metrics.jsonl").write_text('{"step": 1}\n')
    (root / "link").symlink_to(secret)
    with serving(engine, limits=LIMITS, runs=root) as running:
        yield running


def file(image: PIL.Image.Image, kind="PNG", **how) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def show(server, url, **more):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **more}
    return server.http.post("/v1/chat/completions", json=body)


def uri(data: bytes, kind="png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def wrong(answer, *told, status=400):
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    for words in told:
        assert words in message, message


# ---- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(400, 300), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_before_they_are_decoded(server, size):
    start = time.perf_counter()
    wrong(show(server, uri(bomb(*size))), "too large")
    upload = server.http.post("/v1/files", files={"file": ("a.png", bomb(*size))})
    wrong(upload, "too large")
    wrong(server.http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": bomb(*size)}), "too large")
    assert time.perf_counter() - start < 20


def test_only_formats_of_the_list_are_opened(server):
    """Those of every door; a data URI's type is not believed, in whatever way it is written."""
    image = tiny.picture(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert show(server, uri(file(image, kind), kind.lower())).status_code == 200, kind
        upload = server.http.post("/v1/files", files={"file": ("a", file(image, kind))})
        assert upload.status_code == 200, kind
    for kind in ("PPM", "ICO", "TGA"):
        wrong(show(server, uri(file(image, kind))), "is not a readable PNG, JPEG, WEBP, GIF, BMP")
    wrong(show(server, "data:image/svg+xml;base64,PHN2Zy8+"), "is not a readable PNG")
    wrong(show(server, "data:text/html;base64,PHN2Zy8+"), "must be a data URI of an image")
    wrong(show(server, "data:image/png;base64"), "must be a data URI of an image")
    wrong(show(server, uri(b"")), "readable")
    wrong(show(server, uri(file(image)[:60])), "corrupt or truncated")
    wrong(show(server, "data:image/png;base64,%%%%"), "not valid base64")
    wrong(show(server, uri(pickle.dumps({"a": 1}))), "is not a readable")


def test_data_uris_are_taken_as_they_are_written(server):
    data = file(tiny.picture(1), "JPEG")
    plain = base64.b64encode(data).decode()
    lines = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    written = [
        f"data:image/jpeg;base64,{plain}",
        f"data:image/jpg;base64,{plain}",
        f"DATA:image/JPEG;BASE64,{plain}",
        f"data:image/pjpeg;base64,{plain}",
        f"data:image/jpeg;base64,{lines}",
        f"data:image/jpeg;base64,{plain.rstrip('=')}",
        f"data:image/jpeg;charset=utf-8;base64,{plain}",
        f"data:image/png;base64,{plain}",
    ]
    answers = [show(server, one, temperature=1.0, seed=1) for one in written]
    assert {a.status_code for a in answers} == {200}, [a.text for a in answers]
    assert len({a.json()["choices"][0]["message"]["content"] for a in answers}) == 1


def test_pictures_whose_pixels_end_early_are_refused(server):
    """Data that stops, checksums and the end of the file in order."""
    rows = np.random.default_rng(0).integers(0, 255, (200, 3 * 200 + 1), np.uint8)
    rows[:, 0] = 0

    def png(count: int) -> bytes:
        whole = bomb(200, 200)
        packed = zlib.compress(rows[:count].tobytes())
        at = whole.index(b"IDAT") - 4
        chunk = struct.pack(">I", len(packed)) + b"IDAT" + packed + struct.pack(">I", zlib.crc32(b"IDAT" + packed))
        return whole[:at] + chunk + whole[whole.index(b"IEND") - 4 :]

    assert show(server, uri(png(200))).status_code == 200
    for count in (0, 20, 199):
        for answer in (
            show(server, uri(png(count))),
            server.http.post("/v1/files", files={"file": ("a.png", png(count))}),
            server.http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", png(count))}),
        ):
            wrong(answer, "corrupt or truncated")
    error = show(server, uri(png(20))).json()["error"]
    assert error["param"] == "messages[0].content[0]"


def test_pictures_that_no_model_can_use_are_refused(server):
    for size in ((2000, 5), (5, 2000)):
        wrong(show(server, uri(file(PIL.Image.new("RGB", size)))), "too narrow")


def test_pictures_are_turned_upright_and_lose_their_metadata(server):
    image, exif = tiny.picture(0, 32, 16), PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"  # turn right; a description
    data = file(image, "JPEG", exif=exif, quality=95)
    assert b"where I live" in data
    kept = server.http.post("/v1/files", files={"file": ("a.jpg", data)}).json()
    got = server.http.get(f"/v1/files/{kept['id']}/content").content
    with PIL.Image.open(io.BytesIO(got)) as stored:
        assert stored.size == (16, 32) and not stored.getexif() and "where" not in str(stored.info)
        expected = image.rotate(-90, expand=True)
        assert np.abs(np.asarray(stored, int) - np.asarray(expected, int)).mean() < 20
    tagged = tiny.picture(0)
    tagged.info["icc_profile"] = b"where I live"
    assert b"where" not in encode(tagged) and b"where" not in encode(tagged, "jpeg", 90)


def test_stored_pictures_are_bounded_and_forgotten(monkeypatch):
    store, now = FileStore(Limits(stored_bytes=100, stored_seconds=10)), [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    first, second = store.put(b"x" * 60, "image/png"), store.put(b"y" * 60, "image/png")
    assert store.get(first) is None and store.get(second) and store.bytes == 60
    now[0] = 11.0
    assert store.get(second) is None
    assert len({store.put(b"", "image/png") for _ in range(50)}) == 50 and store.bytes == 0


# ---- addresses ----------------------------------------------------------------------------------------------------


def test_remote_pictures_are_not_fetched_unless_allowed(server, monkeypatch):
    server.http.get("/health")  # the client's own connection is open
    monkeypatch.setattr(fetch_.socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    for url in ("http://example.org/a.png", "https://127.0.0.1/a.png"):
        wrong(show(server, url), "pictures by URL are not fetched here")
    for url in ("file:///etc/passwd", "ftp://a/b.png", "/etc/passwd", "../../etc/passwd", "file-../../x"):
        wrong(show(server, url), "neither a data URI nor an upload")


PRIVATE = """
127.0.0.1 127.1.2.3 10.1.2.3 172.16.0.1 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0 0.1.2.3 224.0.0.1 240.0.0.1
255.255.255.255 192.0.0.8 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 192.88.99.1
::1 :: fe80::1%eth0 fe80::1 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 3fff::1 100::1 5f00::1 3ffe::1
::ffff:127.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 ::8.8.8.8 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
64:ff9b::7f00:1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::7f00:1 64:ff9b:1::8.8.8.8 64:ff9b:1:a::1
2002:7f00:1:: 2002:a9fe:a9fe::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:20::1
2606:4700::5efe:127.0.0.1 2606:4700::200:5efe:10.0.0.1
""".split()
PUBLIC = """
8.8.8.8 1.1.1.1 2606:4700:4700::1111 2a00:1450::1 2001:4860:4860::8888 64:ff9b::8.8.8.8 2002:808:808::1 ::ffff:8.8.8.8
""".split()


def test_which_addresses_are_public():
    assert [a for a in PRIVATE if fetch_.is_public(a)] == [] and [a for a in PUBLIC if not fetch_.is_public(a)] == []


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_never_asked(monkeypatch, address):
    monkeypatch.setattr(
        fetch_.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("1.1.1.1", 80)), (0, 0, 0, "", (address, 80))]
    )
    monkeypatch.setattr(fetch_.socket, "create_connection", lambda *_: pytest.fail("connected"))
    with pytest.raises(ValueError, match="which is not public"):
        fetch_.fetch("http://rebinding.example/a.png", frozenset({"*"}))


@pytest.fixture
def remote(monkeypatch):
    """Somebody else's server, which is taken for a public one."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Host"]))
            status = 302 if self.path == "/moved" else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://169.254.169.254/")
            self.end_headers()
            endless = 10_000 if self.path == "/endless" else 1
            for _ in range(endless):
                try:
                    self.wfile.write(file(tiny.picture(3)) if endless == 1 else b"x" * 65536)
                except OSError:
                    return

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setattr(fetch_, "public_address", lambda host, port: "127.0.0.1")
        yield f"http://pictures.example:{http.server_address[1]}", asked
        http.shutdown()
        thread.join()


def test_the_whole_of_a_fetch_is_timed(monkeypatch):
    """A server that sends a byte now and then, in its header and in its body."""
    monkeypatch.setattr(fetch_, "public_address", lambda host, port: "127.0.0.1")
    monkeypatch.setattr(fetch_, "FETCH_SECONDS", 0.5)
    for head in (b"", b"HTTP/1.1 200 OK\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            done = threading.Event()

            def drip(head=head, listening=listening, done=done):
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(head)
                    while not done.wait(0.1):
                        connection.sendall(b"x")

            thread = threading.Thread(target=drip)
            thread.start()
            start = time.monotonic()
            with contextlib.suppress(ValueError):  # cut off, or what came until then
                fetch_.fetch(f"http://slow.example:{listening.getsockname()[1]}/", frozenset({"*"}))
            assert time.monotonic() - start < 5
            done.set()
            thread.join()


def test_an_allowed_host_is_asked_once_at_the_address_that_was_checked(remote, monkeypatch):
    base, asked = remote
    hosts = frozenset({"pictures.example"})
    with PIL.Image.open(io.BytesIO(fetch_.fetch(f"{base}/a.png?x=1", hosts))) as image:
        assert image.size == (32, 32)
    assert asked == [("/a.png?x=1", base.removeprefix("http://"))]
    with pytest.raises(ValueError, match="answered 302; redirects are not followed"):
        fetch_.fetch(f"{base}/moved", hosts)
    with pytest.raises(ValueError, match="host 'other.example' is not allowed"):
        fetch_.fetch("http://other.example/a.png", hosts)
    urls = [
        "ftp://pictures.example/a",
        "http://me:secret@pictures.example/a",
        "http:///a",
        "http://[::1",
        "http://a:b/",
    ]
    for url in urls:
        with pytest.raises(ValueError, match="not a plain http or https URL"):
            fetch_.fetch(url, hosts)
    monkeypatch.setattr(fetch_, "FETCH_BYTES", 2**20)
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        fetch_.fetch(f"{base}/endless", hosts)


# ---- bodies -------------------------------------------------------------------------------------------------------


def post(server, body: bytes, kind="application/json", **headers):
    return server.http.post("/v1/chat/completions", content=body, headers={"content-type": kind, **headers})


def test_bodies_are_limited_before_they_are_read(server):
    wrong(post(server, b"[" + b" " * 300_000 + b"]"), "more than 200000 bytes", status=413)
    wrong(server.http.post("/v1/files", files={"file": b"x" * 300_000}), "more than 200000 bytes", status=413)

    def pieces():
        for _ in range(100):
            yield b" " * 10_000

    wrong(
        server.http.post("/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}),
        "more than",
        status=413,
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:  # announces much, sends nothing
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 999999999\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_json_is_bounded_in_depth_and_must_be_json(server):
    assert json_depth(b'{"a": [[{}]], "b": "[[[[\\"[[["}') == 4
    deep = b'{"messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"
    wrong(post(server, deep), "nested 5001 deep; at most 32")
    for body in (b"", b"{", b"\xff\xfe", b"[1, 2", b'{"a": 1e', b"nul"):
        assert post(server, body).status_code == 400, body
    number = b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}"
    assert post(server, number).status_code == 400
    wrong(post(server, b"[]"), "")
    infinite = b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}'
    wrong(post(server, infinite), "temperature")
    wrong(post(server, b"{}", "text/plain"), "use application/json", status=415)
    wrong(post(server, b"--x--", "multipart/form-data; boundary=y"), "")


def test_prompts_and_fields_are_bounded(server):
    wrong(post(server, json.dumps({"messages": [{"role": "user", "content": "x" * 101}]}).encode()), "at most 100")
    halves = [{"role": "user", "content": "x" * 60}] * 2
    wrong(post(server, json.dumps({"messages": halves}).encode()), "the conversation has 120 characters")
    many = {f"field{i}": "x" for i in range(60)}
    wrong(server.http.post("/v1/images/edits", data=many, files={"image": b"x"}), "")
    wrong(server.http.post("/v1/images/edits", data={"prompt": "x" * 70_000}, files={"image": b"x"}), "")


# ---- names --------------------------------------------------------------------------------------------------------


OUTSIDE = (
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/%2e%2e/cli.py",
    "/..%2f..%2fetc/passwd",
    "/v1/files/..%2f..%2fetc%2fpasswd/content",
    "/v1/models/..%2f..%2fetc",
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_leads_outside(server, path):
    answer = server.http.request("GET", server.url + path)
    assert answer.status_code == 404 and "import" not in answer.text


def test_runs_are_found_by_listing_only(server):
    assert [r["id"] for r in server.http.get("/v1/diptych/runs").json()["data"]] == ["mine"]  # the link leads outside
    rows = server.http.get("/v1/diptych/runs/metrics", params={"run": "mine"}).json()["data"]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2}]  # no NaN in JSON, no half line
    assert server.http.get("/v1/diptych/runs/metrics", params={"run": "mine", "after": 1}).json()["data"] == [
        {"step": 2}
    ]
    about = server.http.get("/v1/diptych/runs/about", params={"run": "mine"}).json()
    assert about["samples"] == ["step-00000001.png"]
    sheet = server.http.get("/v1/diptych/runs/sample", params={"run": "mine", "file": about["samples"][0]})
    assert sheet.headers["content-type"] == "image/png"
    for name in ("link", "../secret", "/etc", "mine/../mine", "", "mine\0"):
        wrong(server.http.get("/v1/diptych/runs/metrics", params={"run": name}), "no run")
    for name in ("../metrics.jsonl", "/etc/passwd", "step-00000002.png"):
        wrong(server.http.get("/v1/diptych/runs/sample", params={"run": "mine", "file": name}), "no sheet")


# ---- keys, origins, rates -----------------------------------------------------------------------------------------


def test_keys_open_and_strangers_are_told_so(engine, monkeypatch):
    from diptych.serving import guard

    compared = []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    with serving(engine, keys=("first", "second")) as server:
        for key, status in (
            ("first", 200),
            ("second", 200),
            ("third", 401),
            ("fïrst", 401),
        ):
            compared.clear()
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = server.http.get("/v1/models", headers=headers)
            assert answer.status_code == status, key
            assert len(compared) == 2  # every key, whatever is given
        assert server.http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert server.http.get("/v1/models", headers={"authorization": "Basic first"}).status_code == 401
        for path in ("/", "/health", "/ready", "/metrics", "/static/app.js"):
            assert server.http.get(path).status_code == 200
        for path in ("/v1/diptych/runs", "/v1/files", "/v1/images/generations"):
            assert server.http.post(path).status_code == 401
    assert Keys(["secret"])("Bearer secret").startswith("key ") and "secret" not in Keys(["secret"])("Bearer secret")
    assert Keys(["secret"])("Bearer ") is None and Keys(["secret"])("") is None


def test_other_sites_are_kept_out(server):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    here = server.http.post("/v1/chat/completions", json=body, headers={"origin": server.url})
    assert here.status_code == 200
    for origin in ("https://evil.example", "null", server.url.replace("127.0.0.1", "localhost")):
        there = server.http.post("/v1/chat/completions", json=body, headers={"origin": origin})
        wrong(there, "are not taken", status=403)
        assert not [h for h in there.headers if h.startswith("access-control")]
        asked = server.http.options(
            "/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}
        )
        assert asked.status_code == 403
    for path in ("/", "/v1/models"):
        headers = server.http.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_sites_that_are_allowed_may_ask(engine):
    site = "http://localhost:3000"
    with serving(engine, origins=frozenset({site}), keys=("secret",)) as server:
        ask = {"origin": site, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
        told = server.http.options("/v1/chat/completions", headers=ask)
        assert told.status_code == 204 and told.headers["access-control-allow-origin"] == site
        assert "x-api-key" in told.headers["access-control-allow-headers"]
        models = server.http.get("/v1/models", headers={"origin": site, "x-api-key": "secret"})
        assert models.status_code == 200 and models.headers["access-control-allow-origin"] == site
        wrong = server.http.get("/v1/models", headers={"origin": site, "x-api-key": "other"})
        assert wrong.status_code == 401 and wrong.headers["access-control-allow-origin"] == site
        for headers in ({"origin": "http://evil.example"}, ask | {"origin": "http://localhost:3001"}):
            told = server.http.request(
                "OPTIONS" if headers.get("access-control-request-method") else "GET", "/v1/models", headers=headers
            )
            assert told.status_code == 403 and "access-control-allow-origin" not in told.headers
    with pytest.raises(ValueError, match="an origin is like http://localhost:3000"):
        Options(origins=frozenset({"localhost:3000"}))


def test_rates_are_kept_for_each_key(engine):
    with serving(engine, keys=("a", "b"), rate=2.0) as server:

        def status(key):
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            return server.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})

        assert [status("a").status_code for _ in range(3)] == [200, 200, 429]
        refused = status("a")
        assert (
            1 <= int(refused.headers["retry-after"]) <= 30 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        )
        assert status("b").status_code == 200
    rates = Rates(60.0, most=3)
    assert [bool(rates(str(i))) for i in range(9)] == [False] * 9 and len(rates.buckets) == 3


def test_logs_hold_prompts_only_when_asked(engine, caplog):
    caplog.set_level("INFO", "diptych.serving")
    for asked in (False, True):
        caplog.clear()
        with serving(engine, quiet=False, log_prompts=asked) as server:
            body = {"messages": [{"role": "user", "content": "a private matter"}], "max_tokens": 1}
            server.http.post("/v1/chat/completions", json=body)
            server.http.post("/v1/chat/completions", json=body | {"temperature": "a private matter"})
            server.http.post("/v1/images/generations", json={"prompt": "a private matter", "steps": 1})
        assert ("private" in caplog.text) == asked and "POST /v1/chat/completions 200" in caplog.text


def test_models_are_loaded_without_pickle(tiny_model, monkeypatch):
    for home in (pickle, torch):
        monkeypatch.setattr(home, "load", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    assert store_.load(tiny_model).family == "bagel"
    assert MAX_PIXELS >= Limits().pixels
