"""Adapters on named parts: trained alone, merged into releases, taken away again."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych import recipes
from diptych.models import adapters, configs, store
from diptych.training import build, checkpoint, lora
from diptych.training.parameters import ever_trained
from diptych.training.recipe import EngineConfig
from tests.support import tiny
from tests.training.test_loop import losses, train

pytest.importorskip("peft")


def recipe(**changes):
    return tiny.recipe(
        **{"steps": 4, "lora": {"decoder.text": 2}, "train": {"decoder.text": 1e-2, "head": 1e-3}} | changes
    )


def test_a_release_is_the_base_with_its_adapters_merged(tmp_path):
    made, run = recipe(ema=None, checkpoint_every=2), tmp_path / "run"
    base = build.build(tiny.recipe()).state_dict()
    rows = train(made, run)
    released, adapter = store.load(run), load_file(run / "release" / "adapter.safetensors")
    after = released.state_dict()
    assert after.keys() == base.keys()
    moved = {n for n, v in after.items() if not torch.equal(v, base[n])}
    adapted = {n.replace(adapters.DOWN, ".") for n in adapter if adapters.DOWN in n}
    assert adapted == {n for n in moved if n.startswith("decoder.")} and all(
        ".layers." in n and n.endswith("weight") for n in adapted
    )
    assert not any(re.search(r"(self_attn|o_proj|mlp)\.1\.", n) for n in adapted)  # the other route is another part
    plain = build.build(tiny.recipe())
    adapters.apply(plain, run / "release" / "adapter.safetensors")
    for name in adapted:
        assert torch.allclose(plain.get_parameter(name), after[name], atol=1e-6)
    adapters.apply(plain, run / "release" / "adapter.safetensors", sign=-1)
    assert all(torch.allclose(v, base[n], atol=1e-6) for n, v in plain.state_dict().items())
    shutil.rmtree(checkpoint.available(run / "checkpoints")[-1])
    before = (run / "release" / "model.safetensors").read_bytes()
    assert losses(train(made, run, resume=True)) == losses(rows)
    assert (run / "release" / "model.safetensors").read_bytes() == before


def test_adapters_change_nothing_at_first():
    plain, adapted = build.build(tiny.recipe()), build.build(recipe())
    sequences = [plain.lay_out(s) for s in tiny.samples()]
    from diptych.core.batch import pack
    from diptych.core.noise import Noise

    a, b = (m.losses(pack(sequences, 2), Noise()) for m in (plain, adapted))
    assert all(torch.equal(a[n].sum, b[n].sum) for n in a)
    assert lora.merged(adapted.state_dict()).keys() == plain.state_dict().keys()


def test_adapters_of_omnigen2_are_read_and_written_as_its_trainer_writes_them(tmp_path):
    family = configs.config_to_json("omnigen2", tiny.FAMILIES["omnigen2"]())
    changes = dict(model=family, lora={"dit.attention": 2}, train={"dit.attention": 1e-2})
    held = tiny.shake(build.build(tiny.recipe(**changes)))
    pairs = lora.adapters(held.state_dict())
    published = adapters.to_published(held, pairs)
    assert len(published) == len(pairs) == 2 * 4 * sum(1 for _ in held.dit.blocks())
    assert {n.split(".")[-3] for n in published} <= {"to_q", "to_k", "to_v", "0"}
    assert "transformer.layers.1.attn.to_out.0.lora_B.weight" in published
    save_file(published, tmp_path / "transformer.safetensors")
    renamed = {n.replace("transformer.", "diffusion_model.", 1): t for n, t in published.items()}
    save_file(renamed, tmp_path / "diffusion_model.safetensors")
    save_file(pairs, tmp_path / "run.safetensors")
    merged = lora.merged(held.state_dict())
    base = {n.replace(lora.BASE, "."): t for n, t in held.state_dict().items() if n not in pairs}
    for name in ("transformer", "diffusion_model", "run"):
        plain = store.create("omnigen2", held.config)
        plain.load_state_dict(base)
        adapters.apply(plain, tmp_path / f"{name}.safetensors")
        assert all(torch.allclose(t, merged[n], atol=1e-6) for n, t in plain.state_dict().items()), name
    first = next(iter(published))
    for bad, said in (
        ({first.replace("layers", "stacks").replace("refiner", "stack"): published[first]}, "unknown transformer"),
        ({first: published[first]}, "has no partner"),
        ({n: t[:, :1] if "lora_A" in n else t for n, t in published.items()}, "the model has no weight"),
    ):
        save_file({n: t.contiguous() for n, t in bad.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=said):
            adapters.apply(plain, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="bagel has no other format"):
        adapters.apply(tiny.model("bagel"), tmp_path / "transformer.safetensors")


def test_the_published_fine_tuning_trains_so_many_numbers():
    recipe = recipes.find("omnigen2/tune-lora")
    model = store.create(recipe.model["family"], configs.config_from_json(recipe.model)[1], device="meta")
    lora.inject(model, recipe.lora, 0)
    trained = ever_trained(model, recipe.stages)
    assert sum(p.numel() for p in trained) == 5_107_200  # ft_lora.yml: rank 8 on four projections of 38 blocks


def test_what_cannot_be_adapted(tmp_path):
    with pytest.raises(ValueError, match="unknown part 'tail'; bagel has: decoder.text"):
        build.build(recipe(lora={"tail": 2}))
    with pytest.raises(ValueError, match="part 'projector' of bagel has no linear layer in a block"):
        build.build(recipe(lora={"projector": 2}))
    with pytest.raises(ValueError, match="rank of lora must be at least 1, not 0"):
        build.build(recipe(lora={"decoder.text": 0}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapters_on_rounded_weights(family, tmp_path):
    """frozen: int8 trains the adapters, resumes, and releases what it computed with."""
    part = {"iomm": "dit", "omnigen2": "dit"}.get(family, "decoder")
    base = tiny.recipe(
        model=configs.config_to_json(family, tiny.FAMILIES[family]()),
        steps=2,
        ema=None,
        checkpoint_every=1,
        train={part: 1e-2},
        loss={"text": 1.0, "image": 1.0},
        precision="bf16",
    )
    store.save(tiny.shake(tiny.model(family)), tmp_path / "start")  # a fresh network's output does not reach adapters
    base = replace(base, init={"model": str(tmp_path / "start")})
    made = replace(base, lora={part: 2}, engine=EngineConfig(recompute="full", frozen="int8"))
    held = build.build(made)
    rounded = {n for n, p in held.named_parameters() if p.dtype == torch.int8}
    assert any(".base_layer." in n for n in rounded) and not any(".lora_" in n for n in rounded)
    trained = ever_trained(held, made.stages)
    exact = set(held.autoencoder.parameters())  # as in drawing, and as ``data precompute`` keeps what it makes
    assert {p.dtype for p in held.parameters() if p not in trained | exact} == {torch.int8, torch.bfloat16}
    assert {p.dtype for p in exact} == {torch.float32}
    assert {p.dtype for p in trained} == {torch.float32}
    rows = train(made, tmp_path / "run")
    assert rows[0]["loss"] != rows[1]["loss"]
    released, plain = store.load(tmp_path / "run").state_dict(), build.build(base).state_dict()
    assert released.keys() == plain.keys()
    for name in rounded:
        was = plain[name.replace(".base_layer.", ".")]
        assert (released[name.replace(".base_layer.", ".")] - was).abs().max() < 0.03 * was.abs().max() + 0.03
    shutil.rmtree(checkpoint.available(tmp_path / "run" / "checkpoints")[-1])
    assert losses(train(made, tmp_path / "run", resume=True)) == losses(rows)
