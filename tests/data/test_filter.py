"""Filters of data sets: each rule drops what it names, shares add up, and a catalog reads the kept rows only."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from diptych import cli
from diptych.data import filter as filters
from diptych.data.catalog import sources
from diptych.data.filter import Rules, _close_hashes, _close_vectors, difference_hash

ENGLISH, GERMAN = "a small dog runs over the green meadow", "ein kleiner Hund läuft über die grüne Wiese"


@pytest.fixture
def catalog(tmp_path):
    """Rows: 0 a picture, 1 its file, 2 the picture smaller, 3 another, 4 narrow, 5 tiny, 6 German, 7 broken."""
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)

    def picture(width, height):
        small = PIL.Image.fromarray(noise.integers(0, 255, (8, 8, 3), np.uint8))
        return small.resize((width, height), PIL.Image.Resampling.BICUBIC)

    first = picture(64, 64)
    pictures = [
        first,
        first,
        first.resize((48, 48)),
        picture(64, 64),
        picture(120, 32),
        picture(12, 12),
        picture(64, 64),
    ]
    for number, image in enumerate(pictures):
        image.save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "7.png").write_bytes(b"no picture")
    lines = []
    for number in range(8):
        content = [{"type": "image", "image": f"{number}.png"}]
        answer = GERMAN if number == 6 else ENGLISH
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"row-{number}", "messages": messages}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(lines))
    entry = "format: jsonl, path: a.jsonl, images: photos"
    (tmp_path / "c.yaml").write_text(f"a: {{{entry}}}\nb: {{{entry}, keep: kept}}\n")
    (tmp_path / "mine.py").write_text("def odd(sample):\n    return int(sample.id[-1]) % 2 == 1 or 'even'\n")
    return tmp_path / "c.yaml"


def kept(catalog, *words):
    out = catalog.parent / "kept"
    assert cli.main(["data", "filter", "a", "--catalog", str(catalog), "--out", str(out), *words]) == 0
    return [int(name[4:]) for name in (out / "kept.txt").read_text().split()]


@pytest.mark.parametrize(
    "words, rows",
    [
        (["--min-side", "24"], [0, 1, 2, 3, 4, 6]),
        (["--max-aspect", "2"], [0, 1, 2, 3, 5, 6]),
        (["--exact"], [0, 2, 3, 4, 5, 6]),
        (["--distance", "6"], [0, 3, 4, 5, 6]),
        (["--min-side", "24", "--max-aspect", "2", "--exact", "--distance", "6"], [0, 3, 6]),
        (["--function", "FOLDER/mine.py:odd"], [1, 3, 5]),
    ],
)
def test_each_rule(catalog, words, rows):
    assert kept(catalog, *[word.replace("FOLDER", str(catalog.parent)) for word in words]) == rows
    source = sources(["b"], catalog)["b"]
    assert [sample.id for sample in (source[i] for i in range(len(source)))] == [f"row-{row}" for row in rows]
    assert source.shard_ends.tolist() == [len(rows)] and source.where(0).endswith(f"a.jsonl:{rows[0] + 1}")


def test_languages(catalog):
    pytest.importorskip("py3langid")
    assert kept(catalog, "--language", "en") == [0, 1, 2, 3, 4, 5]


def test_shares_and_settings(catalog, monkeypatch, capsys):
    """Blocks that are there are not read again; the list needs all; other rules are refused; features are compared."""
    monkeypatch.setattr(filters, "BLOCK", 3)
    source, out = sources(["a"], catalog)["a"], catalog.parent / "kept"
    rules = Rules(exact=True, similarity=0.9)
    vectors = {64: [1.0, 0.0], 48: [0.95, 0.1], 120: [0.0, 1.0], 12: [0.1, 1.0]}
    features = lambda images: np.array([vectors.get(i.width, [-1.0, 0.1]) for i in images])  # noqa: E731
    filters.measure(source, rules, out, features=features, rank=0, world=2)
    with pytest.raises(ValueError, match="kept lacks 1 of 3 blocks, first 000001.npz; run their shares"):
        filters.select(out)
    filters.measure(source, rules, out, features=features, rank=1, world=2)
    monkeypatch.setattr(filters, "_facts", None)
    filters.measure(source, rules, out, features=features)
    result = filters.select(out)
    assert result["kept"] == 2 and result["dropped"] == {"exact": 1, "similarity": 4, "unreadable": 1}
    assert sources(["b"], catalog)["b"].rows.tolist() == [0, 4]
    with pytest.raises(ValueError, match="kept was made for .* not for"):
        filters.measure(source, Rules(exact=True), out)
    with pytest.raises(ValueError, match="similarity and an encoder go together"):
        filters.measure(source, rules, out)
    with (catalog.parent / "a.jsonl").open("a") as file:
        file.write((catalog.parent / "a.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="c.yaml:2: data set 'b': keep: .* was made of 8 rows, and the data set has 9"):
        sources(["b"], catalog)
    with pytest.raises(ValueError, match="no rule is set; the filter would keep every row"):
        Rules()


def test_near_hashes_and_vectors_are_found_as_by_comparing_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.integers(1, 2**63, 40, np.uint64)
    hashes = np.concatenate([base, base ^ np.uint64(0b101), base ^ np.uint64(2**40 + 2**9 + 2**3 + 2)])[
        rng.permutation(120)
    ]
    for distance in (0, 1, 2, 4):
        expected, before = [], []
        for value in map(int, hashes):
            expected.append(any((value ^ other).bit_count() <= distance for other in before))
            before += [] if expected[-1] else [value]
        assert _close_hashes(hashes, distance).tolist() == expected
    vectors = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    expected, before = [], []
    for vector in vectors:
        expected.append(any(float(vector @ other) >= 0.95 for other in before))
        before += [] if expected[-1] else [vector]
    assert _close_vectors(vectors, 0.95, block=7).tolist() == expected and 5 < sum(expected) < 45
    assert difference_hash(PIL.Image.linear_gradient("L").rotate(90)) in (0, 2**64 - 1)
