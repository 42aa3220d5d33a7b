"""The autoencoders: FLUX's against diffusers, diffusers' own from a folder, identity, and measured statistics."""

import diffusers
import pytest
import torch

from diptych.models.published.key_map import export, load
from diptych.models.published.parts import autoencoder_kl
from diptych.parts.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Identity,
    build_autoencoder,
    build_latent_autoencoder,
    tiny_tokenizer,
)
from diptych.parts.tokenizer import Tokenizer

CONFIG = AutoencoderConfig(channels=16, multipliers=(1, 2, 4, 4), blocks=2, latent_channels=4, groups=8)


def published() -> diffusers.AutoencoderKL:
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=CONFIG.scale,
        shift_factor=CONFIG.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return vae


@pytest.fixture(scope="module")
def theirs() -> diffusers.AutoencoderKL:
    return published()


@pytest.fixture(scope="module")
def ours(theirs) -> Autoencoder:
    model = Autoencoder(CONFIG).eval()
    model.load_state_dict(load(autoencoder_kl(4), theirs.state_dict(), model.state_dict()))
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("grad", [True, False])
def test_flux_equals_diffusers(theirs, ours, images, grad):
    with torch.set_grad_enabled(grad):
        posterior = theirs.encode(images).latent_dist
        eps = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(4))
        scale = lambda z: CONFIG.scale * (z - CONFIG.shift)  # noqa: E731
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(ours.encode(images), scale(posterior.mean), **close)
        torch.testing.assert_close(ours.encode(images, eps), scale(posterior.mean + posterior.std * eps), **close)
        z = scale(posterior.mean)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z / CONFIG.scale + CONFIG.shift).sample, **close)


def test_round_trip(theirs, ours):
    back, expected = export(autoencoder_kl(4), ours.state_dict()), theirs.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[n], t) for n, t in expected.items())


@torch.no_grad()
def test_diffusers_folder(theirs, images, tmp_path):
    theirs.save_pretrained(tmp_path / "vae")
    model = build_autoencoder(AutoencoderConfig(kind="kl", folder=str(tmp_path / "vae"))).eval()
    mean = theirs.encode(images).latent_dist.mean
    latents = model.encode(images)
    torch.testing.assert_close(latents, CONFIG.scale * (mean - CONFIG.shift))
    torch.testing.assert_close(model.decode(latents), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)
    eps = torch.ones_like(mean)
    std = theirs.encode(images).latent_dist.std
    torch.testing.assert_close(model.encode(images, eps), CONFIG.scale * (mean + std - CONFIG.shift))


def test_a_folder_without_an_autoencoder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"needs 'folder', a diffusers AutoencoderKL folder"):
        build_autoencoder(AutoencoderConfig(kind="kl", folder=str(tmp_path)))


def test_identity(images):
    model = build_autoencoder(AutoencoderConfig(kind="identity"))
    assert isinstance(model, Identity) and AutoencoderConfig(kind="identity").downsample == 1
    assert model.decode(model.encode(images)) is images


@torch.no_grad()
def test_statistics_give_unit_variance_and_are_undone_by_decode(images):
    model = Autoencoder(
        AutoencoderConfig(
            channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, groups=4, posterior=False, statistics=True
        )
    ).eval()
    z = model.moments(images)
    model.bn.running_mean.copy_(z.mean((0, 2, 3)))
    model.bn.running_var.copy_(z.var((0, 2, 3)))
    latents = model.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.var((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(model.decode(latents), model.decoder(z), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents, model.bn(z), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latents_do_not_depend_on_the_batch(ours, images):
    many = images[:1].repeat(17, 1, 1, 1)  # more than one slice of the encoder's loop
    one = ours.encode(images[:1])
    torch.testing.assert_close(ours.encode(many), one.repeat(17, 1, 1, 1), atol=1e-4, rtol=1e-4)


def test_sides_that_do_not_divide_are_named(ours):
    with pytest.raises(ValueError, match=r"multiples of 8, not \(12, 16\)"):
        ours.encode(torch.zeros(1, 3, 12, 16))


@pytest.mark.parametrize("config", [tiny_tokenizer(), AutoencoderConfig("emu3")], ids=["vq", "emu3"])
def test_a_flow_model_refuses_an_autoencoder_of_codes(config):
    with pytest.raises(ValueError, match=f"continuous latents .*not '{config.kind}'"):
        build_latent_autoencoder(config)


def test_only_an_autoencoder_with_measured_statistics_is_trained():
    from diptych.models.autoencoder import AutoencoderTraining, Config

    for config in (AutoencoderConfig(), AutoencoderConfig("identity", statistics=True)):
        with pytest.raises(ValueError, match=f"not {config.kind!r} with statistics={config.statistics}"):
            AutoencoderTraining(Config(config), Tokenizer.tiny())
