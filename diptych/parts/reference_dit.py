"""OmniGen2's diffusion transformer (arXiv 2506.18871): text, reference pictures and the target in one sequence.

::

    condition states ── norm, linear ──────────────► condition refiner ──┐
    reference latents ── linear + index vector ────► reference refiner ──┼──► joint blocks ── norm, linear ──► value
    noised latents ── linear ──────────────────────► picture refiner ────┘

The condition refiner has no time. Every reference is refined alone, with the time of the target. Samples are packed
without padding and attention stays inside documents, so a sample does not depend on the others in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.checks import at_least
from diptych.core.tensors import Float, Int, Tensor
from diptych.parts.attention import inverse_permutation, permute, sdpa
from diptych.parts.dit import Rotation, grid_coordinates
from diptych.parts.norms import RMSNorm
from diptych.parts.positions import TimestepEmbedding

TIME_WIDTH = 1024  # the largest width of time features


@dataclass(frozen=True)
class ReferenceDitConfig:
    """Sizes; the defaults are those of the released OmniGen2.

    ``refiners``        blocks of each of the three refiners
    ``axes``            features of a head that are rotated by each of a token's three position ids
    ``axes_lens``       the largest number of ids on each axis
    ``text_width``      width of the condition states
    ``multiple_of``     the hidden width of the MLP is 4 ``hidden_size`` (times ``multiplier``, where given) rounded
                        up to a multiple of this
    ``timestep_scale``  factor of a time in [0, 1] before the sinusoids
    ``references``      the most reference pictures of a sample
    """

    hidden_size: int = 2520
    layers: int = 32
    refiners: int = 2
    heads: int = 21
    kv_heads: int = 7
    axes: tuple[int, int, int] = (40, 40, 40)
    axes_lens: tuple[int, int, int] = (1024, 1664, 1664)
    text_width: int = 2048
    multiple_of: int = 256
    multiplier: float | None = None
    norm_eps: float = 1e-5
    timestep_scale: float = 1000.0
    theta: float = 10_000.0
    references: int = 5

    def __post_init__(self) -> None:
        at_least(1, self, "hidden_size", "layers", "heads", "kv_heads", "text_width", "multiple_of", "references")
        at_least(0, self, "axes", "refiners")
        if self.hidden_size % self.heads or sum(self.axes) != self.hidden_size // self.heads:
            raise ValueError(f"axes {self.axes} must add up to hidden_size / heads = {self.hidden_size}/{self.heads}")
        if self.heads % self.kv_heads or any(a % 2 for a in self.axes):
            raise ValueError(f"heads must be a multiple of kv_heads, and axes even: {self}")

    @property
    def inner(self) -> int:
        """Hidden width of the MLP."""
        width = 4 * self.hidden_size
        width = width if self.multiplier is None else int(self.multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def time_width(self) -> int:
        """Width of the features of time."""
        return min(self.hidden_size, TIME_WIDTH)


class Reference(NamedTuple):
    """Latent tokens of a reference picture, and its (rows, columns)."""

    tokens: Float[Tensor, "m f"]
    grid: tuple[int, int]


class NoisedPicture(NamedTuple):
    """A target: its noised tokens, its time in [0, 1] as the network counts it (1 is data), its condition states and
    references."""

    x: Float[Tensor, "n f"]
    grid: tuple[int, int]
    t: Float[Tensor, ""]
    condition: Float[Tensor, "L D"]
    references: tuple[Reference, ...] = ()


class Documents:
    """Full attention inside consecutive documents of given lengths, without padding: documents of one length share one
    call."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.shapes: list[tuple[int, int]] = []
        starts = torch.tensor([0, *lengths]).cumsum(0)
        order = []
        for length in sorted({*lengths} - {0}):
            members = torch.tensor([i for i, n in enumerate(lengths) if n == length])
            order.append((starts[members][:, None] + torch.arange(length)).flatten())
            self.shapes.append((len(members), length))
        self.order = torch.cat(order).to(device)
        self.back = inverse_permutation(self.order)
        self.one = len(self.shapes) == 1

    def __call__(
        self, q: Float[Tensor, "T H d"], k: Float[Tensor, "T K d"], v: Float[Tensor, "T K d"]
    ) -> Float[Tensor, "T H d"]:
        """The attended values of every token."""
        q, k, v = (x if self.one else permute(x, self.order) for x in (q, k, v))
        sizes = [a * b for a, b in self.shapes]
        groups = zip(self.shapes, *(x.split(sizes) for x in (q, k, v)), strict=True)
        out = torch.cat([sdpa(*(x.unflatten(0, shape) for x in qkv)).flatten(0, 1) for shape, *qkv in groups])
        return out if self.one else permute(out, self.back)


