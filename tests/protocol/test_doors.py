"""What ``diptych.load(...)`` and its engine take: every way to hand over a picture, a prompt, a size, a seed."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import diptych
from diptych.generation.engine import Engine
from diptych.models.sizes import parse_size
from diptych.parts.images import data_uri, png_bytes
from tests.support import tiny


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny.shake(tiny.model("bagel")), "random")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    image = tiny.picture(3)
    file = tmp_path_factory.mktemp("doors") / "a.png"
    file.write_bytes(png_bytes(image))
    pixels = np.asarray(image)
    return {
        "PIL": image,
        "path": file,
        "str": str(file),
        "bytes": file.read_bytes(),
        "numpy": pixels,
        "floats": (pixels / 255).astype(np.float32),
        "tensor": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        "data URI": data_uri(image),
    }


def test_every_kind_of_picture_gives_one_answer(engine, pictures):
    answers = {kind: engine.ask(p, "what is it?", max_new_tokens=6).ids for kind, p in pictures.items()}
    answers["file"] = engine.ask(io.BytesIO(pictures["bytes"]), "what is it?", max_new_tokens=6).ids
    assert len(set(answers.values())) == 1, answers


def test_every_kind_of_picture_is_edited_and_shown_in_a_chat(engine, pictures):
    edits = [engine.edit(p, "a star", num_inference_steps=1).images[0].tobytes() for p in pictures.values()]
    edits.append(engine.edit(io.BytesIO(pictures["bytes"]), "a star", num_inference_steps=1).images[0].tobytes())
    assert len(set(edits)) == 1
    two = engine.edit([pictures["numpy"], pictures["path"]], "a star", num_inference_steps=1)
    assert len(two.images) == 1
    parts = [{"type": "image", "image": p} for p in pictures.values()]
    parts += [{"type": "image_url", "image_url": {"url": pictures["data URI"]}}]
    ask = {"type": "text", "text": "what is it?"}
    said = {engine.chat([{"role": "user", "content": [p, ask]}], max_new_tokens=4, pictures=0).ids for p in parts}
    assert len(said) == 1


@pytest.mark.parametrize(
    "wrong, told",
    [
        ("nowhere.png", "nowhere.png"),
        (b"no picture", "picture"),
        (np.zeros((4, 4, 7), np.uint8), "array|shape|4, 4, 7"),
        (7, "int"),
    ],
)
def test_what_is_no_picture_is_named(engine, wrong, told):
    for call in (lambda: engine.ask(wrong, "?"), lambda: engine.edit(wrong, "red")):
        with pytest.raises(ValueError, match=told):
            call()


def test_a_list_of_prompts_is_drawn_as_each_alone(engine):
    prompts = ["a star", "two hats", "a red circle"]
    together = engine.generate(prompts, n=2, seed=5, num_inference_steps=2)
    assert [p.prompt for p in together] == prompts
    for prompt, pictures in zip(prompts, together, strict=True):
        alone = engine.generate(prompt, n=2, seed=5, num_inference_steps=2)
        assert [i.tobytes() for i in pictures.images] == [i.tobytes() for i in alone.images]
    assert engine.generate([]) == []


def test_sizes_as_people_write_them(engine):
    for size in (64, "64", "64x64", "64X64", (64, 64), [64, 64]):
        assert parse_size(size) == (64, 64)
    assert parse_size("64x48") == (64, 48) and engine.generate("a", size="64x48", num_inference_steps=1).images[0].size
    for wrong in ("large", "64x", (64,) * 3, "", ()):
        with pytest.raises(ValueError, match="size must be WIDTHxHEIGHT, one number or"):
            engine.generate("a star", size=wrong)
    with pytest.raises(ValueError, match="size must be multiples of 16 from 16 to 128"):
        engine.generate("a star", size=4096)


def test_a_seed_of_none_is_random_and_told(engine):
    first, second = (engine.generate("a star", seed=None, num_inference_steps=1) for _ in range(2))
    assert first.seed != second.seed
    again = engine.generate("a star", seed=first.seed, num_inference_steps=1)
    assert again.images[0].tobytes() == first.images[0].tobytes()
    for wrong in (-1, 1.5, "7", True):
        with pytest.raises(ValueError, match="seed must be a whole number of at least 0, or None"):
            engine.generate("a star", seed=wrong)


@pytest.mark.parametrize("wrong", [None, 7, ["a", 7], "\ud800"])
def test_what_is_no_text_is_named(engine, wrong):
    with pytest.raises((ValueError, TypeError), match="prompt (must be a text|cannot be encoded)|not iterable"):
        engine.generate(wrong)
    if not isinstance(wrong, list):
        with pytest.raises(ValueError, match="question (must be a text|cannot be encoded)"):
            engine.ask(tiny.picture(0), wrong)


def test_a_chat_of_one_string_is_the_user_s_message(engine):
    message = {"role": "user", "content": "hello"}
    assert engine.chat("hello", pictures=0).ids == engine.chat([message], pictures=0).ids
    with pytest.raises(ValueError, match=r"messages\[1\].role is 'robot'"):
        engine.chat([message, {"role": "robot", "content": "x"}])


def test_devices_and_dtypes_as_torch_has_them(tiny_model):
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16"):
        engine = diptych.load(tiny_model, torch.device("cpu"), dtype)
        assert engine.model.latent_out.weight.dtype == torch.bfloat16
    assert engine.device == torch.device("cpu")
    for wrong in ("int4", torch.int8, "float64"):
        with pytest.raises(ValueError, match="unknown dtype '.*'; choose from fp32, bf16, fp16"):
            diptych.load(tiny_model, dtype=wrong)
    told = repr(engine)
    assert str(tiny_model) in told and "32x32 pixels, bfloat16 on cpu" in told and "M parameters" in told
