"""Data sets behind addresses: a local S3 server and a local HTTP server give the rows of the local files; requests are
repeated; the cache has a limit; wrong addresses are named."""

import gzip
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diptych import cli
from diptych.data.catalog import read_catalog, sources
from diptych.data.reading import COUNTS, whole_files
from diptych.data.shards import shard
from diptych.generation.offline import read_prompts
from diptych.machine import addresses, disk
from diptych.machine.addresses import address, local_copy

KINDS = {
    "tars": "{format: webdataset, path: 'ROOT/tars/{000000..000002}.tar'}",
    "pairs": "{format: parquet, path: ROOT/pairs.parquet, read: caption}",
    "lines": "{format: jsonl, path: ROOT/lines.jsonl, images: ROOT/photos}",
    "packed": "{format: jsonl, path: ROOT/lines.jsonl.gz, images: ROOT/photos}",
    "tight": "{format: jsonl, path: ROOT/lines.jsonl.zst, images: ROOT/photos}",
    "photos": "{format: images, path: ROOT/photos}",
}


def catalog(file, root, kinds):
    file.write_text("".join(f"{kind}: {KINDS[kind].replace('ROOT', root)}\n" for kind in kinds))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One data set of every kind, as local files."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path_factory.mktemp("remote")
    shard(sources(["shapes/draw#12"], size=16)["shapes/draw#12"], folder / "tars", rows=4, seed=None)
    source = sources(["shapes/draw#6"], size=16)["shapes/draw#6"]
    (folder / "photos").mkdir()
    rows, lines = [], []
    for i in range(6):
        picture = next(source[i].images()).pixels
        picture.save(folder / "photos" / f"{i}.png")
        rows.append({"image": (folder / "photos" / f"{i}.png").read_bytes(), "caption": f"number {i}"})
        content = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "what?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"number {i}"}]
        lines.append(json.dumps({"messages": messages}))
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=2)
    data = ("\n".join(lines) + "\n").encode()
    (folder / "lines.jsonl").write_bytes(data)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "lines.jsonl.zst").write_bytes(zstandard.compress(data))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "_COPIES", {})
    monkeypatch.setattr(addresses, "PAUSE", 0.001)
    return tmp_path / "cache" / "files"


