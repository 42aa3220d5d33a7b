"""The published size of BAGEL, counted on the meta device: nothing is allocated."""

import pytest
import torch

from diptych import models
from diptych.models.bagel import Bagel

# Published counts (specs: BAGEL 3 and 3.1).
LANGUAGE = 7_615_623_680
GENERATION_COPIES = 6_525_628_928
VISION = 402_552_736
PROJECTOR = 16_980_992
AUTOENCODER = 83_819_683
TOTAL = 14_607_260_128  # all but the autoencoder, with both position tables
READING = 14_578_347_936  # the same without what only draws: latent linears, time embedding, latent table


@pytest.fixture(scope="module")
def model() -> Bagel:
    return models.create("bagel", models.config("bagel/7b-mot"), device="meta")


def count(model: Bagel, part: str) -> int:
    from diptych.train.parameters import parameters_of

    return sum(p.numel() for p in parameters_of(model, part))


def numel(module: torch.nn.Module, keep=lambda name: True) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if keep(name))


def test_counts(model):
    image = lambda name: any(part in name for part in IMAGE)  # noqa: E731
    IMAGE = (*(f"{m}.1." for m in ("norm", "input_layernorm", "self_attn", "o_proj", "post_attention_layernorm", "mlp")),)
    drawn = numel(model.decoder, image)
    assert drawn == GENERATION_COPIES
    assert numel(model.decoder) - drawn == LANGUAGE
    assert numel(model.vision) == VISION
    assert numel(model.projector) == PROJECTOR
    assert numel(model.autoencoder) == AUTOENCODER
    tables = model.latent_positions.numel() + model.vision_positions.numel()
    total = numel(model) - AUTOENCODER + tables
    assert total == TOTAL
    heads = numel(model.time) + numel(model.latent_in) + numel(model.latent_out) + model.latent_positions.numel()
    assert total - heads == READING
