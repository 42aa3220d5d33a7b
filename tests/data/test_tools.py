"""Converting, sharding, counting and timing data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diptych import cli
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.sample import Image, Text, sample_from_json
from diptych.data import sources as readers
from diptych.data.catalog import load_catalog, sources
from diptych.data.convert import FORMATS, convert
from diptych.data.shards import shard, speed, stats
from diptych.data.sheet import show
from diptych.data.sources import webdataset
from tests.data.test_catalog import encoded, write_parquet
from tests.support import tiny
from tests.support.loading import make_loader


def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def talk(*turns):
    return [{"from": who, "value": said} for who, said in turns]


LLAVA = {"id": "7", "image": "a.png", "conversations": talk(("human", "<image>\nwhat is it?"), ("gpt", "a cat"))}


def converted(format, source, tmp_path, **how):
    told = convert(format, source, tmp_path / "out.jsonl", force=True, **how)
    with (tmp_path / "out.jsonl").open(newline="\n") as lines:
        return told, [sample_from_json(json.loads(line)) for line in lines]


def parts(sample):
    return [
        [m.role, *((p.role, p.image) if isinstance(p, Image) else (p.text, p.loss) for p in m.parts)]
        for m in sample.messages
    ]


def test_llava(tmp_path):
    both = {"image": ["a.png", "b.png"], "conversations": talk(("human", "<image> or <image>?"), ("gpt", "the first"))}
    text = {"conversations": talk(("system", "be brief"), ("user", "hello"), ("assistant", "hi"))}
    bad = [
        {"id": "x", "image": "a.png", "conversations": talk(("human", "no place"), ("gpt", "?"))},
        {"id": "y", "conversations": talk(("human", "<image>"), ("gpt", "?"))},
        {"id": "z", "video": "v.mp4", "conversations": talk(("human", "?"), ("gpt", "?"))},
        "{broken",
        {"conversations": talk(("robot", "?"))},
    ]
    told, made = converted("llava", jsonl(tmp_path / "in.jsonl", LLAVA, both, text, *bad), tmp_path)
    assert (told.rows, told.pictures, len(told.skipped)) == (3, 3, 5)
    assert [parts(s) for s in made] == [
        [["user", ("understand", "a.png"), ("what is it?", False)], ["assistant", ("a cat", True)]],
        [
            ["user", ("understand", "a.png"), ("or", False), ("understand", "b.png"), ("?", False)],
            ["assistant", ("the first", True)],
        ],
        [["system", ("be brief", False)], ["user", ("hello", False)], ["assistant", ("hi", True)]],
    ]
    assert [s.id for s in made] == ["in/7", "in/2", "in/3"]
    reasons = "1 of its 1 pictures have no place|0 pictures and more places|shows a video|not JSON|from 'robot'".split(
        "|"
    )
    assert all(r in line for r, line in zip(reasons, told.skipped, strict=True))
    (tmp_path / "in.json").write_text(json.dumps([LLAVA]))
    assert converted("llava", tmp_path / "in.json", tmp_path)[0].rows == 1


def test_an_answer_is_kept_to_the_byte(tmp_path):
    """White space around an answer, an empty line alone, and a marker that is no place for a picture."""
    marker = "Insert it so: ![fig3](<image>) then go on"
    rows = [
        {"conversations": talk(("human", "Indent this\n"), ("gpt", "    return x\n\n"))},
        {"image": "a.png", "conversations": talk(("human", "<image>\nConvert."), ("gpt", marker))},
        {"conversations": talk(("human", "what is a placeholder?"), ("gpt", "<image>\n"))},
        {"conversations": talk(("human", "line?"), ("gpt", "\n"))},
        {"image": "a.png", "conversations": talk(("human", "show"), ("gpt", "Here:\n\n<image>\n  so."))},
    ]
    told, made = converted("llava", jsonl(tmp_path / "in.jsonl", *rows), tmp_path)
    assert not told.skipped
    answers = [[p.text if isinstance(p, Text) else p.image for p in sample.messages[1].parts] for sample in made]
    assert answers == [["    return x\n\n"], [marker], ["<image>\n"], ["\n"], ["Here:\n", "a.png", "  so."]]
    assert made[0].messages[0].parts[0].text == "Indent this"


def test_turns_that_cannot_be_kept_are_named(tmp_path):
    rows = [
        {"conversations": talk(("human", "q"), ("gpt", ""))},
        {"conversations": talk(("human", "q"), ("gpt", "a\ud800"))},
        {"conversations": talk(("human", "q"), ("gpt", "\0"))},
        {"conversations": talk(("human", "q"), ("gpt", None))},
        {"image": "a\ud800.png", "conversations": talk(("human", "<image>"), ("gpt", "a"))},
    ]
    told, _ = converted("llava", jsonl(tmp_path / "in.jsonl", *rows), tmp_path)
    reasons = ["turn of the assistant is empty", "lone surrogate", "NUL", "text of turn 1 is None", "surrogates"]
    assert all(r in line for r, line in zip(reasons, told.skipped, strict=True)), told.skipped


def test_parquet_of_other_projects_as_the_ecosystem_writes_it(tmp_path):
    """Pictures as bytes or {bytes, path}, captions as JSON or as a list; a row of another form is named."""
    held = {"bytes": encoded(), "path": None}
    write_parquet(tmp_path / "a.parquet", [{"image": held, "captions": ["a cat"]}, {"image": None, "captions": ["x"]}])
    told, (made,) = converted("bagel-t2i", tmp_path / "a.parquet", tmp_path)
    assert made.messages[0].parts[0].text == "a cat" and told.pictures == 1
    assert "a.parquet:row 2: a picture is NoneType, not bytes" in told.skipped[0]
    rows = [
        {"image_list": [held, held], "instruction_list": [["red"]]},
        {"image_list": [held, held], "instruction_list": [[]]},
        {"image_list": [held], "instruction_list": None},
        {"image_list": None, "instruction_list": None},
    ]
    write_parquet(tmp_path / "b.parquet", rows)
    told, made = converted("bagel-edit", tmp_path / "b.parquet", tmp_path)
    assert (len(made), len(told.skipped)) == (1, 3) and "an edit has no instruction" in told.skipped[0]
    file = jsonl(tmp_path / "o.jsonl", ["no object"], {"instruction": "x", "output_image": "a.png", "input_images": 7})
    told, made = converted("omnigen2", file, tmp_path)
    assert "not an object" in told.skipped[0] and "'input_images' is 7" in told.skipped[1] and not made
    told, made = converted("llava", jsonl(tmp_path / "l.jsonl", LLAVA | {"image": 7}), tmp_path)
    assert "'image' is 7, not a path or a list of paths" in told.skipped[0]


def test_files_of_others_are_kept(tmp_path):
    """A foreign file at each place that a verb writes to: refused by name, and there afterwards."""
    source, model = sources(["shapes/ask#2"], size=32)["shapes/ask#2"], tiny.model("bagel")
    rows = jsonl(tmp_path / "in.jsonl", LLAVA)
    (tmp_path / "shards").mkdir()
    foreign = {name: tmp_path / name for name in ("mine.jsonl", "sheet.png", "shards/000000.tar", "shards/notes.txt")}
    for path in foreign.values():
        path.write_text("mine")

    def write(**settings):
        shard(source, tmp_path / "shards", **settings)

    with pytest.raises(ValueError, match="mine.jsonl is there; --force"):
        convert("llava", rows, foreign["mine.jsonl"])
    with pytest.raises(ValueError, match="sheet.png is there and was not written by"):
        show({"a": source}, model.lay_out, None, 1, foreign["sheet.png"])
    with pytest.raises(ValueError, match="000000.tar was not written by"):
        write()
    assert {path.read_text() for path in foreign.values()} == {"mine"}
    foreign["shards/000000.tar"].unlink()
    write()
    write()
    with pytest.raises(ValueError, match="holds shards of .*'seed': 0.*not of .*'seed': 1"):
        write(seed=1)
    assert foreign["shards/notes.txt"].read_text() == "mine"
    for _ in range(2):  # a sheet of ours is drawn anew
        show({"a": source}, model.lay_out, None, 1, tmp_path / "new.png")
    with pytest.raises(ValueError, match="its name must end in .png, .jpg"):
        show({"a": source}, model.lay_out, None, 1, tmp_path / "new.gif")


def test_the_verbs_of_the_command_line_keep_files_of_others(tmp_path, capsys, monkeypatch):
    """The commands as a user types them, each into a place that holds a file of the user's."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "in.jsonl", LLAVA)
    places = ["mine.jsonl", "sheet.png", "shards/shapes/draw/000000.tar", "stamps/index.json"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("mine")
    commands = (
        "data convert llava in.jsonl mine.jsonl",
        "data show shapes/draw --out sheet.png",
        "data shard shapes/draw --limit 2 --out shards",
        "data prepare stamps --source . --out stamps",
    )
    for command, place in zip(commands, places, strict=True):
        assert cli.main(command.split()) == 2, command
        assert Path(place).name in capsys.readouterr().err.replace("\n", ""), command
    assert [(tmp_path / place).read_text() for place in places] == ["mine"] * 4
    assert cli.main("data convert llava in.jsonl mine.jsonl --force".split()) == 0
    assert json.loads((tmp_path / "mine.jsonl").read_text())["id"] == "in/7"


def test_pictures_of_others_are_kept(tmp_path):
    write_parquet(tmp_path / "t2i.parquet", [{"image": encoded(), "captions": json.dumps(["a cat"])}])
    (tmp_path / "out-images").mkdir()
    (tmp_path / "out-images" / "t2i.parquet-1.png").write_text("mine")
    with pytest.raises(ValueError, match="t2i.parquet-1.png is there with other content"):
        convert("bagel-t2i", tmp_path / "t2i.parquet", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert convert("bagel-t2i", tmp_path / "t2i.parquet", tmp_path / "out.jsonl", force=True).pictures == 1


def test_rows_as_they_come(tmp_path):
    """Ids that come twice, names with a comma, separators that only look like line ends, a byte order mark."""
    comma = LLAVA | {"id": "8", "image": "a,b.png"}
    odd = json.dumps(
        LLAVA | {"id": "9", "conversations": talk(("human", "<image>one\u2028two"), ("gpt", "a\x85b"))},
        ensure_ascii=False,
    )
    bad = [
        LLAVA | {"image": [{"path": "a.png"}]},
        {"conversations": talk(("human", " "))},
        LLAVA | {"conversations": ["hello"]},
        LLAVA | {"conversations": {"from": "human"}},
        ["not", "an", "object"],
    ]
    file = jsonl(tmp_path / "in.jsonl", LLAVA, LLAVA, comma, odd, *bad)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b'{"id": "\xff"}\n' + json.dumps(LLAVA).encode())
    told, made = converted("llava", file, tmp_path)
    assert [s.id for s in made] == ["in/7", "in/7#2", "in/8", "in/9", "in/7#3"] and len(told.skipped) == 6
    assert [i.image for i in made[2].images()] == ["a,b.png"]
    assert made[3].messages[0].parts[1].text == "one\u2028two"
    told, _ = converted(
        "omnigen2",
        jsonl(tmp_path / "o.jsonl", {"instruction": "red", "output_image": "a.png", "input_images": [7]}),
        tmp_path,
    )
    assert (told.rows, len(told.skipped)) == (0, 1)


def test_cheers_and_omnigen2(tmp_path):
    see, make = "<im_start><image><im_end>", "<im_start><image_gen><im_end>"
    rows = [
        {"image": "a.png", "conversations": talk(("human", f"{see}\nwhat?"), ("gpt", "a cat"))},
        {"image": "b.png", "conversations": talk(("human", "a cat"), ("gpt", make))},
        {"image": "a.png, b.png", "conversations": talk(("human", f"{see}make it red"), ("gpt", make))},
    ]
    _, made = converted("cheers", jsonl(tmp_path / "in.jsonl", *rows), tmp_path)
    assert [[(i.role, i.image) for i in s.images()] for s in made] == [
        [("understand", "a.png")],
        [("target", "b.png")],
        [("condition", "a.png"), ("target", "b.png")],
    ]
    root = tmp_path / "pictures"
    rows = [
        {"instruction": "a cat", "output_image": str(root / "c.png")},
        {"instruction": "red", "input_images": [str(root / "c.png")], "output_image": str(root / "d.png")},
        {"instruction": "red", "output_image": "/elsewhere/d.png"},
        {"instruction": "red"},
    ]
    told, made = converted("omnigen2", jsonl(tmp_path / "in.jsonl", *rows), tmp_path, images=root)
    assert [[(i.role, i.image) for i in s.images()] for s in made] == [
        [("target", "c.png")],
        [("condition", "c.png"), ("target", "d.png")],
    ]
    assert "lies outside" in told.skipped[0] and "lacks output_image" in told.skipped[1]


def test_bagel_parquet_is_read_back_as_a_catalog_reads_it(tmp_path):
    write_parquet(
        tmp_path / "t2i.parquet", [{"image": encoded(), "captions": json.dumps({"short": "a", "long": "a cat"})}]
    )
    told, (made,) = converted("bagel-t2i", tmp_path / "t2i.parquet", tmp_path)
    assert made.messages[0].parts[0].text in ("a", "a cat") and told.pictures == 1
    chain = {"image_list": [encoded(), encoded(), encoded()], "instruction_list": [["red", "make it red"], ["blue"]]}
    short = {"image_list": [encoded()], "instruction_list": [["red"]]}
    write_parquet(tmp_path / "edits.parquet", [chain, short])
    told, (made,) = converted("bagel-edit", tmp_path / "edits.parquet", tmp_path)
    assert [m.role for m in made.messages] == ["user", "assistant"] * 2
    assert [i.role for i in made.images()] == ["condition", "target", "target"]
    assert made.messages[2].parts == (Text("blue"),) and "1 pictures do not fit 1 instructions" in told.skipped[0]
    (tmp_path / "catalog.yaml").write_text("edits: {format: jsonl, path: out.jsonl, images: out-images}\n")
    sample = load_catalog(tmp_path / "catalog.yaml")["edits"][0]
    assert all(i.pixels.size == (8, 6) for i in sample.images())
    assert tiny.model("bagel").lay_out(sample).pictures == 6  # CLEAN + VISION, NOISED + both, NOISED


def test_converting_from_the_command_line(tmp_path, capsys):
    source, out = jsonl(tmp_path / "in.jsonl", LLAVA), str(tmp_path / "made.jsonl")
    assert cli.main(["data", "convert", "llava", str(source), out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert cli.main(["data", "convert", "lava", str(source), out]) == 2
    assert f"unknown format 'lava'; choose from {', '.join(FORMATS)}" in capsys.readouterr().err


def test_shards_hold_the_same_samples_in_another_order(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encoded(size=(8, 6)))
    (tmp_path / "photos" / "5.png").write_bytes(b"broken")
    rows = [
        {"id": f"r{i}", "messages": [{"role": "assistant", "content": [{"type": "image", "image": f"{i}.png"}]}]}
        for i in range(7)
    ]
    jsonl(tmp_path / "mine.jsonl", *rows)
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(
        "mine: {format: jsonl, path: mine.jsonl, images: photos}\nmade: {format: webdataset, path: made/*.tar}\n"
    )
    mine = sources(["mine"], catalog)
    told = shard(mine["mine"], tmp_path / "made", rows=3)
    assert (told["rows"], told["shards"]) == (5, 3)
    assert sorted(told["skipped"]) == ["mine/5", "mine/6"]  # 5.png is no picture, 6.png is missing
    made = load_catalog(catalog)["made"]
    ids = [made.row(i).id for i in range(5)]
    assert sorted(ids) == [f"r{i}" for i in range(5)] and ids != sorted(ids)
    good = next(i for i in range(5) if made.row(i).id == "r2")
    assert made.data(good, "0.png") == (tmp_path / "photos" / "2.png").read_bytes()  # bytes as they were
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "made").iterdir())]
    shard(mine["mine"], tmp_path / "made", rows=3)  # nothing to do
    assert before == [p.stat().st_mtime_ns for p in sorted((tmp_path / "made").iterdir())]
    tars = pytest.importorskip("webdataset.tariterators")
    with (tmp_path / "made" / "000000.tar").open("rb") as file:  # another reader's grouping by key
        read = list(tars.group_by_keys({**member, "__url__": ""} for member in tars.tar_file_iterator(file)))
    assert [json.loads(r["json"])["id"] for r in read] == ids[:3] and all("0.png" in r for r in read)


