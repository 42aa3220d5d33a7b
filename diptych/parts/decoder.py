"""A decoder-only language model over packed tokens: the arithmetic of Qwen2/2.5, Qwen3, Llama and InternLM2.

One layer, per token with its own expert (BAGEL, arXiv 2505.14683; SynerGen-VL, arXiv 2412.09604, Eq. 2)::

    h  = input_layernorm(x)
    x += o_proj(attend(self_attn(h)))            # q, k, v with optional bias and per-head norm, then RoPE
    x += mlp(post_attention_layernorm(x))        # down(silu(gate) * up)

Any of the modules can be ``Routed``: ``routes`` names which of attention, norms and mlp have one copy per modality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diptych.core.batch import Batch
from diptych.core.checks import at_least
from diptych.core.tensors import NONE, Float, Int, Tensor
from diptych.parts.attention import Attend, Cache, inverse_permutation, permute
from diptych.parts.batch_invariant import linear
from diptych.parts.norms import RMSNorm
from diptych.parts.routed import Routed

ROUTABLE = ("attention", "norms", "mlp")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, in the field names of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qkv_bias: bool = True  # Qwen2: yes; Qwen3, Llama, InternLM2: no
    qk_norm: bool = False  # Qwen3 and BAGEL: yes
    tie_word_embeddings: bool = False
    routes: int = 1  # copies of each routed module
    routed: tuple[str, ...] = ()  # which of ROUTABLE have them

    def __post_init__(self) -> None:
        at_least(
            1, self, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
        )
        at_least(0, self, "num_hidden_layers")
        if unknown := set(self.routed) - set(ROUTABLE):
            raise ValueError(f"cannot route {sorted(unknown)}; choose from {', '.join(ROUTABLE)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "give head_dim"
            )

    @property
    def width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def copies(self, what: str) -> int:
        """How many copies the modules of this kind have."""
        return self.routes if what in self.routed else 1


class Attention(nn.Module):
    """Queries, keys and values of a token, (T, H + 2K, D), before rotation."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.width = c.width
        queries, keys = c.num_attention_heads * c.width, c.num_key_value_heads * c.width
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.q_norm = RMSNorm(c.width, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.width, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T HKK D"]:
        """The heads of every token: H queries, K keys, K values."""
        q, k, v = (p(x).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return torch.cat([self.q_norm(q), self.k_norm(k), v], 1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, d) to (T, d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Rope:
    """Half-split rotary embedding of (T, heads, D) by position: a per-position table of cosines and sines."""

    def __init__(self, positions: Int[Tensor, " T"], width: int, theta: float) -> None:
        frequency = theta ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
        angle = positions[:, None].float() * frequency
        self.cos = torch.cat([angle.cos(), angle.cos()], -1)[:, None]
        self.sin = torch.cat([-angle.sin(), angle.sin()], -1)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """The rotated heads, in the dtype of ``x``."""
        return (x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin).to(x.dtype)


class Layer(nn.Module):
    """One pre-norm decoder block: attention and MLP, each with a residual connection and a copy per route."""

    def __init__(self, c: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads = (c.num_attention_heads, c.num_key_value_heads)
        queries = c.num_attention_heads * c.width
        self.input_layernorm = Routed(lambda: RMSNorm(c.hidden_size, c.rms_norm_eps), c.copies("norms"))
        self.self_attn = Routed(lambda: Attention(c), c.copies("attention"))
        self.o_proj = Routed(lambda: nn.Linear(queries, c.hidden_size, bias=False), c.copies("attention"))
        self.post_attention_layernorm = Routed(lambda: RMSNorm(c.hidden_size, c.rms_norm_eps), c.copies("norms"))
        self.mlp = Routed(lambda: MLP(c), c.copies("mlp"))

    def forward(self, x: Tensor, rope: Callable[[Tensor], Tensor], counts: Sequence[int], attend: Attend) -> Tensor:
        """(T, d) to (T, d). ``counts`` are the tokens of each route, ``rope`` rotates queries and keys, ``attend``
        is attention over the stream."""
        H, K = self.heads
        qkv = self.self_attn(self.input_layernorm(x, counts), counts)
        q, k = rope(qkv[:, : H + K]).split([H, K], 1)
        x = x + self.o_proj(attend(self.index, q, k, qkv[:, H + K :]).flatten(1), counts)
        return x + self.mlp(self.post_attention_layernorm(x, counts), counts)


class Decoder(nn.Module):
    """Embeddings, layers, final norm and the language head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.width % 2:
            raise ValueError(f"a head must have an even width to be rotated; it is {c.width}")
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = Routed(lambda: RMSNorm(c.hidden_size, c.rms_norm_eps), c.copies("norms"))
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "T d"],
        positions: Int[Tensor, " T"],
        attend: Attend,
        counts: Sequence[int] | None = None,
    ) -> Float[Tensor, "T d"]:
        """Final normed states of a stream whose tokens are sorted by route; ``counts`` are the tokens of each route."""
        counts = [len(x)] if counts is None else counts
        rope = Rope(positions, self.config.width, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, rope, counts, attend)
        return self.norm(x, counts)

    def cache(self) -> Cache:
        """An empty key/value cache."""
        c, weight = self.config, self.embed_tokens.weight
        return Cache(c.num_hidden_layers, c.num_key_value_heads, c.width, weight.dtype, weight.device)

    def embed(
        self,
        batch: Batch,
        pictures: Sequence[tuple[Tensor, Tensor]],
        order: Tensor | None = None,
        table: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "T d"]:
        """The embedded tokens of a row: text by the embedding table, pictures by their (places, embeddings), in
        ``order`` (default: the row's). ``table`` replaces the embedding table for text."""
        words = (batch.ids != NONE).nonzero()[:, 0]
        places = torch.cat([words, *(p.flatten() for p, _ in pictures)])
        embedded = (table or self.embed_tokens)(batch.ids[words])
        values = torch.cat([embedded, *(e.flatten(0, 1).to(embedded.dtype) for _, e in pictures)])
        inverse = inverse_permutation(places)
        return permute(values, inverse if order is None else inverse[order])

    def logits(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n V"]:
        """Scores of the next token for final normed states."""
        return linear(x, self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "V d"]:
        """The weight of the language head; the embedding table where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def decoder_weights_from(source: Decoder, target: Decoder) -> dict[str, Tensor]:
    """The weights of ``source``, a decoder of another family, under the names of ``target``.

    Where the source lacks a route, its first route (text) is copied; where it lacks a language head, its embeddings
    are. Tokens that the source's vocabulary lacks keep the target's rows. Other differences remain, so that strict
    loading reports them."""
    state, fresh_state, head = source.state_dict(), target.state_dict(), "lm_head.weight"

    def first(name: str) -> str:
        return re.sub(r"^(layers\.\d+\.\w+|norm)\.\d+\.", r"\1.0.", name)

    out = {name: t for name, t in state.items() if name == first(name) != head}
    for name, fresh in fresh_state.items():
        t = state.get(name, state.get(first(name), state["embed_tokens.weight"] if name == head else None))
        if t is not None:
            out[name] = with_fresh_rows(name, t, fresh)
    return out


def with_fresh_rows(name: str, weight: Tensor, fresh: Tensor | None) -> Tensor:
    """A weight that is taken over; an embedding table or a language head has the rows of ``fresh`` for the words that
    it lacks."""
    table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    if fresh is None or not table or weight.shape[1:] != fresh.shape[1:]:
        return weight
    return torch.cat([weight, fresh[len(weight) :]])
