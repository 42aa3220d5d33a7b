"""Eight-bit weights: the memory they save, and how close the model stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diptych
from diptych import cli
from diptych.core.sample import Image, Sample, user
from diptych.models import store
from diptych.parts.batch_invariant import alone
from diptych.parts.quantize import Int8Linear, quantized, rounded, to_int8
from tests.support import published
from tests.support.tiny import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough that blocks are most of the weights."""
    folder = tmp_path_factory.mktemp("published") / "m"
    store.save(published.model("bagel", width=128, layers=4), folder, published=True)
    return folder


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_off_by_half_a_step_at_most(dtype):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    whole, scale = rounded(weight)
    assert whole.dtype == torch.int8 and scale.shape == (24,) and int(whole.abs().max()) == 127
    assert bool(((whole * scale[:, None] - weight.float()).abs() <= scale[:, None] * 0.5001).all())
    assert not whole[3].any() and bool(scale.isfinite().all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_rounded_weight(bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, bias=bias, dtype=dtype)
    x = torch.randn(5, 40, dtype=dtype)
    layer = Int8Linear(linear)
    whole, scale = rounded(linear.weight.detach())
    wide = x.float() @ (whole * scale[:, None]).T + (linear.bias.float() if bias else 0)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), wide, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    again = Int8Linear(nn.Linear(40, 24, bias=bias, dtype=dtype))
    again.load_state_dict(linear.state_dict(), strict=False)  # a floating weight is rounded on its way in
    assert torch.equal(again(x), layer(x))


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(64, 16), (192, 384), (40, 24)])  # the last is no shape of torch's kernel
def test_decoding_multiplies_by_the_integers_and_no_row_depends_on_another(shape):
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(*shape, dtype=torch.bfloat16))
    x = torch.randn(9, shape[0], dtype=torch.bfloat16)
    with alone():
        decoded = layer(x)
        assert all(torch.equal(layer(x[i : i + 1]), decoded[i : i + 1]) for i in range(9))
        assert torch.equal(layer(x.reshape(3, 3, -1)), decoded.reshape(3, 3, -1))
    assert (decoded - layer(x)).float().norm() < 0.01 * decoded.float().norm()


@pytest.mark.parametrize("dtype, width", [("fp32", 4), ("bf16", 2)])
def test_blocks_shrink_to_one_byte_a_weight_and_nothing_else_changes(folder, dtype, width):
    whole, small = store.load(folder, dtype=dtype), store.load(folder, dtype=dtype, quantize="int8")
    assert quantized(small) and not quantized(whole)
    linears = {
        f"{n}.{m}.weight"
        for n, block in whole.named_modules()
        if block in set(whole.blocks())
        for m, x in block.named_modules()
        if isinstance(x, nn.Linear)
    }
    wide = dict(whole.state_dict())
    numbers = sum(wide[n].numel() for n in linears)
    rows = sum(wide[n].shape[0] for n in linears)
    saved = (width - 1) * numbers - 4 * rows
    assert bytes_of(whole) - bytes_of(small) == saved
    blocks = (sum(bytes_of(b) for b in whole.blocks()), sum(bytes_of(b) for b in small.blocks()))
    assert blocks[1] / blocks[0] < (1 / width) * 1.25
    for name, tensor in small.state_dict().items():
        if name not in linears and not name.endswith(".scale"):
            assert torch.equal(tensor, wide[name]), name
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in whole.parameters())
    assert small.activated_parameters() == whole.activated_parameters()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_words_stay_close_and_pictures_are_drawn(folder, dtype):
    whole, small = (diptych.load(folder, "cpu", dtype=dtype, quantize=q) for q in (None, "int8"))
    sample = Sample("ask", (user(Image(picture(0, 56, 56)), "how many stars are there?"),))
    a, b = (e.model.extend([e.model.open()], [e.model.lay_out(sample)])[0].logits for e in (whole, small))
    assert (a - b).norm() < 0.05 * a.norm()
    drawn = [e.generate("a star", size=(64, 64), num_inference_steps=3).images[0] for e in (whole, small)]
    x, y = (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in drawn)
    assert (x - y).abs().mean() < 8
    assert small.edit(picture(1), "red", size=(64, 64), num_inference_steps=2).images[0].size == (64, 64)


def test_our_own_folders_too_and_from_the_command_line(tiny_model, tmp_path, capsys):
    assert quantized(store.load(tiny_model, quantize="int8"))
    out = tmp_path / "p.png"
    draw = ["generate", str(tiny_model), "a star", "--quantize", "int8", "--device", "cpu", "--out", str(out)]
    assert cli.main(draw) == 0 and out.is_file()
    assert cli.main([*draw, "--dtype", "bf16"]) == 0
    capsys.readouterr()


def test_it_is_for_use_only(tiny_model, tmp_path):
    model = store.load(tiny_model, quantize="int8")
    with pytest.raises(ValueError, match="loaded with quantize cannot be saved"):
        store.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match="unknown quantize 'int4'; there is int8"):
        store.load(tiny_model, quantize="int4")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    to_int8([empty])
    assert empty[0].weight.is_meta and empty[0].weight.dtype == torch.int8
