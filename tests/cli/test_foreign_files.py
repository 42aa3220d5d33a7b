"""Every verb that writes gets a folder with files of the user: whether it writes or refuses, the files stay."""

from __future__ import annotations

import shutil

import pytest

from diptych import cli
from tests.support import tiny

FOREIGN = {
    "thesis.txt": b"three years of work",
    "sub/data.csv": b"1,2,3\n",
    ".hidden": b"\x00\xff",
    "config.json": b'{"mine": true}',  # names that the library uses itself
    "metrics.jsonl": b"not a metric\n",
    "release/notes.md": b"# mine\n",
    "images/mine.png": b"no picture",
}
NAMES_OF_OURS = {"config.json", "metrics.jsonl"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with a recipe, and in it ``mine``, a folder of the user's files."""
    monkeypatch.chdir(tmp_path)
    for name, content in FOREIGN.items():
        file = tmp_path / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "recipe.json").write_text(tiny.recipe().to_json())
    tiny.picture(0).save(tmp_path / "scene.png")
    (tmp_path / "geneval.jsonl").write_text(
        '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
    )
    (tmp_path / "c.yaml").write_text("photos: {format: images, path: .}\n")
    rows = '{"image": "scene.png", "conversations": [{"from": "human", "value": "<image>\\nwhat?"}, '
    (tmp_path / "rows.json").write_text("[" + rows + '{"from": "gpt", "value": "a star"}]}]')
    return tmp_path


VERBS = {
    "train": "train recipe.json --out mine --steps 1",
    "generate": "generate MODEL star --steps 1 -n 2 --out mine/drawn.png",
    "edit": "edit MODEL scene.png red --steps 1 --out mine/drawn.png",
    "chat": "chat MODEL --out mine",
    "export": "export MODEL mine",
    "export published": "export MODEL mine --format published",
    "export hf": "export MODEL mine --format hf",
    "export --force": "export MODEL mine --force",
    "evaluate run": "evaluate run MODEL vqa-mini --limit 1 --out mine",
    "evaluate --layout": "evaluate run MODEL geneval=geneval.jsonl --limit 1 --steps 1 --no-score --layout mine",
    "analyze": "analyze attention MODEL -n 2 --size 32 --out mine",
    "data show": "data show shapes/draw -n 1 --out mine/sheet.png",
    "data convert": "data convert llava rows.json mine/rows.jsonl --images .",
    "data filter": "data filter photos --catalog c.yaml --exact --out mine",
    "data shard": "data shard shapes/ask --limit 2 --out mine",
    "data stats": "data stats shapes/ask --limit 2 --out mine",
    "data precompute": "data precompute recipe.json --limit 2 --out mine",
    "study": "study cheers-detail --seeds 0 --steps 1 --out mine --page mine --model MODEL",
}


SAME_NAMES = {  # a file of the user that has exactly the name that the verb writes
    "train: environment": ("train recipe.json --out mine --steps 1", "environment.json", "environment.json"),
    "train: release": ("train recipe.json --out mine --steps 1", "release/config.json", "release"),
    "train: samples": ("train recipe.json --out mine --steps 1", "samples/step-00000001.png", "samples"),
    "generate": ("generate MODEL star --steps 1 --out mine/a.png", "a.png", "mine/a.png"),
    "generate -n": ("generate MODEL star --steps 1 -n 2 --out mine/a.png", "a-1.png", "mine/a-1.png"),
    "generate jpg": ("generate MODEL star --steps 1 --out mine/a.jpg", "a.jpg", "mine/a.jpg"),
    "generate --prompts": ("generate MODEL --prompts p.txt --steps 1 --out mine", "00001.png", "00001.png"),
    "generate list": ("generate MODEL --prompts p.txt --steps 1 --out mine", "prompts.jsonl", "prompts.jsonl"),
    "generate settings": ("generate MODEL --prompts p.txt --steps 1 --out mine", "generate.json", "generate.json"),
    "edit": ("edit MODEL scene.png red --steps 1 --out mine/a.png", "a.png", "mine/a.png"),
    "evaluate --layout": (
        "evaluate run MODEL geneval=geneval.jsonl --limit 1 --steps 1 --no-score --layout mine",
        "geneval/00000/samples/0000.png",
        "mine/geneval",
    ),
    "analyze": ("analyze attention MODEL -n 2 --size 32 --out mine", "attention.json", "attention.json"),
    "analyze figure": ("analyze attention MODEL -n 2 --size 32 --out mine", "attention.png", "attention.png"),
    "data show": ("data show shapes/draw -n 1 --out mine/a.png", "a.png", "mine/a.png"),
    "data convert": ("data convert llava rows.json mine/rows.jsonl --images .", "rows.jsonl", "rows.jsonl"),
    "data filter": ("data filter photos --catalog c.yaml --exact --out mine", "filter.json", "filter.json"),
    "data stats": ("data stats shapes/ask --limit 2 --out mine", "stats-0-of-1.json", "stats-0-of-1.json"),
    "data shard": ("data shard shapes/ask --limit 2 --out mine", "shapes/ask/000000.tar", "000000.tar"),
    "data precompute": (
        "data precompute recipe.json --data shapes/ask --limit 2 --out mine",
        "shapes/ask/000000.tar",
        "000000.tar",
    ),
    "data precompute index": (
        "data precompute recipe.json --data shapes/ask --limit 2 --out mine",
        "shapes/ask/encoded.json",
        "encoded.json",
    ),
    "study page": (
        "study cheers-detail --seeds 0 --steps 1 --out new --page mine --model MODEL",
        "cheers-detail.md",
        "cheers-detail.md",
    ),
}