@pytest.fixture(scope="module")
def s3(folder):
    """The files in a bucket of moto's server."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(f"AWS_{name}", value)
    system, _ = addresses.file_system(address("s3://bucket/x"))
    system.mkdir("bucket")
    for file in folder.rglob("*"):
        if file.is_file():
            system.put_file(str(file), f"bucket/data/{file.relative_to(folder)}")
    yield "s3://bucket/data"
    server.stop()
    patch.undo()


class Flaky(SimpleHTTPRequestHandler):
    """Serves a folder, ranges too; every third request fails."""

    requests = 0

    def log_message(self, *args):
        pass

    def do_GET(self):
        Flaky.requests += 1
        if Flaky.requests % 3 == 0:
            self.send_error(503)
            return
        path = self.translate_path(self.path)
        if "Range" not in self.headers or not path.endswith((".tar", ".parquet", ".png", ".jsonl")):
            super().do_GET()
            return
        with open(path, "rb") as file:
            data = file.read()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(scope="module")
def http(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def contents(samples):
    return [[getattr(p, "text", None) or p.pixels.tobytes() for m in s.messages for p in m.parts] for s in samples]


def every(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("place", ["s3", "http"])
def test_remote_rows_are_the_local_ones(place, folder, tmp_path, cache, request):
    """With and without an index, by parts and through whole copies; the server of http fails now and then."""
    root = request.getfixturevalue(place)
    kinds = [kind for kind in KINDS if not (place == "http" and kind == "photos")]  # http has no folders
    local, remote = (catalog(tmp_path / f"{n}.yaml", r, kinds) for n, r in (("local", str(folder)), ("remote", root)))
    for kind in kinds:
        expected = every(sources([kind], local)[kind])
        source = sources([kind], remote)[kind]
        assert [s.id for s in every(source)] == [s.id for s in expected]
        read_catalog(remote)[kind].write_index()
        indexed = read_catalog(remote)[kind].open()
        addresses._COPIES.clear()
        assert contents(every(indexed)) == contents(expected)
        with whole_files():
            before = COUNTS.copy()
            assert contents(every(read_catalog(remote)[kind].open())) == contents(expected)
            assert kind != "tars" or COUNTS.since(before).opens <= 4


def test_catalog_prompts_and_writing(s3, folder, tmp_path, cache):
    """A catalog in a bucket, prompts from it, shards into it: what is written is read back."""
    text = "tars: {format: webdataset, path: tars/*.tar}\n"
    disk.write_text(address(f"{s3}/c.yaml"), text)
    source = sources(["tars"], f"{s3}/c.yaml")["tars"]
    assert contents(every(source)) == contents(
        every(sources(["tars"], catalog(tmp_path / "c.yaml", str(folder), ["tars"]))["tars"])
    )
    disk.write_text(address(f"{s3}/p.txt"), "a cat\na dog\n")
    assert [p.prompt for p in read_prompts(address(f"{s3}/p.txt"))] == ["a cat", "a dog"]
    words = [
        "data",
        "shard",
        "tars",
        "--catalog",
        f"{s3}/c.yaml",
        "--out",
        f"{s3}/again",
        "--rows",
        "5",
        "--seed",
        "-1",
    ]
    for k in range(2):
        assert cli.main([*words, "--shard", f"{k}/2"]) == 0
    disk.write_text(address(f"{s3}/d.yaml"), "tars: {format: webdataset, path: again/tars/*.tar}\n")
    assert contents(every(sources(["tars"], f"{s3}/d.yaml")["tars"])) == contents(every(source))


def test_the_cache_keeps_its_limit(folder, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CACHE_GB", "0.000003")
    files = []
    for k in range(4):
        files.append(tmp_path / f"{k}.jsonl.gz")
        files[-1].write_bytes(gzip.compress(bytes([65 + k]) * 1000))
        assert local_copy(files[-1]).read_bytes() == bytes([65 + k]) * 1000
    assert len([f for f in cache.iterdir() if not f.suffix]) == 3
    assert local_copy(files[0]).read_bytes() == b"A" * 1000
    monkeypatch.setenv("DIPTYCH_CACHE_GB", "much")
    files[1].write_bytes(gzip.compress(b"other"))
    addresses._COPIES.clear()
    with pytest.raises(ValueError, match="DIPTYCH_CACHE_GB is 'much'; it must be a number of gigabytes"):
        local_copy(files[1])
    shutil.rmtree(cache)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ftp://host/x", "unknown scheme ftp://; choose from s3://, gs://"),
        ("s3:/bucket/x", "names no host or bucket; an address looks like s3://NAME/PATH"),
    ],
)
def test_wrong_addresses(text, message):
    with pytest.raises(ValueError, match=message):
        address(text)


def test_errors_of_servers_name_the_file(http, s3, cache, monkeypatch, tmp_path):
    """A missing file ends at once; a server that does not recover ends the run, and no row is blamed."""
    with pytest.raises(ValueError, match="data set 'a': .*nothing.jsonl"):
        sources(["a"], _written(tmp_path / "a.yaml", f"a: {{format: jsonl, path: '{http}/nothing.jsonl'}}\n"))
    with pytest.raises(ValueError, match="holds no .tar file"):
        sources(["a"], _written(tmp_path / "b.yaml", f"a: {{format: webdataset, path: '{s3}/no-*.tar'}}\n"))
    calls = []

    def fails():
        calls.append(1)
        raise OSError("reset by peer")

    with pytest.raises(ConnectionError, match="x.tar cannot be read after 5 tries: OSError: reset by peer"):
        addresses.retried(fails, "x.tar")
    assert len(calls) == addresses.TRIES


def _written(file, text):
    file.write_text(text)
    return file
