"""Diffusion transformers conditioned on a sequence: FLUX-style double streams, and a Z-Image-style single stream.

Both take groups of pictures of one shape each: their tokens, times in [0, 1] (0 data, 1 noise) and padded conditions.
They return a value per picture token. Every block is called once for all groups, so that it can be sharded separately.
Positions are rotary embeddings of row and column, and of the place in the condition where the first of ``axes`` is not
0, so any grid can be generated. Only the time modulates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.checks import at_least
from diptych.core.tensors import Bool, Float, Int, Tensor
from diptych.parts.attention import padded_sdpa
from diptych.parts.norms import RMSNorm
from diptych.parts.positions import TimestepEmbedding


@dataclass(frozen=True)
class DitConfig:
    """Sizes. ``double``: ``layers`` blocks with weights of their own for picture and condition, joined in attention.
    ``single``: ``layers`` blocks over both, after ``refiners`` blocks over each alone. ``axes`` are the features of a
    head that turn with the position in the condition (0 in FLUX, which gives text none), the row and the column."""

    kind: Literal["double", "single"]
    hidden_size: int
    layers: int
    heads: int
    axes: tuple[int, int, int]
    refiners: int = 0
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        at_least(1, self, "hidden_size", "layers", "heads")
        at_least(0, self, "axes", "refiners")
        if self.hidden_size % self.heads or sum(self.axes) != self.hidden_size // self.heads:
            raise ValueError(f"axes {self.axes} must add up to hidden_size / heads = {self.hidden_size}/{self.heads}")
        if any(a % 2 for a in self.axes) or (self.kind == "double" and self.refiners):
            raise ValueError(f"axes must be even, and a double stream has no refiners: {self}")


class Group(NamedTuple):
    """Pictures of one shape. Condition tokens that are not ``valid`` are padding, which nothing attends to."""

    x: Float[Tensor, "N n f"]
    t: Float[Tensor, " N"]
    condition: Float[Tensor, "N L d"]
    valid: Bool[Tensor, "N L"]
    grid: tuple[int, int]


class Block(nn.Module):
    """A block over several groups at once: the inputs of each go through ``one``."""

    def forward(self, groups: Sequence[tuple]) -> list[Any]:
        """The output of ``one`` for each group's inputs."""
        return [self.one(*inputs) for inputs in groups]

    def one(self, *inputs: Any) -> Any:
        """The block over one group."""
        raise NotImplementedError


def build_dit(config: DitConfig, features: int) -> DoubleStream | SingleStream:
    """The generator of a config; a picture token has ``features`` features."""
    return (DoubleStream if config.kind == "double" else SingleStream)(config, features)


class Rotation:
    """Rotary embedding of several coordinates: each rotates its share of the D features of (..., n, H, D), in pairs."""

    def __init__(self, places: Int[Tensor, "... n axes"], axes: tuple[int, ...], theta: float) -> None:
        angles = []
        for place, width in zip(places.unbind(-1), axes, strict=True):
            frequency = theta ** -(torch.arange(0, width, 2, device=places.device, dtype=torch.float64) / max(width, 1))
            angles.append(place[..., None] * frequency)
        angle = torch.cat(angles, -1)[..., None, :].float()
        self.cos, self.sin = angle.cos(), angle.sin()

    def __call__(self, x: Float[Tensor, "*n H D"]) -> Float[Tensor, "*n H D"]:
        """The rotated heads, in the dtype of ``x``."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).flatten(-2).to(x.dtype)


def grid_coordinates(grid: tuple[int, int], first: int = 0, device: torch.device | str = "cpu") -> Int[Tensor, "n 3"]:
    """(first, row, column) of a grid's tokens, row-major."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    return torch.stack([torch.full_like(rows, first), rows, columns], -1).flatten(0, 1)


