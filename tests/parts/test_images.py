"""Sizes, resizing, and patches of latents (parts/images.py, parts/positions.py)."""

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.tensors import to_float, to_uint8
from diptych.data.contact_sheet import contact_sheet
from diptych.parts.images import SizeRule, latents_to_tokens, to_pil, to_tensor, tokens_to_latents
from diptych.parts.positions import TimestepEmbedding, grid_places, grid_table

RULES = [SizeRule(1024, 512, 16), SizeRule(980, 224, 14), SizeRule(980, 378, 14, 2007040), SizeRule(128, 16, 16)]
SIDES = st.integers(1, 5000)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES)
def test_sizes_keep_to_stride_and_limits(rule, width, height):
    w, h = rule(width, height)
    assert w % rule.stride == 0 and h % rule.stride == 0 and min(w, h) >= rule.stride
    assert max(w, h) <= rule.longest + rule.stride // 2
    assert w * h <= rule.pixels * 1.1  # rounding to the stride may add a little
    assert rule(height, width) == (h, w)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=200)
@given(st.integers(32, 3000), st.floats(0, 0.9))
def test_short_side_and_shape_are_kept_where_they_can_be(rule, height, stretch):
    width = round(height * (1 + stretch * (rule.longest / rule.shortest - 1)))
    w, h = rule(width, height)
    assert min(w, h) >= rule.shortest
    assert abs(w / h - width / height) <= 1.5 * (w / h) * rule.stride / h


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_size_that_fits_is_left_alone(rule, data):
    side = st.integers(-(-rule.shortest // rule.stride), rule.longest // rule.stride).map(lambda n: n * rule.stride)
    size = data.draw(side), data.draw(side)
    assert rule(*size) == size


def picture(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_to_tensor_and_back():
    image = picture(20, 12)
    tensor = to_tensor(image, (20, 12))
    assert tensor.dtype == torch.uint8 and tuple(tensor.shape) == (3, 12, 20)
    assert tensor[:, 3, 7].tolist() == list(image.getpixel((7, 3)))
    assert np.array_equal(np.asarray(to_pil(to_float(tensor))), np.asarray(image))


def test_nearest_keeps_label_colours():
    image = picture(4, 4)
    colours = {tuple(c) for c in np.asarray(image).reshape(-1, 3).tolist()}
    out = to_tensor(image, (32, 32), nearest=True)
    assert {tuple(c) for c in out.flatten(1).T.tolist()} <= colours
    assert not {tuple(c) for c in to_tensor(image, (32, 32)).flatten(1).T.tolist()} <= colours


def test_every_byte_survives_the_way_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    values = to_float(every)
    assert values[0] == -1 and values[-1] == 1
    assert torch.equal(to_uint8(values), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_latents_and_tokens(n, channels, rows, columns, patch):
    latents = (
        torch.arange(n * channels * rows * columns * patch**2).float().view(n, channels, rows * patch, columns * patch)
    )
    tokens = latents_to_tokens(latents, patch)
    assert tuple(tokens.shape) == (n, rows * columns, channels * patch**2)
    assert torch.equal(tokens_to_latents(tokens, (rows, columns), patch), latents)
    # row-major tokens; (row in patch, column in patch, channel) within a token
    assert torch.equal(tokens[0, -1, -channels:], latents[0, :, -1, -1])
    assert torch.equal(tokens[0, 0, :channels], latents[0, :, 0, 0])


def test_position_table():
    table = grid_table(5, 16)
    assert tuple(table.shape) == (25, 16)
    places = grid_places((3, 4), 5)
    assert places.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]
    grid = table[places].view(3, 4, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])  # first half: the column
    assert torch.equal(grid[:, 0, 8:], grid[:, 3, 8:])  # second half: the row
    assert len({tuple(row) for row in table.tolist()}) == 25
    with pytest.raises(ValueError, match="6x1 tokens does not fit the 5x5"):
        grid_places((6, 1), 5)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        grid_table(2, 6)


def test_timestep_sinusoid_starts_with_ones():
    features = TimestepEmbedding(8).sinusoid(torch.tensor([0.0, 1.0]))
    assert tuple(features.shape) == (2, 256)
    assert (features[0, :128] == 1).all() and (features[0, 128:] == 0).all()
    assert float(features[1, 0]) == pytest.approx(float(torch.cos(torch.tensor(1.0))))


def test_contact_sheet_size():
    sheet = contact_sheet([picture(10, 6)] * 5, columns=3, scale=2, gap=4)
    assert sheet.size == (3 * 24 + 4, 2 * 16 + 4)
