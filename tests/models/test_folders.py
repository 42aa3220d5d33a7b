"""Published folders: found, loaded tensor by tensor, strict both ways, laid over a base, and written back unchanged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diptych
from diptych import cli
from diptych.core.sample import Sample, user
from diptych.models import store, table
from diptych.models.published import folder as folder_module
from diptych.models.published import part_weights
from diptych.models.published.folder import Tensors
from diptych.models.published.key_map import export
from diptych.models.published.parts import autoencoder_kl
from diptych.parts.tokenizer import Tokenizer
from tests.support import published
from tests.support.tiny import picture

FAMILIES = list(published.CONFIGS)
QWEN2 = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(family, tmp_path_factory) -> Path:
    return published.write(family, tmp_path_factory.mktemp("published") / "m")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "m"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.name}:{k}": v for f in sorted(folder.rglob("*.safetensors")) for k, v in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not None}))


def edit(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def shard(folder: Path, stem: str, n: int = 3) -> Path:
    """Splits a file into shards with an index."""
    whole = folder / f"{stem}.safetensors"
    state = load_file(whole)
    whole.unlink()
    where = {}
    for i in range(n):
        name = f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors"
        part = {k: v for j, (k, v) in enumerate(sorted(state.items())) if j % n == i}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


# ---- loading ----------------------------------------------------------------------------------------------------


def test_a_published_folder_loads(family, original):
    made, loaded = published.model(family), store.load(original)
    assert same(dict(made.state_dict()), dict(loaded.state_dict()))
    assert loaded.config == made.config and loaded.family == family and not loaded.training
    assert loaded.tokenizer.encode("two blue stars <think>") == made.tokenizer.encode("two blue stars <think>")
    assert all(p.requires_grad for p in loaded.parameters())


def test_it_reads_and_draws(original):
    engine = diptych.load(original, device="cpu")
    image = engine.generate("two stars", size=(96, 64), num_inference_steps=2).images[0]
    assert image.size == (96, 64)
    assert engine.ask(picture(0), "how many?", max_new_tokens=2).parameters["max_new_tokens"] == 2


def test_qwen2_files_do_for_a_tokenizer(original, folder):
    (folder / "tokenizer.json").unlink()
    a, b = store.load(original).tokenizer, store.load(folder).tokenizer
    text = "how many <think> stars<|im_end|> 漢"
    assert a.encode(text) == b.encode(text) and [a.id(m) for m in published.MARKERS] == [
        b.id(m) for m in published.MARKERS
    ]
    assert b.decode(b.encode("<think> x")) == "<think> x"  # an added token that is not special is text


def test_shards(family, original, folder):
    shard(folder, "ema")
    assert same(dict(store.load(original).state_dict()), dict(store.load(folder).state_dict()))
    (folder / "ema.safetensors").touch()
    with pytest.raises(ValueError, match="holds both ema.safetensors and ema.safetensors.index.json"):
        store.load(folder)


def test_tables_that_are_not_stored_are_computed(original, folder):
    edit(folder / "ema.safetensors", lambda s: [s.pop(f"{n}_pos_embed.pos_embed") for n in ("latent", "vit")])
    loaded, whole = store.load(folder), store.load(original)
    assert loaded.config.latent_side == 64 and loaded.config.vision_side is None
    assert torch.equal(loaded.vision_positions, whole.vision_positions)
    row = whole.latent_positions.unflatten(0, (16, 16))
    assert torch.equal(loaded.latent_positions.unflatten(0, (64, 64))[:16, :16], row)


def test_what_the_json_says_otherwise_than_the_weights_is_overridden(family, original, folder):
    change(folder / "llm_config.json", qk_norm=None, layer_module=None, tie_word_embeddings=True, model_type=None)
    change(folder / "vit_config.json", rope=True)
    assert store.load(folder).config == store.load(original).config
    layers = store.load(original).config.vision.num_hidden_layers
    change(folder / "vit_config.json", num_hidden_layers=layers)  # a file that already counts the layers in use
    assert store.load(folder).config == store.load(original).config


def test_position_tables_of_other_sides(folder):
    def narrow(state):
        state["vit_pos_embed.pos_embed"] = state["vit_pos_embed.pos_embed"][:49].clone()

    edit(folder / "ema.safetensors", narrow)
    assert store.load(folder).config.vision_side == 7

    edit(folder / "ema.safetensors", lambda s: s.update({"vit_pos_embed.pos_embed": torch.zeros(50, 32)}))
    with pytest.raises(ValueError, match="vit_pos_embed.pos_embed has 50 rows, which is not a square table"):
        store.load(folder)


def test_the_published_size_is_read_as_our_config():
    """BAGEL-7B-MoT on the meta device: JSON files and shapes give the named Config back."""
    config = table.config("bagel/7b-mot")
    layout, state = table.published_format("bagel"), store.create("bagel", config, device="meta").state_dict()
    mine = {
        stem: {n: t for n, t in state.items() if n.startswith("autoencoder.") == (stem == "ae")}
        for stem in ("ema", "ae")
    }
    theirs = {stem: export(rules(config), mine[stem]) for stem, rules in layout.weights.items()}
    rows = layout.describe(config)
    assert set(rows) == {"llm_config.json", "vit_config.json"} and rows["vit_config.json"]["num_hidden_layers"] == 27
    assert layout.config(rows, theirs) == config


# ---- a part alone, and the way back ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ae.safetensors", "vae folder"])
def test_an_autoencoder_comes_from_its_file_alone(layout, tmp_path):
    """FLUX's file, or a vae/ folder of diffusers, without the model around it."""
    made = published.model("bagel").autoencoder
    c, state = made.config, made.state_dict()
    if layout == "ae.safetensors":
        save_file(state, tmp_path / "ae.safetensors")
    else:
        kl = {n.removeprefix("autoencoder."): t for n, t in state.items()}
        save_file(export(autoencoder_kl(len(c.multipliers)), kl), tmp_path / "diffusion_pytorch_model.safetensors")
        row = {"_class_name": "AutoencoderKL", "latent_channels": c.latent_channels, "layers_per_block": c.blocks}
        row |= {"block_out_channels": [c.channels * m for m in c.multipliers], "norm_num_groups": c.groups}
        row |= {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": c.scale}
        (tmp_path / "config.json").write_text(json.dumps(row | {"shift_factor": c.shift}))
    other = published.model("bagel", seed=5).autoencoder
    part_weights.read_autoencoder(other, tmp_path)
    assert same(dict(other.state_dict()), dict(state))
    if layout == "vae folder":
        change(tmp_path / "config.json", scaling_factor=0.5)
        with pytest.raises(ValueError, match=r"scale is 0.5 there, 0.3611 here"):
            part_weights.read_autoencoder(other, tmp_path)


def test_a_published_export_keeps_its_autoencoder_in_float32(tmp_path, capsys):
    """Whatever --dtype says, as authors publish it; from random weights of a size that the layout can say."""
    words = ["export", "bagel/tiny-published", str(tmp_path / "m"), "--format", "published", "--fresh"]
    assert cli.main([*words, "--dtype", "bf16"]) == 0
    kinds = {f.name: {t.dtype for t in load_file(f).values()} for f in (tmp_path / "m").glob("*.safetensors")}
    assert kinds["ae.safetensors"] == {torch.float32} and torch.bfloat16 in kinds["ema.safetensors"]
    engine = diptych.load(tmp_path / "m", preset="demo")
    assert engine.generate("a star", num_inference_steps=2, size=64, seeding="published").images[0].size == (64, 64)


# ---- dtypes and memory ------------------------------------------------------------------------------------------


def test_dtypes(family, tmp_path):
    folder = published.write(family, tmp_path / "bf16", torch.bfloat16)
    stored = store.load(folder)
    exact = {n for n in stored.state_dict() if n.startswith("autoencoder.")}
    kinds = {n: t.dtype for n, t in stored.state_dict().items()}
    assert {kinds[n] for n in exact} == {torch.float32} and {kinds[n] for n in kinds.keys() - exact} == {torch.bfloat16}
    wide = store.load(folder, dtype="fp32")
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}
    for n, t in wide.state_dict().items():
        assert torch.equal(t, stored.state_dict()[n].float()), n
    narrow = store.load(folder, dtype="bf16")
    assert {p.dtype for n, p in narrow.named_parameters() if n not in exact} == {torch.bfloat16}
    assert {t.dtype for t in narrow.buffers()} == {torch.float32}
    with pytest.raises(ValueError, match="unknown dtype 'int4'; choose from fp32, bf16, fp16"):
        store.load(folder, dtype="int4")


