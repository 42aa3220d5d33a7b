"""The command line: every verb on a tiny random model, exit codes, and what it says about a wrong request."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from diptych import cli, recipes
from diptych.cli.options import show_table
from diptych.machine import extras
from diptych.models import table
from diptych.training.loop import Interrupted
from tests.support import tiny


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs a verb in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = cli.main([*map(str, words)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def scene(tmp_path):
    file = tmp_path / "scene.png"
    tiny.picture(0).save(file)
    return file


def opened(file) -> PIL.Image.Image:
    with PIL.Image.open(file) as image:
        return image.copy()


def refused(result, *told, code=cli.BAD):
    got, out, err = result
    assert got == code and not out, (got, out, err)
    assert "Traceback" not in err
    for words in told:
        assert words in err, err


def test_help_lists_every_verb(call):
    code, out, _ = call("--help")
    assert code == 0
    for verb in (
        "demo",
        "train",
        "resume",
        "generate",
        "edit",
        "ask",
        "chat",
        "serve",
        "evaluate",
        "analyze",
        "models",
        "recipes",
        "data",
        "doctor",
        "export",
    ):
        assert f"  {verb} " in out
    assert call("--version")[1].startswith("diptych 0.")


def test_models(call):
    rows = json.loads(call("models", "--json")[1])
    assert {r["name"] for r in rows} == set(table.SIZES)
    for r in rows:
        assert r.keys() == {"name", "family", "parameters", "activated_parameters", "sizes", "shipped", "source"}
        assert 0 < r["activated_parameters"] <= r["parameters"]
    seven = next(r for r in rows if r["name"] == "bagel/7b-mot")
    assert 14e9 < seven["parameters"] < 15.5e9 and 7e9 < seven["activated_parameters"] < 8.5e9
    assert "bagel/tiny" in call("models")[1]


def test_recipes(call):
    rows = json.loads(call("recipes", "--json")[1])
    assert {r["name"] for r in rows} == set(recipes.RECIPES)
    assert all(r["steps"] > 0 and r["family"] in table.FAMILIES for r in rows)
    assert recipes.Recipe.from_json(call("recipes", "bagel/tiny")[1]) == recipes.find("bagel/tiny")
    refused(call("recipes", "bagel/huge"), "no recipe 'bagel/huge'", "bagel/tiny")


def test_doctor(call):
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    for key in ("python", "torch", "processor", "fp32 matrix product", "cuda", "attention", "disk free", "extra hf"):
        assert found[key], key
    assert "python" in call("doctor")[1]


def test_doctor_reads_the_extras_from_the_metadata(monkeypatch):
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.UNLOCKS) == set(declared) == set(extras.declared())
    for extra, packages in extras.declared().items():
        assert packages == [re.match(r"[\w.-]+", line)[0] for line in declared[extra]]
    told = extras.state("tune", ["pytest", "a-package-that-is-not-there"])
    assert told.startswith("LoRA; missing a-package-that-is-not-there: pip install -e '.[tune]' (pytest ")
    assert "complete" in extras.state("test", ["pytest"])


def test_doctor_measures_every_dtype(call):
    findings = json.loads(call("doctor", "--json")[1])
    for dtype in ("fp32", "bf16", "fp16"):
        assert int(findings[f"{dtype} matrix product"].split()[0]) > 0
    assert float(findings["memory"].removesuffix(" GiB")) > 0.5


def test_unknown_names_suggest_the_nearest(call):
    refused(call("trian", "bagel/tiny"), "Did you mean 'train'?")
    refused(call("evaluate", "comapre", "a", "b"), "did you mean 'compare'?")
    refused(call("train", "bagel/tiny", "--step", "3"), "Did you mean")
    refused(call("train", "bagel/tny"), "did you mean 'bagel/tiny'?")
    refused(call("generate", "bagel-tiny", "x"), "did you mean 'bagel/tiny'?")
    refused(call("evaluate", "bagel/tiny", "vqa-mimi"), "did you mean 'vqa-mini'?")
    refused(call("study", "sgt-proxy"), "did you mean 'sgt-proxies'?")
    refused(call("plan", "bagel/tiny", "--gpu", "h10"), "did you mean")


def test_without_a_verb_the_help_is_printed(call):
    for words in ((), ("data",), ("evaluate",), ("analyze",)):
        code, out, err = call(*words)
        assert code == 0 and not err and out == call(*words, "--help")[1]


def test_traceback_shows_what_the_error_line_hides(call):
    for words in (("--traceback", "resume", "nowhere"), ("resume", "nowhere", "--traceback")):
        code, out, err = call(*words)
        assert code == cli.BAD and "Traceback" in err and "error: nowhere is no run" in err
    assert "Traceback" not in call("resume", "nowhere")[2]


@pytest.mark.parametrize(
    "bug",
    [
        lambda: int("seven"),  # a ValueError that Python raised in the middle of our code
        lambda: [].pop(),
        lambda: {}["key"],
        lambda: None.size,
        lambda: 1 / 0,
    ],
    ids=["ValueError", "IndexError", "KeyError", "AttributeError", "ZeroDivisionError"],
)
def test_a_bug_is_never_dressed_as_a_mistake_of_the_user(call, monkeypatch, bug):
    monkeypatch.setattr("diptych.machine.doctor.report", bug)
    with pytest.raises(Exception) as caught:
        call("doctor")
    assert "This is a bug in diptych" in "".join(caught.value.__notes__)


def test_names_stay_whole_in_pipes_and_on_terminals(call, monkeypatch):
    for wide in ("80", "200"):
        monkeypatch.setenv("COLUMNS", wide)
        for terminal in ("", "1"):
            monkeypatch.setenv("FORCE_COLOR", terminal) if terminal else monkeypatch.delenv("FORCE_COLOR", False)
            for verb, names in (("recipes", recipes.RECIPES), ("models", table.SIZES)):
                out = re.sub(r"\x1b\[[\d;]*m", "", call(verb)[1])
                lines = out.splitlines()
                assert all(any(name in line.split() for line in lines) for name in names)
                assert "…" not in out


def test_text_in_brackets_is_shown(capsys):
    show_table("extras", ["name", "install"], [["[red]x", "pip install -e '.[hf]'"]])
    shown = capsys.readouterr().out
    assert "pip install -e '.[hf]'" in shown and "[red]x" in shown


def test_completion_is_installed(tmp_path):
    environment = os.environ | {
        "HOME": str(tmp_path),
        "SHELL": "/bin/bash",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = f"{sys.executable} -m diptych --install-completion; true"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert "bash completion installed" in done.stdout, done.stdout + done.stderr
    assert "complete_bash" in next((tmp_path / ".bash_completions").iterdir()).read_text()
    asked = {"_DIPTYCH_COMPLETE": "complete_bash", "COMP_WORDS": "diptych tra", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "diptych"], env=environment | asked, capture_output=True, text=True)
    assert done.stdout.split() == ["train"]
    asked |= {"COMP_WORDS": "diptych generate chee", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-m", "diptych"], env=environment | asked, capture_output=True, text=True)
    assert "cheers/tiny" in done.stdout.split()


def test_generate(call, tiny_model, tmp_path):
    code, out, _ = call(
        "generate", tiny_model, "a blue star", "-n", "2", "--seed", "5", "--size", "32x16", "--steps", "2", "--json"
    )
    told = json.loads(out)
    assert code == 0 and told["files"] == ["picture-0.png", "picture-1.png"] and told["seed"] == 5
    assert told["parameters"]["num_inference_steps"] == 2 and told["parameters"]["size"] == [32, 16]
    assert "guidance_scale" in told["parameters"]  # defaults included
    assert [opened(f).size for f in told["files"]] == [(32, 16)] * 2
    first = (tmp_path / "picture-1.png").read_bytes()
    code, out, _ = call(
        "generate",
        tiny_model,
        "a blue star",
        "--seed",
        "6",
        "--size",
        "32x16",
        "--steps",
        "2",
        "--out",
        "deep/er/one.png",
    )
    assert code == 0 and out.strip() == "deep/er/one.png"
    a, b = opened(io.BytesIO(first)), opened(tmp_path / "deep" / "er" / "one.png")
    assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes())) <= 1  # picture i has seed SEED + i


def test_every_setting_of_the_sampler_has_an_option(call, tiny_model, scene):
    how = "--interval 0.2,1 --shift 2 --renorm channel --renorm-min 0.3 --negative blue --steps 2".split()
    more = "--setting contexts=scripts --config reading=scripts --seeding published --json".split()
    parameters = json.loads(call("generate", tiny_model, "a star", *how, *more)[1])["parameters"]
    wanted = {"guidance_interval": [0.2, 1.0], "timestep_shift": 2.0, "renorm": "channel", "renorm_min": 0.3}
    wanted |= {"contexts": "scripts", "seeding": "published", "negative_prompt": "blue"}
    assert {name: parameters[name] for name in wanted} == wanted
    told = json.loads(
        call("edit", tiny_model, scene, "red", "--preset", "gedit", "--think", "--think-tokens", "3", "--json")[1]
    )
    assert told["parameters"]["renorm"] == "text_channel" and told["parameters"]["num_inference_steps"] == 49
    assert told["parameters"]["think"] == {"max_new_tokens": 3, "temperature": 0.3, "top_p": 1.0}
    assert len(told["reasoning"]) == 1
    refused(call("generate", tiny_model, "a", "--interval", "0.4"), "--interval takes LOW,HIGH")
    refused(call("generate", tiny_model, "a", "--preset", "demos"), "unknown preset 'demos'; bagel has demo, notebook")
    refused(call("generate", tiny_model, "a", "--config", "reeding=x"), "config has no field 'reeding'; did you mean")
    refused(call("generate", tiny_model, "a", "--think-tokens", "3"), "needs --think")
    refused(call("edit", tiny_model, scene, "a", "--source-share", "0.1"), "does not draw by --source-share")


def test_edit_and_ask(call, tiny_model, scene):
    refused(call("edit", tiny_model, scene, "a", "--also", "no.png"), "no.png")
    refused(call("edit", tiny_model, "no.png", "a", "--also", scene, "--out", scene), "name another file")
    assert call("edit", tiny_model, scene, "one above the other", "--also", scene, "--steps", "1")[0] == 0
    code, out, _ = call("edit", tiny_model, scene, "make it red", "--steps", "1", "--image-guidance", "2", "--json")
    assert code == 0 and opened(json.loads(out)["files"][0]).size == (32, 32)
    code, out, _ = call("ask", tiny_model, scene, "how many?", "--max-new-tokens", "3", "--json")
    told = json.loads(out)
    assert code == 0 and told["finish_reason"] in ("stop", "length") and told["parameters"]["max_new_tokens"] == 3
    assert call("ask", tiny_model, scene, "how many?", "--max-new-tokens", "3")[1].strip() == told["text"]


def test_chat(call, tiny_model, scene, monkeypatch):
    lines = [
        "hello",
        f"/image {scene}",
        "what is it?",
        "/image nowhere.png",
        "/draw a star",
        "/dance",
        "/new",
        "",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, _ = call("chat", tiny_model, "--max-new-tokens", "2")
    assert code == 0
    for told in ("(showing", "picture 'nowhere.png' does not exist", "picture-000.png", "unknown command /dance"):
        assert told in out


def test_evaluate(call, tiny_model):
    code, out, _ = call("evaluate", tiny_model, "mini", "--limit", "1", "--json")
    result = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and result["scores"] and result["items"] > 0 and result["card"]
    for score in result["scores"].values():
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1 and score["n"] > 0
    refused(call("evaluate", tiny_model, "maxi"), "maxi", "mini")


def test_export(call, tiny_model, tmp_path):
    code, out, _ = call("export", tiny_model, "out", "--dtype", "bf16")
    assert code == 0 and out.startswith("out: ") and "MiB" in out
    full, half = (f / "model.safetensors" for f in (tiny_model, tmp_path / "out"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    assert call("generate", "out", "a star", "--steps", "1")[0] == 0


def test_train_and_resume(call, tmp_path):
    (tmp_path / "r.json").write_text(tiny.recipe().to_json())
    code, out, _ = call(
        "train",
        "r.json",
        "--out",
        "run",
        "--steps",
        "2",
        "--seed",
        "3",
        "--set",
        "stages.0.train.vision=1e-4",
        "--json",
    )
    assert code == 0 and json.loads(out) == {"run": "run", "release": "run/release"}
    written = recipes.find(tmp_path / "run" / "recipe.json")
    assert written.seed == 3 and written.steps == 2 and written.stages[0].train["vision"] == 1e-4
    assert call("resume", "run", "--json")[0] == 0
    refused(call("train", "r.json", "--out", "run"), "already holds a run", "diptych resume run")
    assert call("generate", "run", "a star", "--steps", "1")[0] == 0


def test_what_cannot_be_done_is_said_in_one_line_with_exit_code_2(call, tiny_model, scene, tmp_path):
    refused(call("generate", "nowhere", "x"), "error: no model 'nowhere'", "these ship")
    refused(call("generate", tiny_model, "x", "--size", "64"), "'64' is not WIDTHxHEIGHT, such as 64x64")
    refused(call("generate", tiny_model, "x", "--out", "drawn"), "'drawn' is no picture file; its name must end in")
    refused(
        call("generate", tiny_model, "x", "--size", "33x32"),
        "must be multiples of 16 from 16 to 128, which the model was trained on, not 33x32",
    )
    refused(call("generate", tiny_model, "x", "-n", "0"), "n must be at least 1, not 0")
    refused(call("generate", tiny_model, "x", "--steps", "0"), "num_inference_steps must be at least 1, not 0")
    asked = call("generate", tiny_model, "x", "--top-k", "3", "--temperature", "0.5")
    refused(asked, "does not draw by --temperature, --top-k; it takes --steps, --guidance")
    refused(
        call("generate", tiny_model, "x", "--device", "tpux"), "unknown device 'tpux'; choose from auto, cpu, cuda, mps"
    )
    refused(call("ask", tiny_model, "nowhere.png", "x"), "picture 'nowhere.png' does not exist")
    (tmp_path / "bad.png").write_bytes(scene.read_bytes()[:40])
    refused(call("edit", tiny_model, "bad.png", "x"), "bad.png")
    refused(call("resume", "nowhere"), "nowhere is no run")
    refused(call("train", "nowhere.json"), "no recipe 'nowhere.json'")
    refused(call("train", "bagel/tiny", "--set", "seed"), "--set takes PATH=VALUE, not 'seed'")
    refused(call("train", "bagel/tiny", "--set", "stages.0.step=3"), "did you mean 'steps'?")
    refused(call("train", "bagel/tiny", "--catalog", "nowhere.yaml"), "catalog 'nowhere.yaml' does not exist")
    refused(call("dance"), "No such command 'dance'")
    refused(call("data", "check", "nowhere.yaml"), "nowhere.yaml")
    refused(call("export", "nowhere", "out"), "no model 'nowhere'")
    refused(call("study", "nothing", "--out", "runs"), "unknown study 'nothing'")


def test_a_bad_recipe_names_file_line_and_field(call, tmp_path):
    good = tiny.recipe()
    (tmp_path / "line.json").write_text('{\n "name": "x",,\n}')
    refused(call("train", "line.json"), "line.json:2: not valid JSON")
    (tmp_path / "line.yaml").write_text("name: [")
    refused(call("train", "line.yaml"), "line.yaml:1: not valid YAML")
    (tmp_path / "field.json").write_text(good.to_json().replace('"steps": 10', '"steps": "ten"'))
    refused(call("train", "field.json"), "field.json: stages.0.steps", "(got 'ten')")
    (tmp_path / "part.json").write_text(replace(good, stages=(replace(good.stages[0], train={"legs": 1.0}),)).to_json())
    refused(call("train", "part.json", "--out", "run"), "unknown part 'legs'; bagel has: decoder.text")


@pytest.mark.parametrize(
    "error, code, told",
    [
        (MemoryError("too big"), 3, "out of memory: too big\ntry: lower limits.tokens"),
        (RuntimeError("CUDA out of memory. Tried"), 3, "try: lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "try: lower"),
        (FloatingPointError("step 3: the loss is nan"), 2, "error: step 3: the loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left"),
        (
            Interrupted(Path("runs/arm/checkpoints/step-7"), 7),
            4,
            "stopped after step 7; go on with: diptych resume runs/arm",
        ),
    ],
)
def test_exit_codes_of_what_goes_wrong_on_the_way(call, monkeypatch, error, code, told):
    def fails(*_):
        raise error

    monkeypatch.setattr("diptych.machine.doctor.report", fails)
    refused(call("doctor"), told, code=code)


def test_a_mistake_of_ours_keeps_its_trace(call, monkeypatch):
    def fails():
        raise RuntimeError("a bug")

    monkeypatch.setattr("diptych.machine.doctor.report", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        call("doctor")


@pytest.mark.parametrize(
    "name, content",
    [
        ("deep.json", "[" * 100_000),
        ("digits.json", '{"seed": ' + "9" * 5000 + "}"),
        ("binary.json", b"\xff\x80"),
        ("half.json", '{"a":'),
        ("control.yaml", b"a: \x01"),
        ("date.yaml", "a: 2020-99-99"),
        ("binary.yaml", b"\xff\xfe\x00\x80"),
        ("alias.yaml", "a: *b"),
        ("tag.yaml", "a: !!python/object:os.system x"),
    ],
)
def test_a_recipe_that_its_parser_refuses_is_one_line(call, tmp_path, name, content):
    """The parser raises five kinds of errors; to the user all are one: the file and the reason."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for verb in (["plan", file], ["train", file, "--out", tmp_path / "run"]):
        result = call(*verb)
        refused(result)
        assert len(result[2].strip().splitlines()) == 1, result
    assert not (tmp_path / "run").exists()


def test_a_number_of_too_many_digits_is_refused_by_name(call):
    refused(call("plan", "bagel/tiny", "--set", "seed=" + "9" * 5000), "seed", "digits")
    refused(call("plan", "bagel/tiny", "--set", "seed=" + "9" * 30), "seed must fit in 64 bits")
