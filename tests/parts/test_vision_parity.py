"""Our SigLIP encoder against transformers', and its key map."""

import pytest
import torch
import transformers

from diptych.models.published.key_map import export, load
from diptych.models.published.parts import siglip
from diptych.parts.vision import VisionConfig, VisionEncoder, patchify


def pair(head: bool = False):
    """A random SigLIP of transformers and ours with its weights."""
    torch.manual_seed(11)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.SiglipVisionConfig(**sizes, image_size=56, patch_size=14, vision_use_head=head)
    theirs = transformers.SiglipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = VisionEncoder(VisionConfig(**sizes, patch_size=14, image_size=56)).eval()
    state = theirs.state_dict()
    rules = siglip(14, "vision_model." if any(n.startswith("vision_model.") for n in state) else "")
    ours.load_state_dict(load(rules, state, ours.state_dict()))
    return theirs, ours, rules


@torch.no_grad()
def test_features_equal_transformers():
    theirs, ours, _ = pair()
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(ours(images), theirs(pixel_values=images).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", [False, True])
def test_round_trip(head):
    theirs, ours, rules = pair(head)
    expected = {n: t for n, t in theirs.state_dict().items() if "head." not in n}
    back = export(rules, ours.state_dict())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[n], t) for n, t in expected.items())


@torch.no_grad()
def test_a_smaller_picture_takes_the_corner_of_the_position_table():
    """28 x 42 pixels: rows and columns keep their own places in the 4 x 4 table."""
    _, ours, _ = pair()
    images = torch.rand(1, 3, 28, 42, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = ours.patch_embedding(patchify(images, 14)) + ours.position_embedding(torch.tensor([0, 1, 2, 4, 5, 6]))
    for layer in ours.layers:
        x = layer(x)
    torch.testing.assert_close(ours(images), ours.post_layernorm(x))


def test_pictures_that_do_not_fit_are_named():
    _, ours, _ = pair()
    with pytest.raises(ValueError, match=r"5x1 tokens does not fit the 4x4"):
        ours(torch.zeros(1, 3, 70, 14))
    with pytest.raises(ValueError, match=r"15x14 picture does not divide into patches of 14"):
        ours(torch.zeros(1, 3, 15, 14))
