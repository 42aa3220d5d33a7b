"""What a model returns: a sequence of pictures that shows itself, is saved with its parameters, and is read again."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

import diptych
from diptych import cli
from diptych.data.written import read_parameters
from diptych.generation.events import Picture


@pytest.fixture(scope="module")
def engine(tiny_model):
    return diptych.load(tiny_model)


@pytest.fixture(scope="module")
def pictures(engine):
    return engine.generate("a <red> circle ☆", n=3, size=32, seed=5, num_inference_steps=2)


def test_pictures_are_a_sequence_with_a_seed_each(pictures):
    assert len(pictures) == 3 and [p.seed for p in pictures] == [5, 6, 7]
    assert pictures[-1].image is pictures.images[2] and [p.seed for p in pictures[1:]] == [6, 7]
    with pytest.raises(IndexError):
        pictures[3]


def test_a_notebook_shows_every_picture_and_escapes_the_prompt(pictures):
    shown = pictures._repr_html_()
    assert shown.count('<img src="data:image/png;base64,') == 3 and "seed 7" in shown
    assert "a &lt;red&gt; circle ☆" in shown and "<red>" not in shown + pictures[0]._repr_html_()
    sheet = pictures.grid(columns=2)
    assert sheet.height > sheet.width * 0.9 and pictures.grid(columns=3).width > sheet.width


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_saved_picture_can_be_drawn_again_from_its_file(engine, pictures, suffix, tmp_path, capsys):
    files = pictures.save(tmp_path / f"x.{suffix}")
    assert [f.name for f in files] == [f"x-{i}.{suffix}" for i in range(3)]
    row = read_parameters(files[1])
    assert row["prompt"] == pictures.prompt and row["seed"] == 6 and row["model"] == engine.name
    assert cli.main(["show", str(files[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == row
    known = vars(engine.model.settings).keys()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in known}
    again = engine.generate(row["prompt"], size=row["size"], seed=row["seed"], **settings)
    assert np.array_equal(np.asarray(again[0].image), np.asarray(pictures[1].image))
    assert pictures[0].save(tmp_path / f"one.{suffix}").is_file()


def test_a_picture_of_others_has_no_parameters(tmp_path, capsys):
    file = tmp_path / "photo.png"
    PIL.Image.new("RGB", (8, 8)).save(file)
    (tmp_path / "text.png").write_text("no picture")
    for path, reason in (
        (file, "has no parameters"),
        (tmp_path / "text.png", "is not a picture"),
        ("x.png", "no file"),
    ):
        assert cli.main(["show", str(path)]) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="was not written by diptych"):
        Picture(PIL.Image.new("RGB", (8, 8)), "x", 0, {}).save(file)


def test_a_generated_picture_is_a_picture_argument(engine, pictures):
    answer = engine.ask(pictures[0], "how many <circles>?", max_new_tokens=2)
    assert str(answer) == answer.text and answer.sources[0].tobytes() == pictures.images[0].tobytes()
    assert answer._repr_html_().count("<img") == 1
    few = {"num_inference_steps": 2, "size": 32}
    both, first = engine.edit(pictures, "make it blue", **few), engine.edit(pictures.images, "make it blue", **few)
    assert both.images[0].tobytes() == first.images[0].tobytes()


@pytest.mark.parametrize(
    "settings, hint",
    [
        ({"num_inference_step": 3}, "did you mean 'num_inference_steps'?"),
        ({"height": 64}, r"use size=\(width, height\)"),
        ({"generator": None}, "use seed"),
    ],
)
def test_an_unknown_setting_names_the_right_one(engine, settings, hint):
    with pytest.raises(ValueError, match=hint):
        engine.generate("x", **settings)


def test_a_mask_keeps_the_source_and_every_step_is_reported(engine):
    source = PIL.Image.effect_noise((32, 32), 80).convert("RGB")
    mask = PIL.Image.new("L", source.size)
    mask.paste(255, (0, 0, 16, 32))
    few, steps = {"num_inference_steps": 2, "size": 32, "n": 2}, []
    free = engine.edit(source, "make it blue", **few)
    kept = engine.edit(source, "make it blue", mask=mask, on_step=lambda *done: steps.append(done), **few)
    for a, b in zip(free.images, kept.images, strict=True):
        left, right = np.split(np.asarray(b), 2, axis=1)
        assert np.array_equal(left, np.asarray(a)[:, :16]) and np.array_equal(right, np.asarray(source)[:, 16:])
    assert steps == [(2, 4), (4, 4)]
    with pytest.raises(ValueError, match="mask is 8x8 and the first picture 32x32"):
        engine.edit(source, "x", mask=mask.resize((8, 8)), **few)
    with pytest.raises(ValueError, match="picture 'nowhere.png' does not exist"):
        engine.edit(source, "x", mask="nowhere.png", **few)
    for same in (np.asarray(mask), np.asarray(mask) > 0, torch.from_numpy(np.array(mask))):
        assert engine.edit(source, "make it blue", mask=same, **few).images[0].tobytes() == kept.images[0].tobytes()
