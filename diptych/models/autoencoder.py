"""The image autoencoder as something to train: pixels to latents and back, where no pretrained one can be had.

loss = w_mse |decode(z + s e) - x|^2 + w_l1 |decode(z + s e) - x|,  e ~ N(0, 1),  s ~ U(0, noise)

The latent is normalised to unit variance per channel by batch statistics, and the decoder sees it with a little noise,
so it forgives what a generator gets slightly wrong. With ``levels`` z is rounded instead (a picture tokenizer) and the
decoder sees it exactly. Families use the result as their frozen ``autoencoder`` part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diptych.core.batch import Batch, Pictures
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.losses import Losses, Term
from diptych.core.noise import Noise
from diptych.core.sample import Sample
from diptych.core.tensors import NONE, Tensor, to_float
from diptych.models.protocol import NOTHING, Drop, Trainable
from diptych.parts.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Quantised,
    build_autoencoder,
    tiny_autoencoder,
    tiny_tokenizer,
)
from diptych.parts.images import to_tensor
from diptych.parts.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """The autoencoder's sizes and the most noise its decoder is trained to forgive."""

    autoencoder: AutoencoderConfig
    noise: float = 0.3

    @staticmethod
    def tiny() -> Config:
        """The one that the tiny families use."""
        return Config(tiny_autoencoder())

    @staticmethod
    def vq_tiny() -> Config:
        """A tokenizer of 64 x 64 pixels into 16 x 16 codes of 1000."""
        return Config(tiny_tokenizer(), noise=0.0)


class AutoencoderTraining(Trainable):
    """Trains an ``Autoencoder`` or a ``Quantised`` of ``parts.autoencoder`` on whatever pictures samples hold."""

    family = "autoencoder"
    parts: ClassVar = {"encoder": ("autoencoder.encoder.*",), "decoder": ("autoencoder.decoder.*",)}

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        autoencoder = build_autoencoder(config.autoencoder)
        quantised = isinstance(autoencoder, Quantised)
        if not isinstance(autoencoder, Autoencoder | Quantised) or not (quantised or config.autoencoder.statistics):
            raise ValueError(
                "only an autoencoder of kind 'flux' with 'statistics', or of kind 'vq', is trained here, "
                f"not {config.autoencoder.kind!r} with statistics={config.autoencoder.statistics}"
            )
        self.autoencoder = autoencoder

    def initialise(self, seed: int) -> None:
        """Kaiming-normal convolutions."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> Iterator[nn.Module]:
        """The levels of the encoder and of the decoder."""
        yield from self.autoencoder.encoder.down
        yield from self.autoencoder.decoder.up

    def trunk(self) -> Iterator[nn.Module]:
        """None: the levels run once for every picture shape."""
        return iter(())  # every shape of pictures is another call

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Layout:
        """Every picture as one segment; texts are ignored."""
        stride = self.config.autoencoder.downsample
        segments = []
        for image in sample.images():
            w, h = (max(stride, side // stride * stride) for side in image.pixels.size)
            grid = (h // stride, w // stride)
            ids = (NONE,) * (grid[0] * grid[1])
            picture = to_tensor(image.pixels, (w, h))
            segments.append(Segment(Kind.CLEAN, ids, image=picture, grid=grid, full=True, generated=True))
        if not segments:
            raise ValueError(f"sample {sample.id!r} has no picture to train an autoencoder on")
        return Layout(sample.id, tuple(segments))

    def counts(self, batch: Batch) -> dict[str, float]:
        """``mse`` and ``l1``: values of all pixels."""
        pixels = float(sum(g.pixels.numel() for g in batch.of(Kind.CLEAN)))
        return {"mse": pixels, "l1": pixels}

    def losses(self, batch: Batch, noise: Noise) -> Losses:
        """Squared and absolute error of the reconstruction, summed over pixels and channels."""
        counts = self.counts(batch)
        terms: dict[str, list[Tensor]] = {"mse": [], "l1": []}
        for g in batch.of(Kind.CLEAN):
            images = to_float(g.pixels).contiguous(memory_format=torch.channels_last)
            error = self._reconstruct(images, g, noise) - images
            terms["mse"].append(error.square().sum())
            terms["l1"].append(error.abs().sum())
        return {name: Term(torch.stack(sums).sum(), counts[name]) for name, sums in terms.items()}

    def _reconstruct(self, images: Tensor, g: Pictures, noise: Noise) -> Tensor:
        """The decoder's output for the noised (or rounded) latents of the pictures."""
        if isinstance(self.autoencoder, Quantised):
            return self.autoencoder.picture(self.autoencoder.digits(images))
        assert self.autoencoder.bn is not None
        z = self.autoencoder.bn(self.autoencoder.moments(images))  # batch statistics; the running ones follow
        eps = [
            self.config.noise * noise.uniform(o, f"level{i}") * noise.normal(o, f"noise{i}", tuple(z.shape[1:]))
            for o, i in zip(g.owners, g.ordinals, strict=True)
        ]
        return self.autoencoder.decode(z + torch.stack(eps).to(z.device))
