"""Cheers's published folders: loaded strictly, kept exact, written back; and parts that others publish alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diptych
from diptych import cli
from diptych.models import configs, store, table
from diptych.models.cheers import Config
from diptych.models.published import part_weights
from diptych.models.published.cheers import published_config
from diptych.parts.autoencoder import Autoencoder, AutoencoderConfig, LatentDecoder
from diptych.parts.decoder import DecoderConfig
from diptych.parts.vision import VisionConfig, VisionEncoder
from tests.support import tiny
from tests.support.published import qwen2


def config() -> Config:
    """Sizes that a published folder can say."""
    return Config(
        DecoderConfig(320, 32, 48, 2, 4, 2, tie_word_embeddings=True),
        VisionConfig(24, 32, 1, 4, patch_size=16, image_size=32, pooling=True),
        AutoencoderConfig(
            channels=32, multipliers=(1, 1, 1, 1), blocks=1, latent_channels=8, statistics=True, fold=2, quant=True
        ),
        head_layers=(2, 1),
        size=(32, 32),
        published_quirks=("repeated_positions",),
    )


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = store.create("cheers", config(), qwen2())
    model.initialise(0)
    return tiny.shake(model).eval()


def write(made, folder: Path, dtype: torch.dtype) -> Path:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.state_dict().items()}
    store.save(made, folder, state, published=True)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(made, tmp_path, dtype):
    folder = write(made, tmp_path / "m", dtype)
    stored = load_file(folder / "model.safetensors")
    kinds = {t.dtype for t in stored.values()}
    assert kinds == ({torch.bfloat16} if dtype == torch.bfloat16 else {torch.float32, torch.int64})
    assert torch.equal(stored["lm_head.weight"], stored["model.language_model.embed_tokens.weight"])
    loaded = store.load(folder)
    assert loaded.config == made.config and loaded.family == "cheers"
    exact = {n: t.dtype for n, t in loaded.state_dict().items() if ".bn." in n}
    assert set(exact.values()) == {torch.float32, torch.int64} and len(exact) == 6
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    store.save(loaded, tmp_path / "back", published=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == stored.keys()
    assert all(back[n].dtype == stored[n].dtype and torch.equal(back[n], stored[n]) for n in stored)
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_an_export_names_what_transformers_needs_besides(made, tmp_path, capsys):
    """Its one file is in one dtype, as published."""
    folder = write(made, tmp_path / "m", torch.float32)
    words = ["export", str(folder), str(tmp_path / "out"), "--format", "published", "--dtype", "bf16"]
    assert cli.main(words) == 0
    assert "for transformers with trust_remote_code, add the .py files" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_published_weights_run_as_the_published_code_runs_them(made, tmp_path):
    """By a preset of load, and without its oddities otherwise."""
    folder = write(made, tmp_path / "m", torch.float32)
    quirky, plain = diptych.load(folder, preset="published"), diptych.load(folder)
    assert set(quirky.model.config.published_quirks) > set(plain.model.config.published_quirks)
    a, b = (engine.generate("two stars", num_inference_steps=3).images[0].tobytes() for engine in (quirky, plain))
    assert a != b
    with pytest.raises(ValueError, match="preset 'published' changes the model's config: give it when the model is"):
        plain.generate("two stars", preset="published")


def test_it_reads_and_draws(made, tmp_path):
    engine = diptych.load(write(made, tmp_path / "m", torch.bfloat16), "cpu")
    image = engine.generate("two stars", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    assert engine.edit(tiny.picture(1), "red", num_inference_steps=3).images[0].size == (32, 32)
    assert engine.ask(tiny.picture(0), "how many?", max_new_tokens=2).parameters["max_new_tokens"] == 2


def test_what_the_stored_config_leaves_out_is_filled_in():
    """The released config.json names neither depth, rope nor the autoencoder's sizes."""
    text = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "max_window_layers": 21,
        "sliding_window": 32768,
        "model_type": "umm",
    }
    vit = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 512,
        "patch_size": 16,
        "num_patches": 1024,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0,
    }
    row = {
        "model_type": "umm",
        "vae_encoder_config": {"resolution": 512},
        "vae_decoder_config": {"resolution": 512},
        "vision_representation_config": vit,
        "text_config": text,
    }
    assert published_config({"config.json": row}, {"model": {}}) == table.config("cheers/1.5b")


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("vae_decoder_config", {"ch": 64}, "vae_encoder_config and vae_decoder_config differ in ch"),
        ("vision_representation_config", {"hidden_act": "relu"}, "hidden_act must be 'gelu_pytorch_tanh', not 'relu'"),
        ("text_config", {"rope_scaling": {"type": "yarn"}}, "does not support rope_scaling"),
        ("text_config", {"num_hidden_layers": 3}, "missing model.language_model.layers.2"),
    ],
)
def test_bad_settings_are_named(made, tmp_path, name, change, told):
    folder = write(made, tmp_path / "m", torch.float32)
    row = json.loads((folder / "config.json").read_text())
    row[name] |= change
    (folder / "config.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=told):
        store.load(folder)


def test_wrong_tensors_and_an_untied_head_are_named(made, tmp_path):
    folder = write(made, tmp_path / "m", torch.float32)
    state = load_file(folder / "model.safetensors")
    del state["model.hi_gate.layer_norm.bias"]
    save_file(state | {"stray": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        store.load(folder)
    assert "missing model.hi_gate.layer_norm.bias (ours: gate.layer_norm.bias)" in str(error.value)
    assert "unknown stray" in str(error.value)
    folder = write(made, tmp_path / "n", torch.float32)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from model.language_model.embed_tokens.weight"):
        store.load(folder)


def test_what_the_layout_cannot_say(made, tmp_path):
    other = store.create("cheers", replace(config(), published_quirks=()), qwen2())
    with pytest.raises(ValueError, match="repeats positions in the fine stage"):
        store.save(other, tmp_path / "x", published=True)
    with pytest.raises(ValueError, match="the published format of cheers cannot represent"):
        store.save(store.create("cheers", replace(config(), detail="none"), qwen2()), tmp_path / "y", published=True)


def test_another_familys_config_is_not_cheers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="as a published cheers folder it lacks config.json of its own"):
        store.load(tmp_path)


# ---- parts that others publish alone ----------------------------------------------------------------------------


def test_a_vision_encoder_of_transformers(tmp_path):
    """SigLIP with its pooling head, beside a text encoder."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "patch_size": 16,
        "image_size": 64,
    }
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "alone")
    ours = VisionEncoder(VisionConfig(**sizes, pooling=True)).eval()
    part_weights.read_vision_encoder(ours, tmp_path / "alone")
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        features = ours(image)
        assert torch.allclose(features, theirs(image).last_hidden_state, atol=1e-5)
        assert torch.allclose(ours.head(features), theirs(image).pooler_output, atol=1e-5)
    row = json.loads((tmp_path / "alone" / "config.json").read_text())
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": row}))
    state = {f"vision_model.{n}": t for n, t in load_file(tmp_path / "alone" / "model.safetensors").items()}
    other = {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}
    save_file(state | other, tmp_path / "both" / "model.safetensors")
    again = VisionEncoder(VisionConfig(**sizes))
    part_weights.read_vision_encoder(again, tmp_path / "both")
    assert torch.equal(again.patch_embedding.weight, ours.patch_embedding.weight)
    with pytest.raises(ValueError, match="patch_size is 16 there, 8 here"):
        part_weights.read_vision_encoder(VisionEncoder(VisionConfig(**sizes | {"patch_size": 8})), tmp_path / "alone")


def test_an_autoencoder_of_flux_2(tmp_path):
    """The file fills a whole autoencoder and, without its encoder, the pixel decoder; statistics may be bfloat16."""
    c = config().autoencoder
    torch.manual_seed(0)
    theirs = Autoencoder(c)
    theirs.bn.running_mean += 0.5
    state = {n: t.to(torch.bfloat16) for n, t in theirs.state_dict().items()}
    save_file(state, tmp_path / "ae.safetensors")
    whole, half = Autoencoder(c), LatentDecoder(c)
    part_weights.read_autoencoder(whole, tmp_path)
    part_weights.read_autoencoder(half, tmp_path / "ae.safetensors")
    assert torch.equal(whole.decoder.conv_in.weight, half.decoder.conv_in.weight)
    assert torch.equal(half.bn.running_mean, torch.full((32,), 0.5))
    with pytest.raises(ValueError, match="neither a safetensors file nor a folder with ae.safetensors"):
        part_weights.read_autoencoder(half, tmp_path / "nothing")


def test_training_begins_from_published_parts(made, tmp_path):
    """``transformers:`` sources of a recipe fill the decoder, the vision encoder and both halves of the autoencoder."""
    from diptych.models.published.transformers import write_transformers
    from diptych.recipes import cheers as recipes
    from diptych.training.build import build

    (tmp_path / "hf").mkdir()
    write_transformers(made, tmp_path / "hf", None)
    save_file({n: t for n, t in made.autoencoder.state_dict().items()}, tmp_path / "ae.safetensors")
    base = recipes.b1_5()
    assert set(base.init) == {"decoder", "vision", "autoencoder", "pixel_decoder"} and len(base.stages) == 4
    init = {
        "decoder": f"transformers:{tmp_path / 'hf' / 'language'}",
        "vision": f"transformers:{tmp_path / 'hf' / 'vision'}",
        "autoencoder": f"transformers:{tmp_path / 'ae.safetensors'}",
        "pixel_decoder": f"transformers:{tmp_path / 'ae.safetensors'}",
    }
    row = configs.config_to_json("cheers", replace(config(), published_quirks=()))
    begun = build(replace(base, model=row, init=init))
    for mine, other in (
        (begun.decoder, made.decoder),
        (begun.vision, made.vision),
        (begun.autoencoder, made.autoencoder),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values()))
    assert torch.equal(begun.pixel_decoder.decoder.conv_in.weight, made.autoencoder.decoder.conv_in.weight)
