"""The user's own data: every format reads, everything wrong is named by file and line, and docs/data.md is true."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from diptych.core.layout import Kind, Layout, Segment
from diptych.core.sample import Image, Sample, Text, assistant, sample_from_json, user
from diptych.core.tensors import NONE
from diptych.data.catalog import load_catalog, read_catalog, sources
from diptych.data.check import check
from diptych.data.parquet import parquet
from diptych.data.shards import stats
from diptych.data.sheet import show
from diptych.data.sources import images, jsonl, webdataset
from diptych.data.worlds import embedded
from tests.support.loading import make_loader

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(colour=RED, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def noise(kind: str) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def huge() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


def row(*content, answer="yes", **more) -> dict:
    parts = [{"type": "image", "image": c[1:]} if c.startswith("@") else {"type": "text", "text": c} for c in content]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]} | more


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows: list[dict], row_group_size: int = 2) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def parts(sample: Sample) -> list:
    """Texts, and the role and first pixel of pictures."""
    return [
        p.text if isinstance(p, Text) else (p.role, p.pixels.getpixel((0, 0))) for m in sample.messages for p in m.parts
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two good pictures in ``photos``."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "photos" / "red.png").write_bytes(encoded(RED))
    (tmp_path / "photos" / "deep" / "blue.jpg").write_bytes(encoded(BLUE, "WEBP"))
    return tmp_path


# ---- readers --------------------------------------------------------------------------------------------------------


def test_jsonl(folder):
    path = write_lines(folder / "a.jsonl", row("@red.png", "what is it?"), "", row("hallo ü", id="x", info={"n": 3}))
    source = jsonl("a", path, folder / "photos")
    assert len(source) == 2 and source.name == "a"
    assert [source[i].id for i in range(2)] == ["1", "x"]
    assert parts(source[0]) == [("understand", RED), "what is it?", "yes"]
    assert parts(source[1]) == ["hallo ü", "yes"] and source[1].info == {"n": 3}
    assert source.where(1) == f"{path}:3"
    assert source.row(0) == source.row(0) and next(source.row(0).images()).image == "red.png"
    assert parts(pickle.loads(pickle.dumps(source))[0]) == parts(source[0])
    with pytest.raises(IndexError, match="a has no row 2; it has 2"):
        source[2]


def test_jsonl_takes_folders_and_patterns(folder):
    for n in range(3):
        write_lines(folder / f"part-{n}.jsonl", row(f"row {n}"))
    for path in (folder, folder / "part-*.jsonl"):
        source = jsonl("a", path)
        assert [parts(source[i])[0] for i in range(3)] == ["row 0", "row 1", "row 2"]
        assert len({source[i].id for i in range(3)}) == 3


def test_image_folder(folder):
    (folder / "photos" / ".hidden.png").write_bytes(encoded())
    (folder / "photos" / "notes.txt").write_text("no picture")
    source = images("p", folder / "photos")
    assert [source[i].id for i in range(len(source))] == ["deep/blue.jpg", "red.png"]
    assert parts(source[1]) == [("target", RED)]


def test_parquet(tmp_path):
    messages = [row("@a/1.png", "what?")["messages"], row("hi")["messages"], row("ho")["messages"]]
    rows = [
        {"id": f"r{i}", "messages": json.dumps(m), "images": [{"path": "a/1.png", "bytes": encoded(BLUE)}]}
        for i, m in enumerate(messages)
    ]
    source = parquet("p", write_parquet(tmp_path / "p.parquet", rows))
    assert [source[i].id for i in (2, 0, 1)] == ["r2", "r0", "r1"]
    assert parts(source[0]) == [("understand", BLUE), "what?", "yes"]
    assert source.where(2) == f"{tmp_path / 'p.parquet'}:row 3"


@pytest.mark.parametrize("wrapped", [False, True])
def test_parquet_pairs(tmp_path, wrapped):
    held = {"bytes": encoded(BLUE), "path": "x.png"} if wrapped else encoded(BLUE)
    for name in ("p", "q"):
        write_parquet(tmp_path / f"{name}.parquet", [{"image": held, "caption": f"{name}{i}"} for i in range(3)])
    source = parquet("p", tmp_path, "draw")
    assert [parts(source[i])[0] for i in range(6)] == ["p0", "p1", "p2", "q0", "q1", "q2"]
    assert source[4].id == "q/2" and source.where(5).endswith("q.parquet:row 3")
    assert parts(source[4]) == ["q1", ("target", BLUE)]
    assert parts(parquet("p", tmp_path, "caption")[4]) == [("understand", BLUE), "q1"]
    assert parts(parquet("p", tmp_path, "pictures")[4]) == [("target", BLUE)]


def test_webdataset(tmp_path):
    rows = {"json": json.dumps(row("@jpg", "@source.png", "what?")).encode()}
    members = {f"d/0001.{k}": v for k, v in (rows | {"jpg": encoded(RED), "source.png": encoded(BLUE)}).items()}
    source = webdataset("w", write_tar(tmp_path / "w.tar", members | {"0002.json": json.dumps(row("hi")).encode()}))
    assert [source[i].id for i in range(len(source))] == ["d/0001", "0002"]
    assert parts(source[0]) == [("understand", RED), ("understand", BLUE), "what?", "yes"]
    assert source.where(0) == f"{tmp_path / 'w.tar'}:d/0001"


def test_webdataset_pairs(tmp_path):
    for shard in "ab":
        members = {"7.txt": f"{shard} cat\n".encode(), "7.PNG": encoded(BLUE), "7.json": b"{}"}
        write_tar(tmp_path / f"{shard}.tar", members)
    source = webdataset("w", tmp_path / "*.tar", "draw")
    assert parts(source[1]) == ["b cat", ("target", BLUE)] and source[1].id == "b/7"
    assert parts(webdataset("w", tmp_path, "caption")[0]) == [("understand", BLUE), "a cat"]
    assert parts(webdataset("w", tmp_path, "pictures")[0]) == [("target", BLUE)]


# ---- what is wrong is named -----------------------------------------------------------------------------------------

WRONG_ROWS = [
    ('{"messages": [', "not JSON: Expecting value at column 15"),
    (f'{{"messages": {"1" * 5000}}}', "not JSON: Exceeds the limit"),
    ("[" * 100_000, "nested too deeply"),
    ("7", "row must be an object, not 7"),
    ({"messages": []}, "'messages' must be a list with at least one message"),
    (row("hi", extra=1), "row has unknown keys ['extra']; known: ['id', 'info', 'messages']"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role is 'usr'; choose from system, user, assistant"),
    (row("@none.png"), "picture 'none.png' does not exist"),
    (row("@../secret.png"), "picture '../secret.png' lies outside the image folder"),
    (row("@deep/../../secret.png"), "lies outside the image folder"),
    (row("@/etc/passwd"), "picture '/etc/passwd' lies outside the image folder"),
    (row("@link.png"), "picture 'link.png' lies outside the image folder"),
    (row("@https://example.org/a.png"), "lies outside the image folder"),
    (row("@a\0b"), "is no path"),
    (row("@corrupt.png"), "picture 'corrupt.png' is corrupt or truncated"),
    (row("@cut.jpg"), "picture 'cut.jpg' is corrupt or truncated: image file is truncated"),
    (row("@huge.png"), "picture 'huge.png' is too large"),
    (row("@text.png"), "picture 'text.png' is not a readable PNG, JPEG, WEBP, GIF, BMP"),
    (row("@deep"), "picture 'deep' cannot be read: Is a directory"),
]


@pytest.fixture
def broken(folder) -> Path:
    """A catalog of one good row, then every wrong row."""
    photos, png, jpg = folder / "photos", bytearray(noise("PNG")), noise("JPEG")
    png[len(png) // 2] ^= 0xFF
    (photos / "corrupt.png").write_bytes(png)
    (photos / "cut.jpg").write_bytes(jpg[: len(jpg) // 2])
    (photos / "huge.png").write_bytes(huge())
    (photos / "text.png").write_text("hello")
    (folder / "secret.png").write_bytes(encoded())
    (photos / "link.png").symlink_to(folder / "secret.png")
    write_lines(folder / "cats.jsonl", row("@red.png"), *(r for r, _ in WRONG_ROWS))
    (folder / "catalog.yaml").write_text("cats: {format: jsonl, path: cats.jsonl, images: photos}\n")
    return folder / "catalog.yaml"


def test_check_names_file_line_and_reason(broken):
    report = check(broken)
    path = broken.parent / "cats.jsonl"
    assert [p.data_set for p in report.problems] == ["cats"] * len(WRONG_ROWS)
    for line, ((_, reason), problem) in enumerate(zip(WRONG_ROWS, report.problems, strict=True), start=2):
        assert problem.reason.startswith(f"{path}:{line}: ") and reason in problem.reason
    tally = report.tallies["cats"]
    assert (tally.rows, tally.of, tally.bad, tally.pictures) == (len(WRONG_ROWS) + 1,) * 2 + (len(WRONG_ROWS), 1)
    assert tally.smallest == tally.largest == (8, 6)
    assert not report.ok and f"problems: {len(WRONG_ROWS)}" in str(report)
    told = json.loads(json.dumps(report.to_json()))
    assert not told["ok"] and told["problems"][0]["data_set"] == "cats"
    assert told["data_sets"]["cats"]["bad"] == len(WRONG_ROWS)


def test_check_stops_at_its_limit(broken):
    assert check(broken, limit=1).ok and "every row can be used" in str(check(broken, limit=1))
    assert len(check(broken, limit=4).problems) == 3


def test_check_finds_ids_that_come_twice_and_sets_that_do_not_open(folder):
    path = write_lines(folder / "a.jsonl", row("a", id="x"), row("b"), row("c", id="x"), row("d", id=2))
    (folder / "c.yaml").write_text("a: {format: jsonl, path: a.jsonl}\nb:\n  format: images\n  path: nowhere\n")
    assert [p.reason for p in check(folder / "c.yaml").problems] == [
        f"{path}:3: id 'x' comes twice; first in {path}:1",
        f"{path}:4: id '2' comes twice; first in {path}:2",
        f"{folder / 'c.yaml'}:2: data set 'b': image folder '{folder / 'nowhere'}' does not exist",
    ]


def test_the_loader_skips_and_names_what_check_names(broken):
    found = sources(["cats"], broken)
    reasons = {p.reason for p in check(broken).problems}
    loader = make_loader(found, {"cats": 1}, lay_out, tokens=256, pictures=8, streams=1)
    list(islice(loader, 1 + len(WRONG_ROWS)))
    assert set(loader.skipped.values()) == reasons
    strict = make_loader(found, {"cats": 1}, lay_out, tokens=256, pictures=8, streams=1, skip_limit=3)
    with pytest.raises(ValueError, match=r"4 bad samples.*, and the limit is 3:\n  cats/\d+: .*cats.jsonl:\d+: "):
        list(islice(strict, 50))


def test_bytes_that_are_no_text(folder):
    (folder / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1: not UTF-8 at byte 14"):
        jsonl("a", folder / "a.jsonl")[0]


def test_wrong_tars(tmp_path):
    given = {"a.json": json.dumps(row("@png")).encode(), "a.png": noise("PNG")[:-500]}
    path = write_tar(tmp_path / "w.tar", given | {"b.txt": b"b", "c.txt": b"c" * 900})
    source = webdataset("w", path)
    for index, reason in enumerate(["w.tar:a: picture 'a.png' is corrupt", "w.tar:b: has no .json member; it has txt"]):
        with pytest.raises(ValueError, match=reason):
            source[index]
    with pytest.raises(ValueError, match="w.tar:b: needs one picture to be read as 'draw'; it has none"):
        webdataset("w", path, "draw")[1]
    with pytest.raises(ValueError, match="w.tar:a: has no .txt member; it has json, png"):
        webdataset("w", path, "caption")[0]
    wrong = write_tar(tmp_path / "ref.tar", {"a.json": json.dumps(row("@jpg")).encode(), "a.png": encoded()})
    with pytest.raises(ValueError, match="ref.tar:a: picture 'jpg' is not a member; a has json, png"):
        webdataset("w", wrong)[0]
    data = path.read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(data[: data.rindex(b"c" * 900) + 10])
    with pytest.raises(ValueError, match="cut.tar is not a readable uncompressed tar; damaged after 'c.txt'"):
        webdataset("w", cut)[3]
    at = data.index(b"c.txt")
    cut.write_bytes(data[:at] + b"x" * 512 + data[at + 512 :])
    with pytest.raises(ValueError, match="cut.tar is damaged after 'b.txt'"):
        webdataset("w", cut)[2]
    with tarfile.open(cut, "w:gz"):
        pass
    with pytest.raises(ValueError, match="not a readable uncompressed tar"):
        webdataset("w", cut)
    with pytest.raises(ValueError, match="holds no samples"):
        webdataset("w", write_tar(cut, {}))


def test_wrong_parquets(tmp_path):
    pairs = [{"image": b"no picture", "caption": "a"}, {"image": None, "caption": None}]
    path = write_parquet(tmp_path / "p.parquet", pairs)
    with pytest.raises(ValueError, match=r"lacks columns \['messages'\] to be read as 'rows'; it has image, caption"):
        parquet("p", path)
    with pytest.raises(ValueError, match="p.parquet:row 1: picture 'image' is not a readable"):
        parquet("p", path, "draw")[0]
    with pytest.raises(ValueError, match="p.parquet:row 2: column 'caption' must be a string, not None"):
        parquet("p", path, "draw")[1]
    with pytest.raises(ValueError, match="p.parquet:row 2: picture 'image' holds no bytes"):
        parquet("p", path, "pictures")[1]
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="p.parquet is not a readable parquet file"):
        parquet("p", path, "draw")
    rows = [{"messages": json.dumps(row("@a.png")["messages"]), "images": [{"path": "b.png", "bytes": b""}]}]
    source = parquet("q", write_parquet(tmp_path / "q.parquet", rows + [{"messages": None}]))
    with pytest.raises(ValueError, match="q.parquet:row 1: picture 'a.png' is not in the row's 'images'; it has b.png"):
        source[0]
    with pytest.raises(ValueError, match="q.parquet:row 2: 'messages' is empty"):
        source[1]


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "blank.jsonl", "", "  ")
    for make, path, reason in (
        (jsonl, "no.jsonl", "no.jsonl' does not exist"),
        (jsonl, "empty", "holds no .jsonl file"),
        (jsonl, "no-*.jsonl", "holds no .jsonl file"),
        (jsonl, "blank.jsonl", "holds no rows"),
        (images, "empty", "holds no .png"),
        (webdataset, "empty", "holds no .tar file"),
        (parquet, "empty", "holds no .parquet file"),
    ):
        with pytest.raises(ValueError, match=reason):
            make("x", tmp_path / path)
    with pytest.raises(ValueError, match="image folder .*nowhere' does not exist"):
        jsonl("x", write_lines(tmp_path / "a.jsonl", row("a")), tmp_path / "nowhere")


# ---- catalog --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a catalog is a mapping of data set names to settings"),
        ("- a\n", ": a catalog is a mapping"),
        ("a: {format: jsonl\nb: 1", ":2: not YAML: "),
        ("\na: 7\n", ":2: data set 'a' must be a mapping with 'format' and 'path'"),
        ("a: {path: x}\n", ":1: data set 'a': format is None; choose from jsonl, images, parquet, webdataset"),
        ("a: {format: json, path: x}\n", ":1: data set 'a': format is 'json'; choose from jsonl,"),
        ("a: {format: [jsonl], path: x}\n", "format is ['jsonl']; choose"),
        ("\n\na: {format: jsonl, pth: x}\n", ":3: data set 'a': unknown keys ['pth']; jsonl takes format, path,"),
        ("a: {format: images, path: x, read: draw}\n", "read is 'draw': choose from sgt/reconstruct, sgt/denoise"),
        ("a: {format: jsonl}\n", ":1: data set 'a': 'path' is missing"),
        ("a: {format: jsonl, path: 7}\n", "path is 7: Input should be a valid string"),
        ("a: {format: jsonl, path: x, max_pixels: 0}\n", "max_pixels is 0: Input should be greater than 0"),
        ("a: {format: parquet, path: x, read: rws}\n", "read is 'rws': Input should be 'rows', 'draw', 'caption' or"),
        ("a: {format: jsonl, path: x}\n\na: {format: images, path: y}\n", ":3: data set 'a' comes twice; first in"),
        ("a: {format: jsonl, path: x, path: y}\n", "keys ['path'] come twice"),
        ("a/b: {format: jsonl, path: x}\n", ":1: 'a/b' is no name for a data set"),
        ("a: {format: jsonl, path: !!python/name:os.system x}\n", "could not determine a constructor"),
    ],
)
def test_wrong_catalogs(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_catalog(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_missing_catalog(tmp_path):
    with pytest.raises(ValueError, match="catalog .*c.yaml' does not exist"):
        load_catalog(tmp_path / "c.yaml")


def test_names_come_from_the_catalog_then_from_the_package(folder):
    (folder / "c.yaml").write_text("mine: {format: images, path: photos}\nrest: {format: jsonl, path: not-there}\n")
    found = sources(["mine", "shapes/draw"], folder / "c.yaml", size=32, split="test")
    assert list(found) == ["mine", "shapes/draw"] and parts(found["mine"][1]) == [("target", RED)]
    assert next(found["shapes/draw"][0].images()).pixels.size == (32, 32)
    assert list(sources(embedded.names()[:2])) == list(embedded.names()[:2])
    with pytest.raises(ValueError, match="unknown data set 'yours'; .*c.yaml: mine, rest; embedded: shapes/draw,"):
        sources(["yours"], folder / "c.yaml")
    with pytest.raises(ValueError, match="unknown data set 'yours'; no catalog was given; embedded: shapes/draw,"):
        sources(["yours"])


# ---- show -----------------------------------------------------------------------------------------------------------


def lay_out(sample: Sample, drop: frozenset[str] = frozenset()) -> Layout:
    """One token a character, four a picture."""
    segments = []
    for part in (p for m in sample.messages for p in m.parts):
        if isinstance(part, Image):
            kind, pixels = Kind.NOISED if part.role == "target" else Kind.VISION, torch.zeros(3, 4, 4)
            segments.append(Segment(kind, (NONE,) * 4, image=pixels, grid=(2, 2), full=True))
        else:
            ids = tuple(map(ord, part.text))
            segments.append(Segment(Kind.TEXT, ids, targets=(*ids[1:], NONE) if part.loss else ()))
    return Layout(sample.id, tuple(segments))


def test_show_draws_every_sample(folder):
    long = "word " * 300 + "x" * 500
    write_lines(folder / "a.jsonl", row("@red.png", long, *["@deep/blue.jpg"] * 12), row("a\nb", answer="ä" * 90))
    found = {"a": jsonl("a", folder / "a.jsonl", folder / "photos"), "photos": images("photos", folder / "photos")}
    sheet = show(found, lay_out, lambda ids: "".join(map(chr, ids)), 3, folder / "sheet.png")
    with PIL.Image.open(folder / "sheet.png") as saved:
        assert saved.size == sheet.size and saved.width == 1280
    colours = {c for _, c in sheet.getcolors(1 << 24)}
    assert RED in colours and (0xE0, 0x85, 0x3D) in colours and (0x3F, 0xA3, 0x7C) in colours
    more = show(found, lay_out, None, 50, folder / "sheet.png")
    assert more.height > sheet.height
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        show(found, lay_out, None, 0, folder / "sheet.png")
    with pytest.raises(ValueError, match="nothing to show"):
        show({}, lay_out, None, 1, folder / "sheet.png")


# ---- the documentation ----------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)


def test_documented_rows_are_rows():
    rows = [json.loads(line) for block in blocks("json") for line in block.strip().split("\n\n")]
    assert len(rows) >= 5
    for given in rows:
        assert sample_from_json(given).messages
    roles = {image.role for given in rows for image in sample_from_json(given).images()}
    assert roles == {"understand", "condition", "target"}


def test_documented_catalog_and_code_run(tmp_path, monkeypatch):
    """The catalog of the page, over files laid out as the page says, read by the code of the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "catalog.yaml").write_text(blocks("yaml")[0])
    named = set(yaml.safe_load(blocks("yaml")[0]))
    for place in ("photos/cats", "photos/rooms", "textures", "shards"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("cats/7.png", "cats/8.png", "rooms/1.png", "rooms/1-red.png"):
        (tmp_path / "photos" / name).write_bytes(encoded())
    (tmp_path / "textures" / "t.png").write_bytes(encoded())
    rows = [json.loads(line) for block in blocks("json") for line in block.strip().split("\n\n")]
    write_lines(tmp_path / "cats.jsonl", *rows)
    write_parquet(tmp_path / "pairs.parquet", [{"image": encoded(), "caption": "a cat"}])
    write_tar(tmp_path / "shards" / "0.tar", {"1.txt": b"a cat", "1.jpg": encoded(kind="JPEG")})
    assert {e.name for e in read_catalog("catalog.yaml").values()} == named
    space: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(DOCS), "exec"), space)  # the page's own words
    assert set(space["data"]) == named and (tmp_path / "sheet.png").is_file()


