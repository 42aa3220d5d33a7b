"""Every verb that writes gets a folder with files of the user: whether it writes or refuses, the files stay."""

from __future__ import annotations

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
    "evaluate --layout": "evaluate run MODEL geneval-mini --limit 1 --steps 1 --no-score --layout mine",
    "analyze": "analyze attention MODEL -n 2 --size 32 --out mine",
    "data show": "data show shapes/draw -n 1 --out mine/sheet.png",
    "data convert": "data convert llava rows.json mine/rows.jsonl --images .",
    "data shard": "data shard shapes/ask --limit 2 --out mine",
    "data precompute": "data precompute recipe.json --limit 2 --out mine",
    "study": "study cheers-detail --seeds 0 --steps 1 --out mine --page mine --model MODEL",
}


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
