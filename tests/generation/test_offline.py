"""Pictures of a file of prompts: shards add up to the whole, nothing is drawn twice, bad files are named."""

from __future__ import annotations

import json

import pytest

from diptych import cli
from diptych.generation.engine import Engine
from diptych.generation.offline import generate_file, read_prompts
from diptych.machine.processes import parse_shard
from tests.support import tiny


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.shake(tiny.model("bagel")), "random")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\ntwo blue stars\na green cross\n")
    return file


FEW = {"num_inference_steps": 2}


def test_shards_draw_what_one_process_draws(engine, prompts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    generate_file(engine, prompts, whole, n=2, size=(32, 32), seed=5, settings=FEW)
    lists = [generate_file(engine, prompts, parts, 2, (32, 32), 5, (i, 2), settings=FEW) for i in (1, 0)]
    names = sorted(f.name for f in whole.glob("*.png"))
    assert names == sorted(f.name for f in parts.glob("*.png")) and len(names) == 6
    assert all((whole / n).read_bytes() == (parts / n).read_bytes() for n in names)
    rows = [json.loads(line) for file in lists for line in file.read_text().splitlines()]
    assert sorted(r["file"] for r in rows) == names and {r["seed"] for r in rows} == {5, 6}
    assert [r["prompt"] for r in rows if r["id"] == "00002"] == ["a green cross"] * 2


def test_a_killed_shard_goes_on_and_other_settings_are_refused(engine, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    generate_file(engine, prompts, out, size=(32, 32), settings=FEW)
    kept = (out / "00001.png").stat().st_mtime_ns
    (out / "00000.png").unlink()
    (out / "mine.txt").write_text("foreign")
    drawn = []
    draw = engine.draw
    monkeypatch.setattr(engine, "draw", lambda samples, *rest: drawn.extend(samples) or draw(samples, *rest))
    generate_file(engine, prompts, out, size=(32, 32), settings=FEW)
    assert [s.prompt for s in drawn] == ["a red circle"] and (out / "00001.png").stat().st_mtime_ns == kept
    assert (out / "mine.txt").read_text() == "foreign"
    with pytest.raises(ValueError, match="num_inference_steps"):
        generate_file(engine, prompts, out, size=(32, 32), settings={"num_inference_steps": 3})


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.jsonl", '{"prompt": 3}', "a.jsonl:1 needs 'prompt', a text"),
        ("a.jsonl", '{"prompt": "x", "sed": 3}', "unknown keys \\['sed'\\]; known: id, prompt, seed"),
        ("a.jsonl", '{"prompt": "x", "id": "../x"}', "cannot name a file"),
        ("a.jsonl", '{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}', "a.jsonl:2: id 'a' occurs twice"),
        ("a.jsonl", '{"prompt": "x", "seed": -1}', "seed must be a whole number"),
        ("a.jsonl", "{", "a.jsonl:1 is not JSON"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.csv", "x", "a .txt file, one a line, or a .jsonl file"),
    ],
)
def test_bad_files_are_named(name, text, told, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("text", ["4/4", "-1/2", "1", "a/b", "0/0"])
def test_bad_shards_are_named(text):
    with pytest.raises(ValueError, match="is not i/n with i from 0 to n - 1"):
        parse_shard(text)


def test_from_the_command_line(tiny_model, prompts, tmp_path, capsys):
    words = ["generate", str(tiny_model), "--prompts", str(prompts), "--size", "32x32", "--steps", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "o"), "--shard", "1/2"]) == 0
    assert capsys.readouterr().out.strip().endswith("prompts-1-of-2.jsonl")
    assert [f.name for f in (tmp_path / "o").glob("*.png")] == ["00001.png"]
    assert cli.main([*words, "--out", str(tmp_path / "o.png")]) == 2
    assert cli.main(["generate", str(tiny_model)]) == 2


def test_pictures_of_other_prompts_and_seeds_are_refused(engine, tmp_path):
    out, file = tmp_path / "out", tmp_path / "p.txt"
    file.write_text("a red circle\n")
    generate_file(engine, file, out, size=(32, 32), settings=FEW)
    first = (out / "00000.png").read_bytes()
    file.write_text("a blue star\n")
    with pytest.raises(ValueError, match="00000: 'a red circle' with seed 0, not 'a blue star' with seed 0"):
        generate_file(engine, file, out, size=(32, 32), settings=FEW)
    file.write_text("a red circle\na blue star\n")
    with pytest.raises(ValueError, match="with seed 0, not 'a red circle' with seed 5"):
        generate_file(engine, file, out, size=(32, 32), seed=5, settings=FEW)
    generate_file(engine, file, out, size=(32, 32), settings=FEW)  # added prompts are drawn
    assert (out / "00000.png").read_bytes() == first and (out / "00001.png").is_file()