class ReferenceBlock(nn.Module):
    """RMS norms before and after grouped-query attention and a SwiGLU MLP. With ``modulated``, time scales the inputs
    of both and gates (tanh) their outputs."""

    def __init__(self, c: ReferenceDitConfig, modulated: bool) -> None:
        super().__init__()
        d, self.head = c.hidden_size, c.hidden_size // c.heads
        self.modulation = nn.Linear(c.time_width, 4 * d) if modulated else None
        names = ("before", "after", "mlp_before", "mlp_after")
        self.norms = nn.ModuleDict({n: RMSNorm(d, eps=c.norm_eps) for n in names})
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(d, c.kv_heads * self.head, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head, eps=1e-5), RMSNorm(self.head, eps=1e-5)
        self.gate_proj, self.up_proj = nn.Linear(d, c.inner, bias=False), nn.Linear(d, c.inner, bias=False)
        self.down_proj = nn.Linear(c.inner, d, bias=False)

    def modulated(self, time: Float[Tensor, "N w"], samples: Int[Tensor, " T"]) -> list[Tensor]:
        """(1 + scale, gate, 1 + scale of the MLP, gate of the MLP), a row per token."""
        assert self.modulation is not None
        scale, gate, scale_mlp, gate_mlp = self.modulation(F.silu(time)).chunk(4, -1)
        return [x[samples] for x in (1 + scale, gate.tanh(), 1 + scale_mlp, gate_mlp.tanh())]

    def attention(self, x: Float[Tensor, "T d"], turn: Rotation, attend: Documents) -> Float[Tensor, "T d"]:
        """Queries and keys are normed before they are rotated; heads of a group share a key and a value."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(turn(self.q_norm(q)), turn(self.k_norm(k)), v).flatten(-2))

    def mlp(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
        """SwiGLU: down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(
        self,
        x: Float[Tensor, "T d"],
        turn: Rotation,
        attend: Documents,
        time: Float[Tensor, "N w"] | None = None,
        samples: Int[Tensor, " T"] | None = None,
    ) -> Float[Tensor, "T d"]:
        """``time`` holds the features of N samples; ``samples`` is the sample of every token."""
        n = self.norms
        if self.modulation is None:
            x = x + n["after"](self.attention(n["before"](x), turn, attend))
            return x + n["mlp_after"](self.mlp(n["mlp_before"](x)))
        assert time is not None and samples is not None
        scale, gate, scale_mlp, gate_mlp = self.modulated(time, samples)
        x = x + gate * n["after"](self.attention(n["before"](x) * scale, turn, attend))
        return x + gate_mlp * n["mlp_after"](self.mlp(n["mlp_before"](x) * scale_mlp))


