"""Picture codes one after another: a small causal transformer over the codes of a token (SynerGen-VL, Eq. 3), and
guidance on the logits of each code.

::

    p(v_j | v_<j, h) = softmax(W norm(f(z_0 .. z_j)))     z_0 = in_proj(h) + P_0,   z_j = tok(v_j-1) + P_j

``h`` is the state from which a token's codes are predicted; the head does not attend to the rest of the sequence. The
same module over residual depth instead of space is VILA-U's depth transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diptych.core.tensors import Float, Int, Tensor
from diptych.parts.attention import sdpa
from diptych.parts.decoder import DecoderConfig, Layer
from diptych.parts.norms import RMSNorm


@dataclass(frozen=True)
class CodeSettings:
    """Sampler settings of a model that generates codes. A model's config holds the defaults that suit its weights.

    ``temperature`` 0 takes the likeliest code; otherwise a code is sampled from the ``top_k`` likeliest ones, reduced
    to the fewest whose probability exceeds ``top_p``."""

    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 1000
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= x < math.inf for x in (self.guidance_scale, self.image_guidance_scale, self.temperature)):
            raise ValueError(
                "guidance scales and temperature must be numbers of at least 0, not "
                f"{self.guidance_scale}, {self.image_guidance_scale}, {self.temperature}"
            )
        if self.top_k != int(self.top_k) or self.top_k < 1 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k must be a whole number of at least 1 and top_p in (0, 1], not {self.top_k} and {self.top_p}"
            )

    @property
    def num_inference_steps(self) -> None:
        """None: a picture takes as many steps as it has tokens."""

    def within(self, steps: int) -> CodeSettings:
        """The same settings: the number of steps depends on the size of the picture alone."""
        return self


class CodeHead(nn.Module):
    """The transformer over the codes of a token. ``config.vocab_size`` is the size of the codebook. Positions are
    learned embeddings, so there is no rotary embedding."""

    def __init__(self, width_in: int, config: DecoderConfig, codes_per_token: int) -> None:
        super().__init__()
        c, self.config, self.codes_per_token = config, config, codes_per_token
        d = c.hidden_size
        self.in_proj = nn.Identity() if width_in == d else nn.Linear(width_in, d)
        self.tok = nn.Embedding(c.vocab_size, d)
        self.pos = nn.Embedding(codes_per_token, d)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(d, c.rms_norm_eps)
        self.classifier = nn.Linear(d, c.vocab_size, bias=False)

    def forward(self, h: Float[Tensor, "P d"], codes: Int[Tensor, "P s"]) -> Float[Tensor, "Ps e"]:
        """Final states of every code, given the codes before it; the codes of a token are consecutive."""
        z = torch.cat([self.in_proj(h)[:, None], self.tok(codes[:, :-1])], 1) + self.pos.weight

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (-1, self.codes_per_token)) for x in (q, k, v))
            return sdpa(q, k, v, causal=True).flatten(0, 1)

        x = z.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, _still, [len(x)], attend)
        return self.norm(x)

    @torch.no_grad()
    def sample(
        self,
        h: Float[Tensor, "R B d"],
        settings: Sequence[CodeSettings],
        scales: Sequence[Sequence[float]],
        chance: Float[Tensor, "B s"],
    ) -> Int[Tensor, "B s"]:
        """The codes of B tokens, one after another; the logits of R branches are combined (``Choice.guided``).

        ``scales`` holds the guidance scales of each token's R branches; that of the first, the full branch, is unused.
        ``chance`` are uniform draws in [0, 1), one for each code, and the only source of randomness."""
        R, B, _ = h.shape
        c = self.config
        cache = h.new_empty(c.num_hidden_layers, 2, R * B, self.codes_per_token, c.num_key_value_heads, c.width)
        choose = Choice(settings, h.device, [list(column) for column in zip(*scales, strict=True)][1:])
        out = torch.empty(B, self.codes_per_token, dtype=torch.long, device=h.device)
        z = self.in_proj(h.flatten(0, 1))
        for j in range(self.codes_per_token):

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, j: int = j) -> Tensor:
                cache[layer, 0, :, j], cache[layer, 1, :, j] = k, v
                keys, values = cache[layer, :, :, : j + 1]
                return sdpa(q[:, None], keys, values)[:, 0]

            x = z + self.pos.weight[j]
            for layer in self.layers:
                x = layer(x, _still, [R * B], attend)
            logits = self.classifier(self.norm(x)).float().unflatten(0, (R, B))
            out[:, j] = choose(logits, chance[:, j])
            z = self.tok(out[:, j]).repeat(R, 1)
        return out


def _still(x: Tensor) -> Tensor:
    """No rotation."""
    return x


def _under(chance: Float[Tensor, " B"], weights: Float[Tensor, "B K"]) -> Int[Tensor, "B 1"]:
    """The index at which the cumulative weight exceeds ``chance`` of the whole."""
    mass = weights.cumsum(-1)
    return torch.searchsorted(mass, chance[:, None] * mass[:, -1:], right=True).clamp_(max=mass.shape[-1] - 1)


class Choice:
    """Chooses one code for each of B rows of logits, by each row's own settings."""

    def __init__(
        self, settings: Sequence[CodeSettings], device: torch.device, scales: Sequence[Sequence[float]] = ()
    ) -> None:
        """``scales`` holds, for every branch but the full one, the scale of each row."""

        def column(values: list) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self.scales = [column(list(row)) for row in scales]
        self.greedy = column([s.temperature == 0 for s in settings])
        self.temperature = column([s.temperature or 1.0 for s in settings])
        self.k, self.p = column([s.top_k for s in settings]), column([s.top_p for s in settings])
        self.any_greedy = any(s.temperature == 0 for s in settings)

    def __call__(self, logits: Float[Tensor, "R B K"], chance: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The likeliest code of the guided logits, or the one that ``chance`` samples."""
        scores = self.guided(logits)
        probability = (scores / self.temperature).softmax(-1)
        chosen = _under(chance, probability)
        cut = (self.k < probability.shape[-1]) | (self.p < 1)
        if cut.any():  # rows that are not cut are sampled in code order, so other rows do not change them
            probability, order = probability.sort(descending=True)
            rank = torch.arange(probability.shape[-1], device=probability.device)
            held = probability.cumsum(-1) - probability
            probability = probability * ((rank < self.k) & (held < self.p))
            chosen = torch.where(cut, order.gather(1, _under(chance, probability)), chosen)
        if self.any_greedy:
            chosen = torch.where(self.greedy, scores.argmax(-1, keepdim=True), chosen)
        return chosen[:, 0]

    def guided(self, logits: Float[Tensor, "R B K"]) -> Float[Tensor, "B K"]:
        """l_b + g_b (l - l_b) for one branch b after another, without text first, as BAGEL guides."""
        out = logits[0]
        for branch, scale in zip(logits[1:], self.scales, strict=True):
            out = branch + scale * (out - branch)
        return out
