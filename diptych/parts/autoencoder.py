"""Image autoencoders behind ``encode`` and ``decode``; latents come out scaled.

``Autoencoder`` is the convolutional one of FLUX (BAGEL's ``ae.safetensors``, module names as published) and FLUX.2
(per-channel statistics of folded latents in place of one scale and shift, 1x1 convolutions around them); the tiny one
that ships is the same class with fewer channels and statistics. ``LatentDecoder`` is its second half alone.
``Identity`` takes pixels for latents. ``DiffusersAutoencoder`` is any ``AutoencoderKL`` of diffusers.

Two return integer codes, (N, h, w) in 0 .. ``codebook`` - 1, which a language model can predict: ``Quantised`` is
FLUX's network around a grid of rounded values, ``Emu3`` the tokenizer of Emu3 from transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.tensors import Float, Int, Tensor
from diptych.parts.pretrained import pretrained, reading


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes. ``statistics`` normalises every latent channel by measured mean and variance instead of scale and shift;
    ``posterior`` says that the encoder yields a mean and a log-variance and that encoding may sample; ``fold`` makes
    one place of fold x fold (features ordered channel, row, column) before the statistics; ``quant`` adds the 1x1
    convolutions of FLUX.2 around the latents; ``levels`` are how many values each channel of a ``vq`` is rounded to."""

    kind: Literal["flux", "identity", "kl", "vq", "emu3"] = "flux"
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 16
    groups: int = 32
    posterior: bool = True
    statistics: bool = False
    fold: int = 1
    quant: bool = False
    scale: float = 0.3611
    shift: float = 0.1159
    folder: str | None = None  # kl: a diffusers folder; emu3: a transformers folder
    levels: tuple[int, ...] = ()  # vq

    def __post_init__(self) -> None:
        if (self.kind == "vq") != bool(self.levels) or any(n < 2 for n in self.levels):
            raise ValueError(f"an autoencoder has levels (2 or more each) if it is a vq; {self.kind} has {self.levels}")
        if self.levels and (len(self.levels) != self.latent_channels or self.posterior or self.statistics):
            raise ValueError("a vq needs one level a latent channel and neither posterior nor statistics")

    @property
    def downsample(self) -> int:
        """Pixels on a side of one latent."""
        places = self.fold * 2 ** (len(self.multipliers) - 1)
        return {"identity": 1, "kl": 8, "emu3": 8}.get(self.kind, places)

    @property
    def features(self) -> int:
        """Numbers at one place of the latents as they come out."""
        return self.latent_channels * self.fold**2

    @property
    def codebook(self) -> int:
        """How many codes a ``vq`` or ``emu3`` has; 0 for continuous latents."""
        return 32768 if self.kind == "emu3" else prod(self.levels) if self.levels else 0


def tiny_autoencoder() -> AutoencoderConfig:
    """FLUX's autoencoder at 8 channels of latents, with measured statistics in place of scale and shift."""
    return AutoencoderConfig(
        channels=16, multipliers=(1, 1, 2, 4), blocks=1, latent_channels=8, groups=8, posterior=False, statistics=True
    )


def tiny_tokenizer() -> AutoencoderConfig:
    """FLUX's network, small, around 8 x 5 x 5 x 5 codes of 4 x 4 pixels."""
    return AutoencoderConfig(
        "vq", 16, (1, 2, 2), blocks=1, latent_channels=4, groups=8, posterior=False, levels=(8, 5, 5, 5)
    )


def build_latent_autoencoder(config: AutoencoderConfig) -> Autoencoder | Identity | DiffusersAutoencoder:
    """An autoencoder of continuous latents. Raises ``ValueError`` for a config of discrete codes."""
    autoencoder = build_autoencoder(config)
    if isinstance(autoencoder, Quantised | Emu3):
        raise ValueError(
            "a flow model needs an autoencoder of continuous latents (kind 'flux', 'kl' or 'identity'), "
            f"not {config.kind!r}"
        )
    return autoencoder


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder | Identity | DiffusersAutoencoder | Quantised | Emu3:
    """The autoencoder that the config names."""
    kinds: dict[str, Any] = {"flux": Autoencoder, "kl": DiffusersAutoencoder, "vq": Quantised, "emu3": Emu3}
    return Identity() if config.kind == "identity" else kinds[config.kind](config)


def sampled(distribution: Float[Tensor, "N zz h w"], channels: int, eps: Tensor | None) -> Float[Tensor, "N z h w"]:
    """Latents of a ``distribution``: its mean, plus ``eps`` standard deviations where it has them."""
    mean, deviation = distribution[:, :channels], distribution[:, channels:]
    return mean if eps is None or not deviation.shape[1] else mean + deviation * eps