@pytest.mark.parametrize("dtype", ["bf16", "stored"])
def test_bfloat16_stays_close_to_float32(family, tmp_path, dtype):
    """The same rounded weights in both: words, velocities and pictures agree to what bfloat16 can say."""
    folder = published.write(family, tmp_path / "bf16", torch.bfloat16)
    how = {} if dtype == "stored" else {"dtype": dtype}
    wide, narrow = (diptych.load(folder, "cpu", **k) for k in ({"dtype": "fp32"}, how))
    sample = Sample("ask", (user("how many stars are there?"),))
    logits = [e.model.extend([e.model.open()], [e.model.lay_out(sample)])[0].logits for e in (wide, narrow)]
    assert logits[1].dtype == torch.float32
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()
    drawn = [e.generate("a star", size=(64, 64), num_inference_steps=3).images[0] for e in (wide, narrow)]
    edited = narrow.edit(picture(1), "a star", size=(64, 64), num_inference_steps=2, image_guidance_scale=2.0)
    a, b = (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in drawn)
    assert edited.images[0].size == (64, 64) and (a - b).abs().mean() < 8


MEASURE = """
import resource, sys
import torch
from diptych.models import bagel, store
from diptych.models.published import folder
store.load({warm!r})  # whatever is imported or allocated once
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = store.load({folder!r}, dtype={dtype!r})
weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(peak() - before, weights)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A published folder of more than 200 MiB, float32."""
    folder = tmp_path_factory.mktemp("large") / "m"
    store.save(published.model("bagel", width=768, layers=16, vocab_size=2048), folder, published=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_loading_holds_the_weights_and_little_more(original, large, dtype):
    size = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    assert size > 200 * 2**20
    code = MEASURE.format(warm=str(original), folder=str(large), dtype=dtype)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split())
    assert weights == pytest.approx(size * (0.5 if dtype == "bf16" else 1), rel=0.05)
    assert peak <= 1.15 * weights, f"{peak / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights"