@pytest.mark.parametrize("line, name, named", SAME_NAMES.values(), ids=SAME_NAMES)
def test_a_file_of_the_same_name_is_refused(place, tiny_model, line, name, named, capsys):
    folder = place / "mine"
    shutil.rmtree(folder)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('["mine"]')
    (place / "p.txt").write_text("a star\na cross\n")
    words = [str(tiny_model) if word == "MODEL" else word for word in line.split()]
    code = cli.main([*words, *(["--device", "cpu"] if words[0] in ("train", "evaluate") else [])])
    err = capsys.readouterr().err
    assert code == cli.BAD and named in err, err
    assert [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()] == [name], "something was written"
    assert (folder / name).read_text() == '["mine"]'


def test_pictures_of_ours_are_drawn_anew_and_the_edited_one_stays(place, tiny_model, capsys):
    drawn = place / "scene.jpg"
    line = ["generate", str(tiny_model), "star", "--steps", "1", "--out", str(drawn)]
    assert cli.main(line) == cli.main(line) == cli.OK
    before = drawn.read_bytes()
    assert cli.main(["edit", str(tiny_model), str(drawn), "red", "--steps", "1", "--out", str(drawn)]) == cli.BAD
    assert "the picture to edit" in capsys.readouterr().err and drawn.read_bytes() == before
    assert cli.main(["edit", str(tiny_model), str(drawn), "red", "--steps", "1"]) == cli.OK
    assert (place / "edited.png").is_file()


def test_home_is_expanded_where_the_shell_leaves_it(place, tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    assert cli.main(["generate", str(tiny_model), "star", "--steps", "1", "--out=~/a.png"]) == cli.OK
    assert (place / "home" / "a.png").is_file() and not (place / "~").exists()


@pytest.mark.parametrize("out", ["scene.png/a.png", "folder.png", "locked/a.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(place, out, capsys, monkeypatch):
    (place / "folder.png").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))
    (place / "locked").mkdir()
    assert cli.main(["generate", "no/model", "star", "--out", out]) == cli.BAD
    assert out.partition("/")[0] in capsys.readouterr().err


@pytest.mark.parametrize("line", VERBS.values(), ids=VERBS)
def test_files_of_the_user_stay(place, tiny_model, line, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    words = [str(tiny_model) if word == "MODEL" else word for word in line.split()]
    code = cli.main([*words, *(["--device", "cpu"] if words[0] in ("train", "evaluate") else [])])
    err = capsys.readouterr().err
    assert code in (cli.OK, cli.BAD), err
    overwritten = NAMES_OF_OURS if "--force" in words else set()
    for name, content in FOREIGN.items():
        file = place / "mine" / name
        assert file.is_file(), f"{line} removed {name} ({err})"
        assert name in overwritten or file.read_bytes() == content, f"{line} changed {name} ({err})"
    assert not list(place.rglob("*.tmp")) and not list(place.rglob(".mine*")), "something temporary stays"


def test_every_verb_that_writes_is_tried():
    """A verb with --out (or export's and convert's arguments) that is missing above is one nobody looked at."""
    from tests.test_house import verbs

    writing = {
        " ".join(words)
        for words, verb in verbs().items()
        if any(o == "--out" for p in verb.params for o in p.opts) or words in (("export",), ("data", "convert"))
    }
    tried = {line.split()[0] for line in VERBS.values()} | {" ".join(line.split()[:2]) for line in VERBS.values()}
    tried |= {f"analyze {probe}" for probe in ("separability", "keywords", "gates", "similarity", "locality")}  # same
    elsewhere = {"demo", "report", "data prepare"}  # an evaluation or minutes or a download: see their own tests
    assert writing - tried == elsewhere


def test_chat_goes_on_after_a_line_that_cannot_be_used(place, tiny_model, monkeypatch, capsys):
    (place / "talk").mkdir()
    (place / "talk" / "picture-000.png").write_bytes(b"mine")
    (place / "scene.txt").write_text("no picture")
    lines = iter(["/image scene.txt", "a \udcff", "/draw a \udcff", "/image scene.png", "what?", "/draw star", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", str(tiny_model), "--out", "talk", "--max-new-tokens", "2"]) == cli.OK
    out = capsys.readouterr().out
    assert out.count("error: ") == 3 and "(showing scene.png; now ask)" in out
    assert (place / "talk" / "picture-000.png").read_bytes() == b"mine"
    assert (place / "talk" / "picture-001.png").is_file()