def test_the_first_samples_of_a_data_set():
    whole, first = sources(["shapes/ask"])["shapes/ask"], sources(["shapes/ask#3"])["shapes/ask#3"]
    assert (len(first), first.name, first[2].id) == (3, "shapes/ask#3", whole[2].id)
    with pytest.raises(IndexError):
        first[3]
    for name, why in (("shapes/ask#x", "number of samples"), ("shapes/ask#0", "the data set has"), ("#3", "unknown")):
        with pytest.raises(ValueError, match=why):
            sources([name])


# ---- parquet as the ecosystem writes it -----------------------------------------------------------------------------


def as_parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return parquet("p", path)


PAIR = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "one"}]


def test_parquet_of_nested_messages(tmp_path):
    """Lists of structs, with contents as text or as parts; keys that a struct has and a row has not."""
    data = as_parquet(tmp_path / "a.parquet", messages=[PAIR, PAIR], id=[7, 8])
    assert data[1] == Sample("8", (user("how many?"), assistant("one")))
    shown = [{"type": "image", "text": None, "index": 1}, {"type": "text", "text": "which?", "index": None}]
    parts = [{"role": "user", "content": shown}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    held = [{"bytes": encoded("red"), "path": None}, {"bytes": encoded("blue"), "path": None}]
    both = [*shown, {"type": "image", "text": None, "index": 0}]
    data = as_parquet(tmp_path / "b.parquet", messages=[[{"role": "user", "content": both}, parts[1]]], images=[held])
    blue, red = (image.pixels.getpixel((0, 0)) for image in data[0].images())
    assert (blue, red) == ((0, 0, 255), (255, 0, 0))


@pytest.mark.parametrize("path", [None, "p/a.png"])
@pytest.mark.parametrize("bare", [False, True])
def test_parquet_pictures_without_paths_are_read_by_position(tmp_path, path, bare):
    messages = json.dumps([{"role": "user", "content": [{"type": "image", "image": "p/a.png"}]}, PAIR[1]])
    held = [encoded("red")] if bare else [{"bytes": encoded("red"), "path": path}]
    data = as_parquet(tmp_path / "a.parquet", messages=[messages], images=[held])
    assert next(data[0].images()).pixels.getpixel((0, 0)) == (255, 0, 0)
    two = as_parquet(tmp_path / "b.parquet", messages=[messages], images=[[encoded("red"), encoded("blue")]])
    with pytest.raises(ValueError, match="b.parquet:row 1: 'images' holds 2 pictures without paths; the row shows 1"):
        two[0]


def test_parquet_types_are_read_or_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    text = [json.dumps(PAIR)]
    for kind in (pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        assert as_parquet(tmp_path / "a.parquet", messages=pa.array(text, kind))[0].id == "1"
    for column, values, kind in (
        ("messages", [1], "int64"),
        ("messages", [[1]], "list<element: int64>"),
        ("images", ["a.png"], "string"),
        ("id", [1.5], "double"),
        ("id", [[1]], "list<element: int64>"),
    ):
        columns = {"messages": text} | {column: values}
        with pytest.raises(ValueError, match=re.escape(f"a.parquet: column {column!r} has the type {kind}; it must")):
            as_parquet(tmp_path / "a.parquet", **columns)
    for wrong in ([None], [[{"role": "user", "content": None}]], ["[1]"], ["{"]):
        with pytest.raises(ValueError, match="a.parquet:row 1: "):
            as_parquet(tmp_path / "a.parquet", messages=wrong)[0]


# ---- what would be lost without a word ------------------------------------------------------------------------------


def test_rows_without_a_target_are_named(tmp_path):
    rows = [{"messages": PAIR[:1]}, {"messages": PAIR}, {"messages": [PAIR[0], {"role": "assistant", "content": ""}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text("a: {format: jsonl, path: a.jsonl}\n")
    report = check(tmp_path / "c.yaml")
    assert not report.ok and report.tallies["a"].no_target == 2
    named = [p.reason.partition(": the row has no target")[0].rpartition(":")[2] for p in report.problems]
    assert named == ["1", "3"]


def test_files_that_a_folder_leaves_out_are_counted_by_suffix(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.JPG", "b.jpe", "c.jfif"):
        PIL.Image.new("RGB", (8, 8)).save(folder / name, "JPEG")
    PIL.Image.new("RGB", (8, 8)).save(folder / "d.tif")
    for name in ("e.svg", "f.svg", "notes.txt", "README", ".hidden.svg"):
        (folder / name).write_text("x")
    (tmp_path / "c.yaml").write_text("a: {format: images, path: folder}\n")
    report = check(tmp_path / "c.yaml")
    assert report.ok and report.tallies["a"].rows == 4
    assert report.tallies["a"].left_out == {".svg": 2, ".txt": 1, "(no suffix)": 1}
    assert "a: leaves out 2 .svg, 1 (no suffix), 1 .txt" in str(report)
    with pytest.warns(UserWarning, match="data set 'a' leaves out 2 .svg: these formats are not read"):
        found = sources(["a"], tmp_path / "c.yaml")
    lay_out = lambda sample: Layout(sample.id, ())  # noqa: E731
    assert stats(found, lay_out)["a"].to_json()["left_out"] == report.tallies["a"].left_out
    for name in ("a.JPG", "b.jpe", "c.jfif", "d.tif"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="it holds 2 .svg, 1 .no suffix., 1 .txt"):
        images("a", folder)


def test_a_caption_is_kept_but_for_the_end_of_its_line(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(), "1.txt": b"  two  spaces \n\n"})
    assert webdataset("a", tmp_path / "a.tar", "caption").row(0).messages[1].parts[0].text == "  two  spaces \n"