def condition_coordinates(valid: Bool[Tensor, "N L"]) -> Int[Tensor, "N L 3"]:
    """(place, 0, 0) of a condition's tokens, from 1; pictures have place 0. Padding anywhere changes no place."""
    return F.pad(valid.cumsum(1)[..., None], (0, 2))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """One modality's half of a double-stream block. ``seen_only``: it only gives keys and values, and has no output."""

    def __init__(self, d: int, head: int, seen_only: bool = False) -> None:
        super().__init__()
        self.head = head
        self.modulation = nn.Linear(d, (2 if seen_only else 6) * d)
        self.qkv = nn.Linear(d, (2 if seen_only else 3) * d)
        self.k_norm = RMSNorm(head, eps=1e-6)
        if not seen_only:
            self.q_norm = RMSNorm(head, eps=1e-6)
            self.out_proj = nn.Linear(d, d)
            self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """([queries], empty where the stream is ``seen_only``; keys; values)."""
        *q, k, v = (
            self.qkv(_modulate(x, shift, scale)).unflatten(-1, (-1, x.shape[-1] // self.head, self.head)).unbind(-3)
        )
        return [self.q_norm(y) for y in q], self.k_norm(k), v

    def join(self, x: Tensor, seen: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor) -> Tensor:
        """Adds the gated attention output and then the gated MLP to the stream, (N, n, d)."""
        x = x + gate * self.out_proj(seen)
        return x + gate_mlp * self.fc2(F.gelu(self.fc1(_modulate(x, shift, scale)), approximate="tanh"))


class DoubleBlock(Block):
    """Separate weights for the condition and the picture, one attention over both (FLUX). In the ``last`` block the
    condition is attended to and has no output."""

    def __init__(self, d: int, head: int, last: bool) -> None:
        super().__init__()
        self.condition, self.picture, self.last = Stream(d, head, last), Stream(d, head), last

    def one(
        self, x: Tensor, c: Tensor, time: Tensor, turn: Rotation, turn_words: Rotation | None, mask: Tensor | None
    ) -> tuple:
        """The new (picture, condition) streams; the condition is None after the last block."""
        n = x.shape[1]
        picture_mod = self.picture.modulation(time)[:, None].chunk(6, -1)
        condition_mod = self.condition.modulation(time)[:, None].chunk(2 if self.last else 6, -1)
        [q], k, v = self.picture.project(x, *picture_mod[:2])
        qc, kc, vc = self.condition.project(c, *condition_mod[:2])
        if turn_words:
            qc, kc = [turn_words(y) for y in qc], turn_words(kc)
        q, k, v = torch.cat([turn(q), *qc], 1), torch.cat([turn(k), kc], 1), torch.cat([v, vc], 1)
        seen = padded_sdpa(q, k, v, mask).flatten(-2)
        x = self.picture.join(x, seen[:, :n], *picture_mod[2:])
        return x, None if self.last else self.condition.join(c, seen[:, n:], *condition_mod[2:])


class DoubleStream(nn.Module):
    """A FLUX-style multimodal diffusion transformer."""

    def __init__(self, config: DitConfig, features: int) -> None:
        super().__init__()
        d, self.config = config.hidden_size, config
        self.time = TimestepEmbedding(d)
        self.enter = nn.Linear(features, d)
        self.layers = nn.ModuleList(
            DoubleBlock(d, d // config.heads, last=i == config.layers - 1) for i in range(config.layers)
        )
        self.modulation = nn.Linear(d, 2 * d)
        self.leave = nn.Linear(d, features)

    def forward(self, groups: Sequence[Group]) -> list[Float[Tensor, "N n f"]]:
        """A value per picture token of every group."""
        joined, rest = [], []
        for x, t, condition, valid, grid in groups:
            axes, theta = self.config.axes, self.config.theta
            turn = Rotation(grid_coordinates(grid, device=x.device), axes, theta)
            turn_words = Rotation(condition_coordinates(valid), axes, theta) if axes[0] else None
            joined.append((self.enter(x.to(self.enter.weight.dtype)), condition))
            rest.append((F.silu(self.time(1000 * t)), turn, turn_words, _mask(valid, x.shape[1])))
        for layer in self.layers:
            joined = layer([(*pair, *more) for pair, more in zip(joined, rest, strict=True)])
        return [
            self.leave(_modulate(x, *self.modulation(time)[:, None].chunk(2, -1)))
            for (x, _), (time, *_) in zip(joined, rest, strict=True)
        ]

    def initialise(self, generator: torch.Generator) -> None:
        """Variance-preserving linear layers; modulations and the output layer are zero: blocks begin as identities."""
        _initialise(self, generator)


class SingleBlock(Block):
    """One set of weights over a joint sequence: norms on both sides of attention and of the gated MLP; with
    ``modulated``, time scales the inputs and gates (tanh) the outputs (Z-Image)."""

    def __init__(self, d: int, head: int, modulated: bool) -> None:
        super().__init__()
        hidden = int(d / 3 * 8)
        self.head = head
        self.modulation = nn.Linear(min(d, NARROW), 4 * d) if modulated else None
        self.norms = nn.ModuleDict({n: RMSNorm(d, eps=1e-5) for n in ("before", "after", "mlp_before", "mlp_after")})
        self.qkv, self.out_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head, eps=1e-5), RMSNorm(head, eps=1e-5)
        self.gate_proj, self.up_proj = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def one(self, x: Tensor, time: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """(N, n, d) to the same shape; ``time`` (N, w) modulates, ``turn`` rotates queries and keys."""
        one = x.new_ones(())
        scale, gate, scale_mlp, gate_mlp = one, one, one, one
        if self.modulation is not None:
            a, b, c, e = self.modulation(time)[:, None].chunk(4, -1)
            scale, gate, scale_mlp, gate_mlp = 1 + a, b.tanh(), 1 + c, e.tanh()
        norms = self.norms
        q, k, v = (y.unflatten(-1, (-1, self.head)) for y in self.qkv(norms["before"](x) * scale).chunk(3, -1))
        seen = padded_sdpa(turn(self.q_norm(q)), turn(self.k_norm(k)), v, mask).flatten(-2)
        x = x + gate * norms["after"](self.out_proj(seen))
        h = norms["mlp_before"](x) * scale_mlp
        return x + gate_mlp * norms["mlp_after"](self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)))


NARROW = 256  # width of the time features that modulate a single stream


class SingleStream(nn.Module):
    """A Z-Image-style diffusion transformer: condition and picture are refined separately, then joined."""

    def __init__(self, config: DitConfig, features: int) -> None:
        super().__init__()
        d, self.config = config.hidden_size, config
        head, narrow = d // config.heads, min(d, NARROW)
        self.time = TimestepEmbedding(narrow, hidden=4 * narrow)
        self.enter = nn.Linear(features, d)
        self.picture_refiner = nn.ModuleList(SingleBlock(d, head, True) for _ in range(config.refiners))
        self.condition_refiner = nn.ModuleList(SingleBlock(d, head, False) for _ in range(config.refiners))
        self.layers = nn.ModuleList(SingleBlock(d, head, True) for _ in range(config.layers))
        self.modulation = nn.Linear(narrow, d)
        self.leave = nn.Linear(d, features)

    def forward(self, groups: Sequence[Group]) -> list[Float[Tensor, "N n f"]]:
        """A value per picture token of every group."""
        times = [self.time(1000 * g.t) for g in groups]
        masks = [_mask(g.valid, g.x.shape[1]) for g in groups]
        places = [grid_coordinates(g.grid, device=g.x.device).expand(len(g.x), -1, -1) for g in groups]
        words = [condition_coordinates(g.valid) for g in groups]
        alone = [None if m is None else g.valid[:, None, None] for g, m in zip(groups, masks, strict=True)]
        x = [self.enter(g.x.to(self.enter.weight.dtype)) for g in groups]
        x = self._through(self.picture_refiner, x, times, places, [None] * len(groups))
        c = self._through(self.condition_refiner, [g.condition for g in groups], times, words, alone)
        both = [torch.cat(pair, 1) for pair in zip(places, words, strict=True)]
        joint = [torch.cat(pair, 1) for pair in zip(x, c, strict=True)]
        joint = self._through(self.layers, joint, times, both, masks)
        out = []
        for j, g, time in zip(joint, groups, times, strict=True):
            normed = F.layer_norm(j[:, : g.x.shape[1]], j.shape[-1:], eps=1e-6)
            out.append(self.leave(normed * (1 + self.modulation(F.silu(time))[:, None])))
        return out

    def _through(
        self, layers: nn.ModuleList, x: list[Tensor], times: list[Tensor], places: list[Tensor], masks: Sequence
    ) -> list[Tensor]:
        turns = [Rotation(p, self.config.axes, self.config.theta) for p in places]
        for layer in layers:
            x = layer(list(zip(x, times, turns, masks, strict=True)))
        return x

    def initialise(self, generator: torch.Generator) -> None:
        """Variance-preserving linear layers; modulations and the output layer are zero."""
        _initialise(self, generator)


def _mask(valid: Bool[Tensor, "N L"], pictures: int) -> Tensor | None:
    """Which of (picture, condition) tokens are attended to; None in training where all are. Padding comes last, and
    sampling always uses a mask: a picture then does not depend on the lengths of other conditions, bit for bit."""
    if torch.is_grad_enabled() and bool(valid.all()):
        return None
    return torch.cat([valid.new_ones(len(valid), pictures), valid], 1)[:, None, None]


def _initialise(model: nn.Module, generator: torch.Generator) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("modulation", "leave")):
                nn.init.zeros_(module.weight)


def blocks(dit: DoubleStream | SingleStream) -> Iterator[nn.Module]:
    """All blocks: the units that are sharded, checkpointed and compiled."""
    if isinstance(dit, SingleStream):
        yield from dit.picture_refiner
        yield from dit.condition_refiner
    yield from dit.layers