# ---- over a base ------------------------------------------------------------------------------------------------


def test_weights_over_a_base(family, original, tmp_path):
    tuned = published.write(family, tmp_path / "tuned", seed=5)
    over = tmp_path / "over"
    over.mkdir()
    shutil.copy(tuned / "ema.safetensors", over)
    loaded = store.load(over, base=original)
    mine, base = store.load(tuned).state_dict(), store.load(original).state_dict()
    for n, t in loaded.state_dict().items():
        assert torch.equal(t, (base if n.startswith("autoencoder.") else mine)[n]), n
    with pytest.raises(ValueError) as error:
        store.load(over)
    for told in (str(over), "holds no model", "lacks llm_config.json, vit_config.json, ae.safetensors", "base says"):
        assert told in str(error.value)


def test_base_is_for_published_folders(tiny_model, original):
    with pytest.raises(ValueError, match="is complete in itself; base is for published folders"):
        store.load(tiny_model, base=original)


# ---- the hub ----------------------------------------------------------------------------------------------------


def test_offline_is_an_error_that_says_so():
    with pytest.raises(ValueError) as error:
        store.load("nobody/nothing")
    assert "no model 'nobody/nothing': not a folder" in str(error.value)
    assert "nobody/nothing cannot be fetched from the hub" in str(error.value)


