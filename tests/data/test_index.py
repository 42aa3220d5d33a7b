"""Indices of data sets, and the order of rows by shards: every row once, exactly resumable, few files open."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import tests.support.tiny as tiny
from diptych.data.catalog import read_catalog, sources
from diptych.data.index import Scanned, load, write
from diptych.data.loader import Loader, LoaderConfig, merge_states
from diptych.data.mixture import Mixture, shard_ends
from diptych.data.reading import COUNTS
from diptych.data.shards import shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 rows in 10 tar shards, the same rows as jsonl, and a catalog of both."""
    folder = tmp_path_factory.mktemp("index")
    rows = sources(["shapes/draw#60"], size=16)["shapes/draw#60"]
    shard(rows, folder / "tars", rows=6, seed=None)
    lines = [json.dumps({"messages": [{"role": "assistant", "content": f"{i}"}]}) for i in range(50)]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "c.yaml").write_text(
        "tars: {format: webdataset, path: tars/*.tar}\nlines: {format: jsonl, path: lines.jsonl}\n"
    )
    return folder


def mixture(source, stream=0, streams=4, buffer=8, **more):
    return Mixture({"a": source}, {"a": 1.0}, 3, stream, streams, order="shards", buffer=buffer, **more)


def test_an_index_gives_the_rows_of_a_scan(folder, tmp_path):
    """With an index, and after pickling, every row is the one that a scan finds; processes change nothing."""
    scanned = sources(["tars", "lines"], folder / "c.yaml")
    expected = {name: [scanned[name][i] for i in range(len(scanned[name]))] for name in scanned}
    for name, entry in read_catalog(folder / "c.yaml").items():
        assert entry.write_index(processes=2) == len(scanned[name])
        again = entry.index_file.read_bytes()
        entry.write_index()
        assert entry.index_file.read_bytes() == again
        source = pickle.loads(pickle.dumps(entry.open()))
        assert source.index.where and [source[i].id for i in range(len(source))] == [s.id for s in expected[name]]
        assert source[7].messages[0] == expected[name][7].messages[0]
        assert np.array_equal(source.shard_ends, scanned[name].shard_ends)
        entry.index_file.unlink()


def test_an_index_of_other_data_is_refused(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n' * 3)
    catalog = tmp_path / "c.yaml"
    catalog.write_text("a: {format: jsonl, path: '*.jsonl'}\nb: {format: jsonl, path: a.jsonl, index: b.index}\n")
    entry = read_catalog(catalog)["a"]
    entry.write_index()
    whole = entry.index_file.read_bytes()
    with pytest.raises(ValueError, match=r"c.yaml:2: data set 'b': index .*b.index' does not exist"):
        read_catalog(catalog)["b"].open()
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "b"}]}\n' * 3)
    source = entry.open()
    with pytest.raises(ValueError, match="a.index describes another .*a.jsonl than the one there; write it again"):
        source[0]
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match="c.yaml:1: .*a.index describes other files .first difference: b.jsonl"):
        entry.open()
    (tmp_path / "b.jsonl").unlink()
    entry.index_file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="a.index is damaged or cut off"):
        entry.open()
    entry.index_file.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    assert len(entry.open()) == 3
    with pytest.raises(ValueError, match="a.index is damaged in shard 0, of .*a.jsonl"):
        entry.open()[0]
    entry.index_file.write_bytes(whole.replace(b'"jsonl"', b'"other"'))
    with pytest.raises(ValueError, match="a.index was written for .*other"):
        entry.open()


