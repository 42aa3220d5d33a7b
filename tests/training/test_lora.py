"""Adapters on named parts: trained alone, merged into releases, taken away again."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diptych.models import configs, store
from diptych.training import build, checkpoint, lora
from diptych.training.parameters import ever_trained
from diptych.training.recipe import Engine
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
    adapted = {n.replace(lora.DOWN, ".") for n in adapter if lora.DOWN in n}
    assert adapted == {n for n in moved if n.startswith("decoder.")} and all(
        ".layers." in n and n.endswith("weight") for n in adapted
    )
    assert not any(re.search(r"(self_attn|o_proj|mlp)\.1\.", n) for n in adapted)  # the other route is another part
    plain = build.build(tiny.recipe())
    lora.apply(plain, run / "release" / "adapter.safetensors")
    for name in adapted:
        assert torch.allclose(plain.get_parameter(name), after[name], atol=1e-6)
    lora.apply(plain, run / "release" / "adapter.safetensors", sign=-1)
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
    made = replace(base, lora={part: 2}, engine=Engine(recompute="full", frozen="int8"))
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