def test_models_of_the_hub_are_loaded_from_its_cache(family, original, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    (over := tmp_path / "over").mkdir()
    shutil.copy(original / "ema.safetensors", over)
    cache = {"ByteDance-Seed/BAGEL-7B-MoT": original, "Two-hot/SGT-BAGEL": over}

    def snapshot(repository, **_):
        asked.append(repository)
        return str(cache[repository])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    whole = store.load("ByteDance-Seed/BAGEL-7B-MoT").state_dict()
    assert same(dict(whole), dict(store.load("bagel/7b-mot").state_dict()))
    asked.clear()
    assert same(dict(whole), dict(store.load("Two-hot/SGT-BAGEL").state_dict()))
    assert asked == ["Two-hot/SGT-BAGEL", "ByteDance-Seed/BAGEL-7B-MoT"]
    assert same(dict(whole), dict(store.load("bagel/7b-sgt").state_dict()))


# ---- strict -----------------------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_listed(folder):
    def spoil(state):
        del state["connector.fc2.bias"]
        state["stray.weight"] = torch.zeros(2)
        state["llm2vae.bias"] = torch.zeros(3)
        state["language_model.model.norm.weight"] = torch.zeros(32, dtype=torch.int64)

    edit(folder / "ema.safetensors", spoil)
    edit(folder / "ae.safetensors", lambda s: s.pop("decoder.conv_out.bias"))
    with pytest.raises(ValueError) as error:
        store.load(folder)
    for told in (
        f"{folder} does not fit the model",
        "ema.safetensors: missing connector.fc2.bias (ours: projector.fc2.bias)",
        "ema.safetensors: unknown stray.weight",
        "ema.safetensors: llm2vae.bias gives latent_out.bias shape (3,), not (16,)",
        "ema.safetensors: language_model.model.norm.weight is torch.int64, not torch.float32",
        "ae.safetensors: missing decoder.conv_out.bias (ours: autoencoder.decoder.conv_out.bias)",
    ):
        assert told in str(error.value)


def test_a_wrong_config_is_told_by_shape_and_by_name(folder):
    change(folder / "llm_config.json", intermediate_size=50, num_hidden_layers=3)
    with pytest.raises(ValueError) as error:
        store.load(folder)
    assert "mlp.gate_proj.weight gives decoder.layers.0.mlp.0.gate_proj.weight shape (48, 32), not (50, 32)" in str(
        error.value
    )
    assert "and " in str(error.value) and " more" in str(error.value)


@pytest.mark.parametrize(
    "file, values, told",
    [
        ("llm_config.json", {"hidden_size": None}, "the qwen2 config lacks hidden_size"),
        ("llm_config.json", {"hidden_size": "32"}, "hidden_size='32'"),
        ("llm_config.json", {"model_type": "gpt2"}, "unknown model_type 'gpt2'"),
        ("llm_config.json", {"rope_scaling": {"type": "yarn"}}, "does not support rope_scaling"),
        ("vit_config.json", {"image_size": None}, "vit_config.json: image_size must be a number, not None"),
        ("vit_config.json", {"hidden_act": "relu"}, "vit_config.json: hidden_act 'relu' is not supported"),
        ("vit_config.json", {"num_hidden_layers": 9}, "missing vit_model.vision_model.encoder.layers.2"),
    ],
)
def test_bad_settings_are_named(folder, file, values, told):
    change(folder / file, **values)
    with pytest.raises(ValueError) as error:
        store.load(folder)
    assert told in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_truncated_and_corrupt_files_are_named(folder, name):
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"nonsense" * 9):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            store.load(folder)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        store.load(folder)


def test_spoiled_json_is_named(folder):
    for content, told in (("{", "llm_config.json is not valid JSON"), ("[]", "must hold a JSON object, not list")):
        (folder / "llm_config.json").write_text(content)
        with pytest.raises(ValueError, match=told):
            store.load(folder)


