"""Adapters between a vision encoder and a decoder, and between a frozen language model and a generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.tensors import Bool, Float, Tensor
from diptych.parts.attention import padded_sdpa
from diptych.parts.norms import RMSNorm


class Projector(nn.Module):
    """Linear, GELU (tanh), linear: from the vision encoder's width to the decoder's."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_out)
        self.fc2 = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width_in) to (..., width_out)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class QueryBlock(nn.Module):
    """Queries attend once to a sequence (arXiv 2603.16139, 3.3); every layer norm is without parameters::

    q   = norm(queries),  kv = norm(sequence)
    u   = norm(q + attention(q, kv, kv))       # the residual is the normed q
    out = u + W2 gelu(W1 u)
    """

    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.attention = nn.ModuleDict({n: nn.Linear(width, width) for n in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ratio * width), "fc2": nn.Linear(ratio * width, width)})

    def forward(
        self, queries: Float[Tensor, "N Q D"], sequence: Float[Tensor, "N L D"], valid: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N Q D"]:
        """The updated queries. ``valid`` is False for the padding of a sequence, which no query attends to."""
        a, (q, kv) = self.attention, (_norm(queries), _norm(sequence))
        projected = (a[name](x) for name, x in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)))
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in projected)
        attended = padded_sdpa(query, key, value, valid[:, None, None])
        u = _norm(q + a["out_proj"](attended.flatten(-2)))
        return u + self.mlp["fc2"](F.gelu(self.mlp["fc1"](u), approximate="tanh"))

    def initialise(self, generator: torch.Generator) -> None:
        """Xavier-uniform weights, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _initialise_blocks(adapter: nn.Module, generator: torch.Generator) -> None:
    for module in adapter.modules():
        if isinstance(module, QueryBlock):
            module.initialise(generator)


class NoQueries(nn.Module):
    """The control without queries: appends no tokens."""

    def __init__(self, width: int, queries: int = 0, heads: int = 1, layers: int = 0) -> None:
        super().__init__()

    def forward(self, sequence: Float[Tensor, "N L D"], valid: Bool[Tensor, "N L"]) -> Float[Tensor, "N 0 D"]:
        """No tokens for each of the N sequences."""
        return sequence[:, :0]

    def initialise(self, generator: torch.Generator) -> None:
        """Does nothing: there are no parameters."""


class StaticQueries(nn.Module):
    """Learned tokens, the same for every sequence (MetaQuery, arXiv 2504.06256); drawn from N(0, 1 / D)."""

    def __init__(self, width: int, queries: int, heads: int = 1, layers: int = 0) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))

    def forward(self, sequence: Float[Tensor, "N L D"], valid: Bool[Tensor, "N L"]) -> Float[Tensor, "N Q D"]:
        """The learned queries, one copy for each of the N sequences."""
        return self.queries.expand(len(sequence), -1, -1)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws the queries from N(0, 1 / D)."""
        nn.init.normal_(self.queries, std=self.queries.shape[-1] ** -0.5, generator=generator)


class ResidualQueries(StaticQueries):
    """Residual query adapter (arXiv 2603.16139, 3.3): learned queries that first attend to the sequence they are
    appended to. At D = 1536, 256 queries and one layer it has 28,718,592 parameters."""

    def __init__(self, width: int, queries: int, heads: int, layers: int = 1) -> None:
        super().__init__(width, queries)
        self.layers = nn.ModuleList(QueryBlock(width, heads) for _ in range(layers))

    def forward(self, sequence: Float[Tensor, "N L D"], valid: Bool[Tensor, "N L"]) -> Float[Tensor, "N Q D"]:
        """The queries after attending to each of the N sequences; padding (``valid`` False) is not attended to."""
        x = super().forward(sequence, valid)
        for layer in self.layers:
            x = layer(x, sequence, valid)
        return x

    def initialise(self, generator: torch.Generator) -> None:
        """Draws the queries from N(0, 1 / D) and initialises the blocks."""
        super().initialise(generator)
        _initialise_blocks(self, generator)


class Connector(nn.Module):
    """From a language model's states to a generator's width: RMSNorm and a linear, after ``layers`` blocks of
    self-attention. One block has as many parameters as a one-layer query adapter without its queries."""

    def __init__(self, width_in: int, width_out: int, heads: int, layers: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QueryBlock(width_in, heads) for _ in range(layers))
        self.norm = RMSNorm(width_in, eps=1e-5)
        self.linear = nn.Linear(width_in, width_out)

    def forward(self, states: Float[Tensor, "N L D"], valid: Bool[Tensor, "N L"]) -> Float[Tensor, "N L d"]:
        """Tokens of the generator's width d, one for each state; padding (``valid`` False) is not attended to."""
        for layer in self.layers:
            states = layer(states, states, valid)
        return self.linear(self.norm(states))

    def initialise(self, generator: torch.Generator) -> None:
        """Blocks as the adapter's; the linear keeps the variance."""
        _initialise_blocks(self, generator)
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.linear.bias)