def test_damaged_shards_are_skipped_counted_and_listed(tmp_path, capsys):
    """A member that was cut, a shard that was cut and one that is no tar: every tool goes on with the rest."""
    shard(sources(["shapes/ask#12"], size=32)["shapes/ask#12"], tmp_path / "in", rows=4, seed=None)
    first, second, third = (tmp_path / "in" / f"00000{k}.tar" for k in range(3))
    whole = webdataset("in", tmp_path / "in")
    offset, size = whole.places(1)[1]["0.png"]
    data = first.read_bytes()
    first.write_bytes(data[: offset + 20] + bytes(size - 20) + data[offset + size :])
    cut = whole.places(6)[1]["0.png"][0] + 10  # the third sample of the second shard loses its picture, the fourth all
    second.write_bytes(second.read_bytes()[:cut])
    third.write_bytes(b"no tar at all" * 100)
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("in: {format: webdataset, path: in/*.tar}\n")
    bad = {"in/1": "000000.tar", "in/6": "ends after 10 of", "in/7": "000001.tar", "in/8": "000002.tar"}
    found = stats(sources(["in"], catalog), tiny.model("bagel").lay_out)["in"].to_json()
    assert (found["rows"], found["bad"]) == (5, 4) and found["skipped"].keys() == bad.keys()
    assert all(why in found["skipped"][row] for row, why in bad.items())
    told = shard(sources(["in"], catalog)["in"], tmp_path / "out")
    assert told["rows"] == 5 and told["skipped"] == found["skipped"]
    rows = make_loader(
        sources(["in"], catalog), {"in": 1.0}, tiny.model("bagel").lay_out, tokens=96, pictures=8, routes=2, streams=1
    )
    next(iter(rows))
    assert dict(rows.skipped) == found["skipped"]
    assert cli.main(["data", "stats", "in", "--catalog", str(catalog)]) == 0
    out = capsys.readouterr().out
    assert all(f"skipped {row}: " in out for row in bad)
    with pytest.raises(ValueError, match="000002.tar is not a readable uncompressed tar"):
        webdataset("in", third)


