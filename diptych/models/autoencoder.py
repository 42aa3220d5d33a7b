"""The image autoencoder as something to train: pixels to latents and back, where no pretrained one can be had.

loss = w_mse |decode(z + s e) - x|^2 + w_l1 |decode(z + s e) - x|,  e ~ N(0, 1),  s ~ U(0, noise)

The latent is normalised to unit variance per channel by batch statistics, and the decoder sees it with a little noise,
so it forgives what a generator gets slightly wrong. Families use the result as their frozen ``autoencoder`` part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diptych.core.batch import Batch
from diptych.core.losses import Losses, Term
from diptych.core.noise import Noise
from diptych.core.sample import Sample
from diptych.core.sequence import Kind, Segment
from diptych.core.sequence import Sequence as Laid
from diptych.core.tensors import NONE, to_float
from diptych.models.protocol import NOTHING, Drop, Trainable
from diptych.parts.autoencoder import Autoencoder, AutoencoderConfig, tiny_autoencoder
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


class AutoencoderTraining(Trainable):
    """Trains ``parts.autoencoder.Autoencoder`` on whatever pictures samples hold."""

    family = "autoencoder"
    parts: ClassVar = {"encoder": ("autoencoder.encoder.*",), "decoder": ("autoencoder.decoder.*",)}

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.autoencoder = Autoencoder(config.autoencoder)
        if self.autoencoder.bn is None:
            raise ValueError("only an autoencoder with 'statistics' is trained here; a published one has its scale")

    def initialise(self, seed: int) -> None:
        """Kaiming-normal convolutions."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.autoencoder.encoder.down
        yield from self.autoencoder.decoder.up

    def trunk(self) -> Iterator[nn.Module]:
        return iter(())  # every shape of pictures is another call

    def lay_out(self, sample: Sample, drop: Drop = NOTHING) -> Laid:
        """Every picture as one segment; texts are ignored."""
        stride = self.config.autoencoder.downsample
        segments = []
        for image in sample.images():
            w, h = (max(stride, side // stride * stride) for side in image.pixels.size)
            grid = (h // stride, w // stride)
            ids = (NONE,) * (grid[0] * grid[1])
            segments.append(Segment(Kind.CLEAN, ids, image=to_tensor(image.pixels, (w, h)), grid=grid, full=True))
        if not segments:
            raise ValueError(f"sample {sample.id!r} has no picture to train an autoencoder on")
        return Laid(sample.id, tuple(segments))

    def counts(self, batch: Batch) -> dict[str, float]:
        pixels = float(sum(g.images.numel() for g in batch.of(Kind.CLEAN)))
        return {"mse": pixels, "l1": pixels}

    def losses(self, batch: Batch, noise: Noise) -> Losses:
        counts, terms = self.counts(batch), {"mse": [], "l1": []}
        for g in batch.of(Kind.CLEAN):
            images = to_float(g.images).contiguous(memory_format=torch.channels_last)
            z = self.autoencoder.bn(self.autoencoder.moments(images))  # batch statistics; the running ones follow
            eps = [
                self.config.noise * noise.uniform(o, f"level{i}") * noise.normal(o, f"noise{i}", tuple(z.shape[1:]))
                for o, i in zip(g.owners, g.ordinals, strict=True)
            ]
            error = self.autoencoder.decode(z + torch.stack(eps).to(z.device)) - images
            terms["mse"].append(error.square().sum())
            terms["l1"].append(error.abs().sum())
        return {name: Term(torch.stack(sums).sum(), counts[name]) for name, sums in terms.items()}
