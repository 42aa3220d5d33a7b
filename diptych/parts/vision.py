"""SigLIP vision encoder over grids of any shape.

Its own 60 lines rather than transformers' class: pictures of unequal shape, a linear patch embedding in the order that
the published checkpoints store, and no dependency for the tiny models. A test holds it equal to transformers' SigLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diptych.core.batch import Pictures
from diptych.core.noise import Noise
from diptych.core.tensors import Bool, Float, Int, Tensor
from diptych.parts.attention import sdpa
from diptych.parts.positions import grid_places


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a SigLIP encoder, in the field names of transformers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int  # pixels on a side that the position table covers
    layer_norm_eps: float = 1e-6
    pooling: bool = False  # keep the attention-pooling head of a checkpoint that has one; features do not use it

    @property
    def side(self) -> int:
        """Patches on a side of the position table."""
        return self.image_size // self.patch_size


def kept(group: Pictures, noise: Noise) -> Bool[Tensor, "N n"]:
    """Which tokens of a group's pictures are not blanked: each of a picture ``masked`` by r stays with probability
    1 - r, drawn from the picture's own noise (arXiv 2603.16139, 3.4)."""
    draws = [
        noise.uniform(o, f"mask{i}", (group.tokens.shape[1],))
        for o, i in zip(group.owners, group.ordinals, strict=True)
    ]
    return (torch.stack(draws) >= group.masked).to(group.tokens.device)


def blanked(tokens: Float[Tensor, "N n d"], group: Pictures, noise: Noise) -> Float[Tensor, "N n d"]:
    """The tokens of a group's pictures as they are read: zeros where they are not ``kept``."""
    return tokens * kept(group, noise)[..., None] if group.masked else tokens


def patchify(images: Float[Tensor, "N c H W"], patch: int) -> Float[Tensor, "N n f"]:
    """Patch features in the order (row in patch, column in patch, channel), patches row-major."""
    if images.shape[-2] % patch or images.shape[-1] % patch:
        raise ValueError(f"a {images.shape[-2]}x{images.shape[-1]} picture does not divide into patches of {patch}")
    return rearrange(images, "N c (h p) (w q) -> N (h w) (p q c)", p=patch, q=patch)


class Block(nn.Module):
    """One pre-norm block of the vision transformer: attention over a picture's patches, then an MLP."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        d = c.hidden_size
        self.heads = c.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(d, c.layer_norm_eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(d, c.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, c.intermediate_size), "fc2": nn.Linear(c.intermediate_size, d)})

    def forward(self, x: Tensor) -> Tensor:
        """(N, n, d) to the same shape."""
        h, a = self.layer_norm1(x), self.self_attn
        q, k, v = (a[name](h).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + a["out_proj"](sdpa(q, k, v).flatten(-2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class Pooling(nn.Module):
    """SigLIP's pooling head, (N, n, d) to (N, d): a learned probe attends to all features, then a residual MLP."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        d = c.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, d))
        self.attention = nn.MultiheadAttention(d, c.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(d, c.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, c.intermediate_size), "fc2": nn.Linear(c.intermediate_size, d)})

    def forward(self, x: Float[Tensor, "N n d"]) -> Float[Tensor, "N d"]:
        """One vector for each picture."""
        x = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return (x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layernorm(x)), approximate="tanh")))[:, 0]


class VisionEncoder(nn.Module):
    """Features of every patch after the final norm, (N, n, d), for pictures of one shape in [-1, 1].

    ``channels`` other than 3 make it read feature maps (latents) instead of pictures."""

    def __init__(self, config: VisionConfig, channels: int = 3) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Linear(channels * c.patch_size**2, c.hidden_size)
        self.position_embedding = nn.Embedding(c.side**2, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.head = Pooling(c) if c.pooling else None

    def forward(
        self,
        images: Float[Tensor, "N c H W"],
        places: Int[Tensor, " n"] | None = None,
        embedded: Float[Tensor, "N n d"] | None = None,
    ) -> Float[Tensor, "N n d"]:
        """``places`` are the rows of the position table, unless the grid's own in a table of ``side``; ``embedded`` is
        what ``embed`` gave, where it is at hand."""
        if embedded is not None:
            return self.features(embedded)
        grid = (images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
        if places is None:
            places = grid_places(grid, self.config.side, images.device)
        return self.features(self.embed(images, self.position_embedding(places)))

    def embed(self, images: Float[Tensor, "N c H W"], positions: Float[Tensor, "n d"]) -> Float[Tensor, "N n d"]:
        """Patches and their positions: what the layers take."""
        patches = patchify(images, self.config.patch_size).to(self.patch_embedding.weight.dtype)
        return self.patch_embedding(patches) + positions

    def features(self, x: Float[Tensor, "N n d"]) -> Float[Tensor, "N n d"]:
        """The layers and the final norm, over what ``embed`` gives."""
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)

    def resized(self, grid: tuple[int, int]) -> Float[Tensor, "n d"]:
        """Positions of a (rows, columns) grid: the table, resized bicubically to any other grid than its own."""
        side, table = self.config.side, self.position_embedding.weight
        if grid == (side, side):
            return table
        square = rearrange(table, "(h w) d -> 1 d h w", h=side).float()
        other = F.interpolate(square, grid, mode="bicubic", align_corners=False)
        return rearrange(other, "1 d h w -> (h w) d").to(table.dtype)