def test_stats_count_what_the_model_will_see():
    found = stats(sources(["shapes/draw#6", "shapes/ask#6"], size=32), tiny.model("bagel").lay_out)
    draw, ask = found["shapes/draw#6"].to_json(), found["shapes/ask#6"].to_json()
    assert (draw["rows"], draw["bad"], draw["shapes"]) == (6, 0, {"32x32 noised": 6})
    assert draw["kinds"]["noised"] == 6 * (4 + 2) and draw["supervised"] == 6 * 4
    assert (
        set(ask["kinds"]) == {"text", "vision"} and ask["supervised"] > 0 and ask["p5"] <= ask["p50"] <= ask["longest"]
    )


def test_llava_onevision_and_internvl(tmp_path):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    picture = {"bytes": encoded(), "path": "x.png"}
    told = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    rows = [
        {"id": "a", "image": picture, "conversations": turns, "data_source": "s"},
        {"id": "b", "image": None, "conversations": told, "data_source": "s"},
        {"id": "c", "image": None, "conversations": turns, "data_source": "s"},
    ]
    path = write_parquet(tmp_path / "part.parquet", rows)
    done = convert("llava-onevision", path, tmp_path / "one.jsonl")
    assert (done.rows, done.pictures) == (2, 1) and "part.parquet:row 3: it has 0 pictures" in done.skipped[0]
    source = readers.jsonl("one", tmp_path / "one.jsonl", tmp_path / "one-images")
    assert [source[i].id for i in range(2)] == ["part/a", "part/b"] and len(list(source[0].images())) == 1
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "one.jsonl").write_text(json.dumps({"id": 7, "image": "1.png", "conversations": turns}) + "\n")
    meta = {"coco": {"root": "data/coco", "annotation": "sets/one.jsonl", "repeat_time": 2, "length": 1}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert convert("internvl", tmp_path / "meta.json", tmp_path / "two.jsonl").rows == 1
    row = json.loads((tmp_path / "two.jsonl").read_text())
    assert row["id"] == "coco/7" and row["messages"][0]["content"][0]["image"] == "data/coco/1.png"
    (tmp_path / "meta.json").write_text('{"coco": {"root": "data", "annotation": "no.jsonl"}}')
    with pytest.raises(ValueError, match="meta.json: data set 'coco': .*no.jsonl does not exist"):
        convert("internvl", tmp_path / "meta.json", tmp_path / "three.jsonl")


def test_shares_add_up(tmp_path, capsys):
    """Shares of shards, of counts and of converted files are together what one process makes."""
    whole = shard(sources(["shapes/draw#10"], size=16)["shapes/draw#10"], tmp_path / "whole", rows=3)
    words = ["data", "shard", "shapes/draw", "--limit", "10", "--size", "16", "--rows", "3", "--out", str(tmp_path)]
    assert all(cli.main([*words, "--shard", f"{k}/2"]) == 0 for k in range(2)) and whole["shards"] == 4
    for k in range(4):
        file = f"{k:06d}.tar"
        assert len((tmp_path / "shapes/draw" / file).read_bytes()) == len((tmp_path / "whole" / file).read_bytes())
    words = ["data", "stats", "shapes/draw", "--limit", "10", "--size", "16", "--out", str(tmp_path / "counts")]
    capsys.readouterr()
    assert cli.main([*words[:-2], "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert all(cli.main([*words, "--shard", f"{k}/3"]) == 0 for k in range(3))
    capsys.readouterr()
    assert cli.main([*words, "--merge", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    for k in range(3):
        row = {"id": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": f"{k}"}]}
        (tmp_path / f"{k}.jsonl").write_text(json.dumps(row) + "\n")
    words = ["data", "convert", "llava", str(tmp_path / "*.jsonl")]
    for k in range(2):
        assert cli.main([*words, str(tmp_path / "out" / "mine.jsonl"), "--shard", f"{k}/2"]) == 0
    assert len(readers.jsonl("mine", tmp_path / "out" / "mine-*.jsonl")) == 3


class Lengths:
    """Rows of a realistic mix: many short questions, some captions, pictures of a few sizes, long documents."""

    name = "mix"

    def __init__(self):
        draw = np.random.default_rng(0)
        kinds = [
            draw.lognormal(4.5, 0.8, 4000),
            draw.choice([258, 578, 1026], 4000) + draw.lognormal(4, 0.6, 4000),
            draw.lognormal(6.5, 0.7, 2000),
        ]
        self.lengths = np.clip(np.concatenate(kinds), 4, 4096).astype(int)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        from diptych.core.sample import Sample, assistant, user

        return Sample(str(self.lengths[index]), (user("?"), assistant("!")))


def test_rows_are_full_on_a_realistic_mix_of_lengths():
    def lay_out(sample, drop=frozenset()):
        return Layout(sample.id, (Segment(Kind.TEXT, (0,) * int(sample.id.rpartition("/")[2])),))

    told = speed(make_loader({"mix": Lengths()}, {"mix": 1.0}, lay_out, tokens=16384, pictures=64, streams=1), rows=40)
    assert told.fill >= 0.97 and told.skipped == 0


def test_timing_from_the_command_line(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(tiny.recipe().to_json())
    assert cli.main(["data", "bench", str(tmp_path / "recipe.json"), "--rows", "3", "--workers", "0"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rows"][0]["tokens_per_second"] > 0 and 0.5 < told["rows"][0]["fill"] <= 1
    assert cli.main(["data", "stats", "shapes/draw", "--limit", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes/draw"]["rows"] == 3
    out = str(tmp_path / "shards")
    assert cli.main(["data", "shard", "shapes/ask", "--limit", "3", "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes/ask"] == {"rows": 3, "pictures": 3, "shards": 1, "skipped": {}}
