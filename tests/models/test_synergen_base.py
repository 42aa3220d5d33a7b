"""A SynerGen-VL on a base language model: Qwen2, Llama and InternLM2 folders in, the words' path out again."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diptych import cli
from diptych.data.catalog import sources
from diptych.models import configs, store, table
from diptych.models.published.parts import decoder_config
from diptych.parts.autoencoder import AutoencoderConfig, Emu3, build_autoencoder
from diptych.parts.tokenizer import Tokenizer
from diptych.recipes.run import precompute
from diptych.training.build import build
from tests.parts.test_decoder_parity import to_internlm2
from tests.protocol.test_generation import read
from tests.support import tiny
from tests.training.test_loop import losses, train

SIZES = {
    "vocab_size": 1030,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
KINDS = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "internlm2": ("Llama", {"rope_theta": 1e6}),
}


def language_model(kind: str, folder):
    """A random model of transformers, saved with a tokenizer; InternLM2 is a Llama under InternLM2's names."""
    family, more = KINDS[kind]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**SIZES | more, attn_implementation="eager")
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    if kind == "internlm2":
        row = SIZES | {"model_type": "internlm2", "bias": False, "rope_theta": 1e6}
        row["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
        (folder / "config.json").write_text(json.dumps(row))
        save_file(to_internlm2(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    Tokenizer.tiny().save(folder)
    return theirs


def recipe(folder):
    """A tiny run whose decoder starts from a language model."""
    hf = json.loads((folder / "config.json").read_text())
    base = tiny.synergen()
    config = replace(base, decoder=replace(decoder_config(hf), routes=2, routed=("mlp",)))
    row = configs.config_to_json("synergen", config)
    return replace(tiny.recipe(), model=row, init={"decoder": f"transformers:{folder}"})


def words(model) -> tuple[torch.Tensor, list[int]]:
    laid = model.lay_out(tiny.say())
    return read(model, laid)[0].logits, [i for s in laid.segments for i in s.ids]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers_and_come_back(kind, tmp_path):
    theirs = language_model(kind, tmp_path / "base")
    model = build(recipe(tmp_path / "base")).eval()
    scores, ids = words(model)
    expected = theirs(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    for layer in model.decoder.layers:  # every vision expert is a copy, not an alias
        for name, weight in layer.mlp[0].named_parameters():
            other = layer.mlp[1].get_parameter(name)
            assert torch.equal(weight, other) and weight.data_ptr() != other.data_ptr()
    for name, p in model.named_parameters():  # nothing that is not the language model's has a say
        if not name.startswith("decoder.") or ".mlp.1." in name:
            p.add_(0.3)
    assert torch.equal(words(model)[0], scores)

    store.save(model, tmp_path / "ours")
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "words"), "--format", "hf"]
    assert cli.main(command) == 0
    written = tmp_path / "words" / "language"
    again = transformers.AutoModelForCausalLM.from_pretrained(written, attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(torch.tensor([ids])).logits[0, -1], expected, atol=1e-4, rtol=1e-4)
    assert len(Tokenizer.load(tmp_path / "words/language")) == len(model.tokenizer)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_base_that_does_not_fit_is_named(tmp_path):
    language_model("llama", tmp_path / "base")
    good = recipe(tmp_path / "base")
    row = json.loads(json.dumps(good.model))
    row["decoder"] |= {"rope_theta": 5e5, "num_hidden_layers": 2}
    with pytest.raises(
        ValueError, match=r"num_hidden_layers is 3 there, 2 here\n  rope_theta is 10000.0 there, 500000"
    ):
        build(replace(good, model=row))
    with pytest.raises(ValueError, match="module 'unfold' of synergen is no decoder"):
        build(replace(good, init={"unfold": f"transformers:{tmp_path / 'base'}"}))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing model.layers.1.mlp.up_proj.weight"):
        build(good)


def test_a_folder_without_a_language_model_is_named(tmp_path):
    Tokenizer.tiny().save(tmp_path)
    with pytest.raises(ValueError, match="is no language model of transformers: it lacks config.json or model"):
        build(replace(tiny.recipe(), init={"decoder": f"transformers:{tmp_path}"}))


# ---- picture tokenizers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emu3(tmp_path_factory):
    """A small random Emu3 tokenizer, saved."""
    torch.manual_seed(3)
    config = transformers.Emu3VQVAEConfig(
        codebook_size=64, base_channels=32, channel_multiplier=[1, 2, 2, 1], num_res_blocks=1, hidden_size=32
    )
    folder = tmp_path_factory.mktemp("emu3") / "vq"
    theirs = transformers.Emu3VQVAE(config).eval()
    theirs.save_pretrained(folder)
    return theirs, folder


@torch.no_grad()
def test_emu3_tokenizer_from_transformers(emu3):
    theirs, folder = emu3
    ours = build_autoencoder(AutoencoderConfig("emu3", folder=str(folder)))
    assert isinstance(ours, Emu3) and not list(ours.parameters()) and not ours.state_dict()
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = ours.encode(images)
    assert codes.shape == (2, 8, 6) and 0 <= int(codes.min()) and int(codes.max()) < 64
    for image, own in zip(images, codes, strict=True):
        [expected] = theirs.encode(image[None], torch.tensor([[64, 48]])).image_tokens
        assert torch.equal(own, expected)
    pictures = ours.decode(codes)
    assert pictures.shape == images.shape
    torch.testing.assert_close(pictures, theirs.decode(codes).view_as(pictures))
    with pytest.raises(ValueError, match="code 30000 is none of the 64 of"):
        ours.decode(codes.clamp(min=30000))
    assert AutoencoderConfig("emu3").codebook == 32768 and AutoencoderConfig("emu3").downsample == 8


def original_names(state):
    """The names and shapes of the first release of Emu3's tokenizer."""
    out = {}
    for name, tensor in state.items():
        name = name.replace(".down_block.", ".").replace(".up_block.", ".").replace(".middle_block.", ".mid.")
        name = name.replace(".attn_norm.", ".attn_1.norm.")
        name = re.sub(r"attn_norms\.(\d+)\.", r"attn.\1.norm.", name)
        name = re.sub(r"\.(q|k|v)_proj\.", r".\1.", name).replace(".out_proj.", ".proj_out.")
        linear = re.search(r"\.(q|k|v|proj_out)\.weight$", name)
        out[name] = tensor[:, :, None, None].contiguous() if linear else tensor
    return out


@pytest.mark.parametrize("layout", ["whole model", "original"])
@torch.no_grad()
def test_emu3_tokenizer_in_the_layouts_that_are_published(emu3, layout, tmp_path):
    """Inside a model of transformers, in shards beside other weights, and as BAAI/Emu3-VisionTokenizer names it."""
    theirs, folder = emu3
    state = theirs.state_dict()
    if layout == "whole model":
        row = {"model_type": "emu3", "vq_config": theirs.config.to_dict(), "text_config": {}}
        parts = [{f"model.vqmodel.{n}": t for n, t in list(state.items())[k::2]} for k in (0, 1)]
        parts[0] |= {"model.text_model.norm.weight": torch.ones(3)}
        for k, part in enumerate(parts):
            save_file(part, tmp_path / f"model-0000{k + 1}-of-00002.safetensors")
    else:
        c = theirs.config
        row = {"model_type": "Emu3VisionVQ", "ch": c.base_channels, "ch_mult": c.channel_multiplier}
        row |= {"double_z": c.double_latent, "z_channels": c.latent_channels, "dropout": 0.0}
        names = ("codebook_size", "embed_dim", "in_channels", "out_channels", "temporal_downsample_factor")
        row |= {n: getattr(c, n) for n in (*names, "num_res_blocks", "attn_resolutions")}
        original = original_names(state)
        assert "encoder.mid.attn_1.q.weight" in original and "decoder.up.3.block.0.norm1.norm_layer.weight" in original
        save_file(original, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(row))
    read_back = build_autoencoder(AutoencoderConfig("emu3", folder=str(tmp_path)))
    ours = build_autoencoder(AutoencoderConfig("emu3", folder=str(folder)))
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = ours.encode(images)
    assert torch.equal(read_back.encode(images), codes)
    assert torch.equal(read_back.decode(codes), ours.decode(codes))
    (tmp_path / "config.json").write_text(
        json.dumps(
            row | {"vq_config": row.get("vq_config", {}) | {"num_res_blocks": 3}}
            if layout == "whole model"
            else row | {"num_res_blocks": 3}
        )
    )
    with pytest.raises(ValueError, match="is not a transformers Emu3VQVAE as its config.json says: it lacks"):
        build_autoencoder(AutoencoderConfig("emu3", folder=str(tmp_path))).encode(images)


def test_an_emu3_folder_that_does_not_fit_is_refused(emu3, tmp_path):
    def reads(folder):
        build_autoencoder(AutoencoderConfig("emu3", folder=str(folder))).encode(torch.zeros(1, 3, 8, 8))

    shutil.copytree(emu3[1], tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "quantize.embedding.weight"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="it lacks quantize.embedding.weight"):
        reads(tmp_path / "part")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="part cannot be read as a transformers Emu3VQVAE"):
        reads(tmp_path / "part")
    coarse = transformers.Emu3VQVAEConfig(
        codebook_size=64,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        hidden_size=32,
        attn_resolutions=[],
    )
    transformers.Emu3VQVAE(coarse).save_pretrained(tmp_path / "coarse")
    with pytest.raises(ValueError, match="has 64 codes of 2 x 2 pixels"):
        reads(tmp_path / "coarse")


def test_a_digest_of_emu3_is_that_of_its_weights(emu3, tmp_path):
    def digest(folder):
        config = replace(table.config("synergen/2b"), autoencoder=AutoencoderConfig("emu3", folder=folder))
        return store.create("synergen", config, tiny.model("synergen").tokenizer, "meta").digest("autoencoder")

    shutil.copytree(emu3[1], tmp_path / "copy")
    same = digest(str(emu3[1]))
    assert same == digest(str(tmp_path / "copy")) and digest(None) == ""
    transformers.Emu3VQVAE(emu3[0].config).save_pretrained(tmp_path / "copy")
    assert digest(str(tmp_path / "copy")) != same


def test_emu3_tokenizer_is_asked_for_only_when_pictures_come(tmp_path):
    ours = build_autoencoder(AutoencoderConfig("emu3", folder=str(tmp_path)))
    with pytest.raises(ValueError, match="autoencoder.folder must name a transformers Emu3VQVAE folder, not"):
        ours.encode(torch.zeros(1, 3, 8, 8))


@torch.no_grad()
def test_quantised_codes_are_digits_and_back():
    config = AutoencoderConfig("vq", 4, (1, 1), 1, 3, 2, posterior=False, levels=(5, 3, 4))
    assert (config.codebook, config.downsample) == (60, 2)
    torch.manual_seed(0)
    ours = build_autoencoder(config).eval()
    images = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    digits, codes = ours.digits(images), ours.encode(images)
    assert codes.shape == (3, 4, 6) and codes.dtype == torch.long
    assert torch.equal(codes, (digits[:, 0] + 5 * digits[:, 1] + 15 * digits[:, 2]).long())
    torch.testing.assert_close(ours.decode(codes), ours.picture(digits))
    every = torch.arange(60).view(1, 6, 10)
    levels = [every // {0: 1, 1: 5, 2: 15}[i] % n for i, n in enumerate(config.levels)]
    assert len(torch.stack(levels, -1).flatten(0, 2).unique(dim=0)) == 60
    with pytest.raises(ValueError, match=r"multiples of 2, not \(7, 8\)"):
        ours.encode(torch.zeros(1, 3, 7, 8))


def test_quantised_gradients_pass_the_rounding():
    config = AutoencoderConfig("vq", 4, (1, 1), 1, 2, 2, posterior=False, levels=(5, 5))
    ours = build_autoencoder(config)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    (ours.picture(ours.digits(images)) - images).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.encoder.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    "bad, told",
    [
        ({"kind": "vq"}, "has levels .* if it is a vq"),
        ({"levels": (4, 4)}, "has levels .* if it is a vq"),
        ({"kind": "vq", "levels": (4, 1), "latent_channels": 2, "posterior": False}, "2 or more"),
        ({"kind": "vq", "levels": (4, 4), "latent_channels": 3, "posterior": False}, "one level a latent channel"),
    ],
)
def test_bad_levels_are_named(bad, told):
    with pytest.raises(ValueError, match=told):
        AutoencoderConfig(**bad)


def test_codes_are_made_once_and_training_on_them_is_training_on_pictures(tmp_path):
    sets = {"shapes/draw#8": 0.5, "shapes/ask#6": 0.3, "shapes/edit#4": 0.2}
    plain = tiny.recipe(steps=2, data=sets, train={"decoder": 1e-3, "vision": 1e-3, "projector": 1e-3, "head": 1e-3})
    plain = replace(plain, model=configs.config_to_json("synergen", tiny.synergen()))
    told = precompute(plain, tmp_path / "codes", device="cpu", dtype="bf16", shard=4)
    assert [t["pictures"] for t in told.values()] == [8, 6, 8]  # every picture, read or drawn, goes through the codes
    image = next(sources(["shapes/ask#6"], size=32, encoded=tmp_path / "codes")["shapes/ask#6"][1].images())
    assert image.image is None and image.encoded["autoencoder"].dtype == torch.int16
    read = replace(plain, encoded=str(tmp_path / "codes"))
    assert losses(train(plain, tmp_path / "a")) == losses(train(read, tmp_path / "b"))