class Identity(nn.Module):
    """Pixels are the latents."""

    def distribution(self, images: Tensor) -> Tensor:
        """The pictures, (N, 3, H, W)."""
        return images

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """The pictures; ``eps`` is ignored."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents, which are pictures."""
        return latents


class DiffusersAutoencoder(nn.Module):
    """An ``AutoencoderKL`` folder of diffusers (Stable Diffusion, SD3, FLUX)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        if not config.folder or not (Path(config.folder) / "config.json").is_file():
            raise ValueError(
                f"autoencoder kind 'kl' needs 'folder', a diffusers AutoencoderKL folder, not {config.folder!r}"
            )
        with torch.device("cpu"):  # diffusers reads its folder itself, also for a model that begins on the meta device
            self.vae = pretrained(AutoencoderKL, config.folder, "a diffusers AutoencoderKL")
        self.scale, self.shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0

    def distribution(self, images: Tensor) -> Tensor:
        """Scaled mean and standard deviation of the posterior of (N, 3, H, W) pictures, (N, 2 z, H/8, W/8)."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([self.scale * (posterior.mean - self.shift), self.scale * posterior.std], 1)

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """Scaled latents, (N, z, H/8, W/8): the mean, or mean + std * ``eps``."""
        return sampled(self.distribution(images), self.vae.config.latent_channels, eps)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1], (N, 3, H, W), of scaled latents."""
        return self.vae.decode(latents / self.scale + self.shift).sample


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, and a residual connection."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        self.shortcut = width_in != width_out

    def forward(self, x: Tensor) -> Tensor:
        """(N, width_in, h, w) to (N, width_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.shortcut else x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all places."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) to the same shape."""
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[-2:]))


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution, and the ``downsample`` or ``upsample`` (with ``conv``) that may follow."""

    def __init__(self, width_in: int, width_out: int, blocks: int, groups: int, resample: str | None) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        if resample == "downsample":
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(width_out, width_out, 3, stride=2)})
        if resample == "upsample":
            self.upsample = nn.ModuleDict({"conv": nn.Conv2d(width_out, width_out, 3, padding=1)})
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.resample == "downsample":
            return self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if self.resample == "upsample":
            return self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """The convolutional encoder of FLUX: (N, 3, H, W) pictures to latents, or to their mean and log-variance."""

    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        widths = [c.channels * m for m in c.multipliers]
        self.conv_in = nn.Conv2d(3, c.channels, 3, padding=1)
        last = len(widths) - 1
        self.down = nn.ModuleList(
            _Level(c.channels if i == 0 else widths[i - 1], w, c.blocks, c.groups, "downsample" if i < last else None)
            for i, w in enumerate(widths)
        )
        self.mid = _Middle(widths[-1], c.groups)
        self.norm_out = nn.GroupNorm(c.groups, widths[-1], eps=1e-6)
        out = c.latent_channels * (2 if c.posterior else 1)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)
        self.quant_conv = nn.Conv2d(out, out, 1) if c.quant else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) pictures to (N, z, h, w) latents, or (N, 2 z, h, w) means and log-variances."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    """The convolutional decoder of FLUX: (N, z, h, w) latents to (N, 3, H, W) pictures."""

    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        widths = [c.channels * m for m in c.multipliers]
        last = len(widths) - 1
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.quant else nn.Identity()
        self.conv_in = nn.Conv2d(c.latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], c.groups)
        self.up = nn.ModuleList(
            _Level(widths[min(i + 1, last)], w, c.blocks + 1, c.groups, "upsample" if i > 0 else None)
            for i, w in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(c.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(N, z, h, w) latents to (N, 3, H, W) pictures."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LatentDecoder(nn.Module):
    """Scaled latents (N, z, h, w) to pictures: the decoder and the scaling that it undoes."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        # Training moves the statistics, so latents have unit variance; afterwards they are constants.
        self.bn = nn.BatchNorm2d(config.features, eps=1e-4, affine=False) if config.statistics else None

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The measured mean and deviation of every latent channel, (z, 1, 1): constants, also in training mode."""
        assert self.bn is not None and self.bn.running_mean is not None and self.bn.running_var is not None
        return self.bn.running_mean[:, None, None], (self.bn.running_var + self.bn.eps).sqrt()[:, None, None]

    def decode(self, latents: Float[Tensor, "N z h w"]) -> Float[Tensor, "N 3 H W"]:
        """Pictures in about [-1, 1] (or whatever range the encoder was given)."""
        if self.bn is None:
            latents = latents / self.config.scale + self.config.shift
        else:
            mean, std = self.statistics()
            latents = latents * std + mean
        if self.config.fold > 1:
            latents = F.pixel_shuffle(latents, self.config.fold)
        latents = latents.to(self.decoder.conv_in.weight.dtype)
        quiet = not torch.is_grad_enabled() or not (latents.requires_grad or self.decoder.conv_in.weight.requires_grad)
        return (self._few(self.decoder, latents) if quiet else self.decoder(latents)).float()

    def _few(self, work: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """``work`` applied to the pictures, on a CPU in small batches with channels last: the largest activations then
        fit the processor's cache (measured: encoding 1.8 x as fast, decoding 1.5 x). Published sizes stay channels
        first: in channels-last format their group norm differs by 4e-5."""
        if images.device.type != "cpu":
            return work(images)
        if self.config.groups < 32:
            images = images.contiguous(memory_format=torch.channels_last)
        return torch.cat([work(some) for some in images.split(16)])


class Autoencoder(LatentDecoder):
    """FLUX's autoencoder: (N, 3, H, W) in [-1, 1] to latents (N, z, H/8, W/8) and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        encoder = Encoder(config)  # first, since fresh weights are drawn in this order
        super().__init__(config)
        self.encoder = encoder

    def moments(self, images: Float[Tensor, "N 3 H W"]) -> Tensor:
        """The encoder's output before scaling: the mean, followed by the log-variance where there is a posterior."""
        stride = self.config.downsample
        if images.shape[-1] % stride or images.shape[-2] % stride:
            raise ValueError(f"picture sides must be multiples of {stride}, not {tuple(images.shape[-2:])}")
        return self.encoder(images.to(self.encoder.conv_in.weight.dtype)).float()

    def encode(self, images: Float[Tensor, "N 3 H W"], eps: Tensor | None = None) -> Float[Tensor, "N z h w"]:
        """Scaled latents: of the posterior's mean, or of mean + std * ``eps`` when noise is given."""
        return sampled(self.distribution(images), self.config.features, eps)

    def distribution(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N zz h w"]:
        """The distribution of the scaled latents: their mean, followed by their standard deviation where the config has
        a ``posterior``."""
        z = self._few(self.moments, images) if not torch.is_grad_enabled() else self.moments(images)
        z, *logvar = (F.pixel_unshuffle(part, self.config.fold) for part in z.chunk(1 + self.config.posterior, 1))
        deviation = [(0.5 * v).exp() for v in logvar]
        if self.bn is None:
            return self.config.scale * torch.cat([z - self.config.shift, *deviation], 1)
        mean, std = self.statistics()
        return torch.cat([z - mean, *deviation], 1) / std.repeat(1 + len(deviation), 1, 1)


class Quantised(nn.Module):
    """A small picture tokenizer: FLUX's encoder and decoder around finite scalar quantisation (arXiv 2309.15505).

    Every latent channel is squashed to 0 .. L - 1 and rounded; the digits of a place are one code. Gradients pass the
    rounding as if it were not there. No codebook has to be learned, so none can collapse."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _column(self, values: list, like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]

    def digits(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N c h w"]:
        """Whole numbers from 0 to levels - 1 in each channel, through which the encoder can be trained."""
        stride = self.config.downsample
        if images.shape[-1] % stride or images.shape[-2] % stride:
            raise ValueError(f"picture sides must be multiples of {stride}, not {tuple(images.shape[-2:])}")
        z = self.encoder(images.to(self.encoder.conv_in.weight.dtype)).float()
        u = torch.sigmoid(z) * self._column([n - 1 for n in self.config.levels], z)
        return u + (u.round() - u).detach()

    def picture(self, digits: Float[Tensor, "N c h w"]) -> Float[Tensor, "N 3 H W"]:
        """Pictures in about [-1, 1] of digits."""
        z = digits * self._column([2 / (n - 1) for n in self.config.levels], digits) - 1
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype)).float()

    def encode(self, images: Float[Tensor, "N 3 H W"]) -> Int[Tensor, "N h w"]:
        """Codes: the digits of a place in one number, the first channel counting ones."""
        some = images.contiguous(memory_format=torch.channels_last).split(16)  # as Autoencoder.encode
        digits = torch.cat([self.digits(x) for x in some])
        return (
            (digits * self._column([prod(self.config.levels[:i]) for i in range(digits.shape[1])], digits))
            .sum(1)
            .long()
        )

    def decode(self, codes: Int[Tensor, "N h w"]) -> Float[Tensor, "N 3 H W"]:
        """Pictures in about [-1, 1]."""
        levels = self.config.levels
        digits = [codes // prod(levels[:i]) % n for i, n in enumerate(levels)]
        return self.picture(torch.stack(digits, 1).to(torch.float32))


class Emu3(nn.Module):
    """Emu3's tokenizer (transformers' ``Emu3VQVAE``): 32768 codes, one for 8 x 8 pixels; a still picture is seen as it
    is in a film, repeated. ``folder`` holds it, alone, inside a whole Emu3 model, or as ``BAAI/Emu3-VisionTokenizer``
    has it; it is read when the first picture comes and is no part of the state.

    Pictures are taken as they are, without the resizing of Emu3's image processor."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self._read: list[Any] = []  # in a list, so that it is no submodule

    def files(self) -> list[Path]:
        """The files of its weights; none where the config names no folder."""
        folder = Path(self.config.folder or "")
        return sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin")) if self.config.folder else []

    def inner(self, device: torch.device) -> Any:
        """The network on a device. Raises ``ValueError`` where the config names no folder that holds one."""
        if not self._read:
            folder = self.config.folder
            if not folder or not (Path(folder) / "config.json").is_file():
                raise ValueError(
                    f"pictures go through Emu3's tokenizer: autoencoder.folder must name a transformers Emu3VQVAE "
                    f"folder, not {folder!r} (codes that were computed beforehand need none)"
                )
            read = _emu3(Path(folder)).eval().requires_grad_(False)
            codes, stride = read.config.codebook_size, 2 ** (len(read.config.channel_multiplier) - 1)
            if codes > self.config.codebook or stride != self.config.downsample:
                raise ValueError(
                    f"{folder} has {codes} codes of {stride} x {stride} pixels; Emu3's tokenizer has at most "
                    f"{self.config.codebook} of {self.config.downsample} x {self.config.downsample}"
                )
            self._read.append(read)
        return self._read[0].to(device)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "N 3 H W"]) -> Int[Tensor, "N h w"]:
        """Codes."""
        sizes = torch.tensor([images.shape[-2:]] * len(images))
        return torch.stack(list(self.inner(images.device).encode(images, sizes).image_tokens))

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "N h w"]) -> Float[Tensor, "N 3 H W"]:
        """Pictures in about [-1, 1]."""
        read = self.inner(codes.device)
        if (most := int(codes.max())) >= read.config.codebook_size:
            raise ValueError(f"code {most} is none of the {read.config.codebook_size} of {self.config.folder}")
        return read.decode(codes)