@pytest.mark.parametrize("streams", [1, 4, 7])
def test_shard_order_visits_every_row_once_per_epoch(folder, streams):
    source = sources(["tars"], folder / "c.yaml")["tars"]
    parts = [mixture(source, s, streams) for s in range(streams)]
    counts = [(s + 1) * 60 // streams - s * 60 // streams for s in range(streams)]
    epochs = []
    for epoch in range(3):
        draws = [[part.draw() for _ in range(n)] for part, n in zip(parts, counts)]
        assert sorted(d.index for some in draws for d in some) == list(range(60))
        assert {d.epoch for some in draws for d in some} == {epoch}
        epochs.append([d.index for some in draws for d in some])
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_shard_order_stays_among_few_shards_and_mixes_within_the_buffer(folder):
    source = sources(["tars"], folder / "c.yaml")["tars"]
    drawn = [d.index for part in [mixture(source, 0, 1, buffer=12)] for d in (part.draw() for _ in range(60))]
    windows = [drawn[i : i + 12] for i in range(0, 60, 12)]
    assert all(len({row // 6 for row in window}) == 2 for window in windows)
    assert sum(window != sorted(window) for window in windows) == 5
    assert len({shard for window in windows for shard in {row // 6 for row in window}}) == 10


def test_too_few_rows_for_shard_order(folder):
    source = sources(["tars#3"], folder / "c.yaml")["tars#3"]
    assert shard_ends(source).tolist() == [3]
    with pytest.raises(ValueError, match="'a' has 3 rows, fewer than the 4 streams; such a data set needs the order"):
        mixture(source)


def loader(folder, workers=0, rank=0, world=1, **plan):
    found = sources(["tars"], folder / "c.yaml")
    settings = LoaderConfig({"tars": 1.0}, 96, 8, streams=4, order="shards", buffer=8, **plan)
    return Loader(found, settings, tiny.model("bagel").lay_out, routes=2, workers=workers, rank=rank, world=world)


def test_shard_order_resumes_exactly_on_other_numbers_of_workers_and_ranks(folder):
    """Three rows by one process, saved, then three ranks go on: the rows are those of an unbroken run."""
    whole = loader(folder)
    rows = [row.batch.samples for _, row in zip(range(18), whole)]
    assert [row.batch.samples for _, row in zip(range(18), loader(folder, workers=2))] == rows
    first = loader(folder)
    for _ in zip(range(6), first):
        pass
    state = json.loads(json.dumps(merge_states([first.state_dict()])))
    resumed = [loader(folder, rank=rank, world=2) for rank in range(2)]
    for some in resumed:
        some.load_state_dict(state)
    steps = [[row.batch.samples for _, row in zip(range(6), some)] for some in resumed]
    assert [steps[k % 2][k // 2] for k in range(12)] == rows[6:18]
    with pytest.raises(ValueError, match="order was shards when the state was saved and is global now"):
        other = loader(folder)
        other.plan = replace(other.plan, order="global")
        other.load_state_dict(state)


def test_a_shard_is_opened_once_not_for_every_sample(folder):
    source = sources(["tars"], folder / "c.yaml")["tars"]
    before = COUNTS.copy()
    for _ in range(2):
        for index in range(60):
            source[index]
    counts = COUNTS.since(before)
    assert counts.opens <= 10 and counts.reads == 2 * 60 * 2  # a row and a picture each


SIZES = """
import sys, time
from pathlib import Path
from diptych.data.index import load
file, files = Path(sys.argv[1]), [Path(f"{k:06d}.tar") for k in range(int(sys.argv[2]))]
def resident():  # pages of this process alone; mapped ones are shared
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024
before, start = resident(), time.perf_counter()
index = load(file, files, {})
for row in range(0, len(index), len(index) // 100):
    index.shard(row), index.records[int(index.ends[row - 1]) if row else 0 : int(index.ends[row])]
print(time.perf_counter() - start, (resident() - before) / 2**20)
"""


def test_opening_an_index_does_not_grow_with_its_rows(tmp_path):
    """300,000 rows open in a fraction of a second and a few MiB. ``benchmarks/data.py`` measures ten million."""
    from pathlib import Path

    files = [tmp_path / f"{k:06d}.tar" for k in range(300)]
    for file in files:
        file.write_bytes(b"x")
    records = [b"%09d\0jpg\0%d\0%d" % (i, 512 * i, 20000) for i in range(1000)]
    write(tmp_path / "i.index", files, lambda file: Scanned(records, [1000]), {})
    opened = load(tmp_path / "i.index", [Path(f.name) for f in files], {})
    assert len(opened) == 300_000
    done = subprocess.run(
        [sys.executable, "-c", SIZES, str(tmp_path / "i.index"), "300"], capture_output=True, text=True, check=True
    )
    seconds, mib = map(float, done.stdout.split())
    assert seconds < 2 and mib < 20, done.stdout
    assert Counter(opened.shard_files.tolist()) == Counter(range(300))