def test_missing_and_spoiled_tokenizers_are_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read .*tokenizer.json"):
        store.load(folder)
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<x>"}})
    with pytest.raises(ValueError, match=r"tokenizer_config.json: '<x>' is to have id 7, but it would have \d+"):
        store.load(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt"):
        store.load(folder)


def test_shards_and_their_index_must_agree(folder):
    index = shard(folder, "ema")
    where = json.loads(index.read_text())["weight_map"]
    first, second = sorted(where)[:2]
    change(index, weight_map={k: v for k, v in where.items() if k != first} | {"stray": where[first]})
    with pytest.raises(ValueError, match="disagree") as error:
        Tensors(index)
    assert f"stray is not in {where[first]}" in str(error.value) and f"{first} of {where[first]} is not" in str(
        error.value
    )
    change(index, weight_map=where | {second: "ema-00009-of-00003.safetensors"})
    with pytest.raises(ValueError, match="cannot read .*ema-00009-of-00003.safetensors"):
        store.load(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        store.load(folder)


# ---- and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_gives_the_folder_back(family, tmp_path, dtype, capsys):
    folder, back = published.write(family, tmp_path / "m", dtype), tmp_path / "back"
    assert cli.main(["export", str(folder), str(back), "--format", "published"]) == 0
    assert str(back) in capsys.readouterr().out
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in back.iterdir()} and names >= QWEN2
    assert same(tensors(folder), tensors(back))
    for name in names - {"ema.safetensors", "ae.safetensors"}:
        assert (folder / name).read_bytes() == (back / name).read_bytes(), name
    change(folder / "vit_config.json", unheard=1)
    assert store.load(folder).config == store.load(back).config


def test_ours_and_back(family, original, tmp_path):
    """Published, ours, published: nothing changes."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert cli.main(["export", str(original), str(ours), "--dtype", "fp32"]) == 0
    assert {p.name for p in ours.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert cli.main(["export", str(ours), str(back), "--format", "published"]) == 0
    assert same(tensors(original), tensors(back))
    assert (back / "vocab.json").read_bytes() == (original / "vocab.json").read_bytes()


def test_what_a_layout_cannot_say_is_an_error(tiny_model, family, tmp_path):
    with pytest.raises(ValueError, match="the published format of bagel cannot represent") as error:
        store.save(store.load(tiny_model), tmp_path / "x", published=True)
    assert "prediction=data" in str(error.value) and "autoencoder=" in str(error.value)
    assert not (tmp_path / "x").exists()
    made = published.model(family)
    made.config = replace(made.config, settings=replace(made.config.settings, guidance_scale=2.0))
    store.save(made, tmp_path / "y", published=True)  # how to draw is not what the weights are
    coder = store.create("autoencoder", table.config("autoencoder/tiny"), Tokenizer.tiny())
    with pytest.raises(ValueError, match="family 'autoencoder' has no published format"):
        store.save(coder, tmp_path / "z", published=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process maps")
def test_large_tensors_of_the_files_own_dtype_are_mapped_and_the_file_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAPPED", 1024)
    file = published.write("bagel", tmp_path / "m") / "ema.safetensors"
    before = file.read_bytes()

    def mapped(tensor) -> bool:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
        ranges = [line[0].split("-") for line in lines]
        return any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in ranges)

    model = store.load(tmp_path / "m")
    large, small = model.decoder.embed_tokens.weight, model.decoder.layers[0].input_layernorm[0].weight
    assert mapped(large) and not mapped(small) and small.nbytes < 1024 <= large.nbytes
    with torch.no_grad():
        large.zero_()
    assert not large.any() and file.read_bytes() == before
    half = torch.bfloat16 if large.dtype == torch.float32 else torch.float32
    assert not mapped(store.load(tmp_path / "m", dtype=half).decoder.embed_tokens.weight)