_ORIGINAL = (  # names of BAAI/Emu3-VisionTokenizer -> names of transformers
    (r"\.(q|k|v)\.(weight|bias)$", r".\1_proj.\2"),
    (r"\.proj_out\.", ".out_proj."),
    (r"\.mid\.attn_1\.norm\.", ".mid.attn_norm."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"^(encoder|decoder)\.(down|up)\.", r"\1.\2_block.\2."),
    (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."),
)
_ORIGINAL_CONFIG = {"ch": "base_channels", "ch_mult": "channel_multiplier", "double_z": "double_latent"}


def _emu3(folder: Path) -> Any:
    """The ``Emu3VQVAE`` of a folder: its own, that of a whole Emu3 model of transformers (``vq_config``, weights under
    ``vqmodel``), or the original release (``Emu3VisionVQ``). Raises ``ValueError`` for any other folder."""
    from safetensors import safe_open
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    kind, row = "a transformers Emu3VQVAE", json.loads((folder / "config.json").read_text())
    whole, original = "vq_config" in row, row.get("model_type") == "Emu3VisionVQ"
    if not (whole or original):
        return pretrained(Emu3VQVAE, folder, kind)
    given = row["vq_config"] if whole else {_ORIGINAL_CONFIG.get(n, n): v for n, v in row.items() if n != "model_type"}
    if original:
        given |= {"hidden_size": given["base_channels"] * given["channel_multiplier"][-1]}
        given |= {"latent_channels": given["z_channels"]}
    with reading(folder, kind):
        model, state = Emu3VQVAE(Emu3VQVAEConfig(**given)), {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  a handle, not a dictionary
                    _, found, inner = name.rpartition("vqmodel.") if whole else ("", "there", name)
                    if found:
                        state[_renamed(inner) if original else inner] = opened.get_tensor(name)
    own = model.state_dict()
    state = {n: t.view(own[n].shape) if n in own and t.numel() == own[n].numel() else t for n, t in state.items()}
    errors = [f"it lacks {n}" for n in own if n not in state and not n.endswith("num_batches_tracked")]
    errors += [f"{n} is unknown" for n in state if n not in own]
    errors += [f"{n} has shape {tuple(t.shape)}" for n, t in state.items() if n in own and t.shape != own[n].shape]
    if errors:
        more = f" and {len(errors) - 6} more" if len(errors) > 6 else ""
        raise ValueError(f"{folder} is not {kind} as its config.json says: {'; '.join(errors[:6])}{more}")
    model.load_state_dict(state, strict=False)
    return model


def _renamed(name: str) -> str:
    for pattern, replacement in _ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name