class ReferenceDit(nn.Module):
    """The network of a config; a latent token has ``features`` numbers."""

    def __init__(self, config: ReferenceDitConfig, features: int) -> None:
        super().__init__()
        c, self.config = config, config
        d = c.hidden_size
        self.time = TimestepEmbedding(c.time_width)
        self.condition_norm, self.condition_in = RMSNorm(c.text_width, eps=c.norm_eps), nn.Linear(c.text_width, d)
        self.enter, self.enter_reference = nn.Linear(features, d), nn.Linear(features, d)
        self.reference_index = nn.Parameter(torch.empty(c.references, d))

        def stack(layers: int, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList(ReferenceBlock(c, modulated) for _ in range(layers))

        self.picture_refiner, self.reference_refiner = stack(c.refiners), stack(c.refiners)
        self.condition_refiner = stack(c.refiners, modulated=False)
        self.layers = stack(c.layers)
        self.modulation = nn.Linear(c.time_width, d)
        self.leave = nn.Linear(d, features)

    def forward(self, pictures: Sequence[NoisedPicture]) -> list[Float[Tensor, "_ f"]]:
        """The velocity from noise to data, a value per token of every picture.

        Raises ``ValueError`` for more references than the network has index vectors."""
        device, dtype = pictures[0].x.device, self.enter.weight.dtype
        many = max(len(p.references) for p in pictures)
        if many > self.config.references:
            raise ValueError(f"the model takes at most {self.config.references} reference pictures, not {many}")
        time = self.time(self.config.timestep_scale * torch.stack([p.t for p in pictures]).float())
        places = [coordinates(len(p.condition), [r.grid for r in p.references], p.grid, device) for p in pictures]
        words = self._refine(
            self.condition_refiner,
            self.condition_in(self.condition_norm(torch.cat([p.condition for p in pictures]).to(dtype))),
            [q[:1] for q in places],
        )
        x = self._refine(
            self.picture_refiner,
            self.enter(torch.cat([p.x for p in pictures]).to(dtype)),
            [q[-1:] for q in places],
            time,
        )
        seen: list[list[Tensor]] = [[] for _ in pictures]
        if many:
            each = [r.tokens for p in pictures for r in p.references]
            index = torch.tensor(
                [k for p in pictures for k, r in enumerate(p.references) for _ in r.tokens], device=device
            )
            tokens = self.enter_reference(torch.cat(each).to(dtype)) + self.reference_index[index]
            refined = iter(
                self._refine(self.reference_refiner, tokens, [q[1:-1] for q in places], time).split(
                    [len(r) for r in each]
                )
            )
            seen = [[next(refined) for _ in p.references] for p in pictures]
        joined = [
            torch.cat([w, *r, y])
            for w, r, y in zip(
                words.split([len(p.condition) for p in pictures]),
                seen,
                x.split([len(p.x) for p in pictures]),
                strict=True,
            )
        ]
        whole = [[torch.cat(q)] for q in places]
        out = self._refine(self.layers, torch.cat(joined), whole, time).split([len(j) for j in joined])
        drawn = [y[-len(p.x) :] for y, p in zip(out, pictures, strict=True)]
        sizes = [len(y) for y in drawn]
        samples = torch.arange(len(drawn), device=device).repeat_interleave(
            torch.tensor(sizes, device=device), output_size=sum(sizes)
        )
        normed = F.layer_norm(torch.cat(drawn), out[0].shape[-1:], eps=1e-6)
        return list(self.leave(normed * (1 + self.modulation(F.silu(time)))[samples]).split(sizes))

    def _refine(
        self,
        layers: nn.ModuleList,
        x: Float[Tensor, "T d"],
        places: Sequence[Sequence[Int[Tensor, "_ 3"]]],
        time: Float[Tensor, "N w"] | None = None,
    ) -> Float[Tensor, "T d"]:
        """``x`` through blocks that attend inside every document of every sample; ``places`` are the position ids of
        the documents, sample by sample."""
        documents = [q for sample in places for q in sample]
        counts = torch.tensor([sum(map(len, sample)) for sample in places], device=x.device)
        samples = torch.arange(len(places), device=x.device).repeat_interleave(counts, output_size=len(x))
        turn = Rotation(torch.cat(documents), self.config.axes, self.config.theta)
        attend = Documents([len(q) for q in documents], x.device)
        for layer in layers:
            x = layer(x, turn, attend, time, samples)
        return x

    def blocks(self) -> Iterator[nn.Module]:
        """Every block, the refiners' first."""
        yield from self.reference_refiner
        yield from self.trunk()

    def trunk(self) -> Iterator[nn.Module]:
        """The blocks that every forward calls: all but those of the references."""
        yield from self.condition_refiner
        yield from self.picture_refiner
        yield from self.layers

    def initialise(self, generator: torch.Generator) -> None:
        """Xavier-uniform weights and zero biases; normal 0.02 for time, index vectors and (cut at two deviations) the
        condition's linear; modulations and the output layer are zero, so a fresh network returns zeros."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (m for m in self.time.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        nn.init.trunc_normal_(self.condition_in.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
        nn.init.normal_(self.reference_index, std=0.02, generator=generator)
        blocks = [b.modulation for b in self.blocks() if isinstance(b, ReferenceBlock) and b.modulation is not None]
        for linear in (*blocks, self.modulation, self.leave):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def coordinates(
    words: int, references: Sequence[tuple[int, int]], grid: tuple[int, int], device: torch.device | str = "cpu"
) -> list[Int[Tensor, "_ 3"]]:
    """Position ids of the condition, of every reference and of the picture to draw. Word i stands at (i, i, i); a
    picture at (offset, row, column), where the offset grows from the number of words by the longer side of every
    reference before it."""
    out, offset = [torch.arange(words, device=device)[:, None].expand(-1, 3)], words
    for reference in references:
        out.append(grid_coordinates(reference, offset, device))
        offset += max(reference)
    return [*out, grid_coordinates(grid, offset, device)]
