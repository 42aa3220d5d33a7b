"""Picture codes one after another: a small causal transformer over the slots of a token (SynerGen-VL Eq. 3), and
guidance on the logits of each code.

::

    p(v_j | v_<j, h) = softmax(W norm(f(z_0 .. z_j)))     z_0 = in_proj(h) + P_0,   z_j = tok(v_j-1) + P_j

``h`` is the state from which a token's codes are predicted; nothing else of the sequence is seen. The same module over
residual depth instead of space is VILA-U's depth transformer.
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
    """How a picture is drawn code by code. A model's config holds the defaults that suit its weights.

    ``temperature`` 0 takes the likeliest code; else one is drawn from the ``top_k`` likeliest, of them from the fewest
    that hold ``top_p`` of the mass."""

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
        """The same settings: the size of the picture alone decides how many steps it takes."""
        return self


class CodeHead(nn.Module):
    """The transformer over slots. ``config.vocab_size`` is the number of codes; there is no rotation, since every slot
    has a position embedding of its own."""

    def __init__(self, width_in: int, config: DecoderConfig, slots: int) -> None:
        super().__init__()
        c, self.config, self.slots = config, config, slots
        d = c.hidden_size
        self.in_proj = nn.Identity() if width_in == d else nn.Linear(width_in, d)
        self.tok = nn.Embedding(c.vocab_size, d)
        self.pos = nn.Embedding(slots, d)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(d, c.rms_norm_eps)
        self.classifier = nn.Linear(d, c.vocab_size, bias=False)

    def forward(self, h: Float[Tensor, "P d"], codes: Int[Tensor, "P s"]) -> Float[Tensor, "Ps e"]:
        """Final states of every slot, slot after slot, when the codes before it are known."""
        z = torch.cat([self.in_proj(h)[:, None], self.tok(codes[:, :-1])], 1) + self.pos.weight

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (-1, self.slots)) for x in (q, k, v))
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
        """The codes of B patches, slot by slot, each guided by R branches (``guided``) that get the same code back.

        ``scales`` are, for each patch, those of its R branches (the full one's, which stands first, is not used).
        ``chance`` are uniform draws in [0, 1), one a code: what was drawn depends on nothing else."""
        R, B, _ = h.shape
        c = self.config
        cache = h.new_empty(c.num_hidden_layers, 2, R * B, self.slots, c.num_key_value_heads, c.width)
        choose = Choice(settings, h.device, [list(column) for column in zip(*scales, strict=True)][1:])
        out = torch.empty(B, self.slots, dtype=torch.long, device=h.device)
        z = self.in_proj(h.flatten(0, 1))
        for j in range(self.slots):

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
    """Where ``chance`` falls, in [0, 1) of the whole weight."""
    mass = weights.cumsum(-1)
    return torch.searchsorted(mass, chance[:, None] * mass[:, -1:], right=True).clamp_(max=mass.shape[-1] - 1)


class Choice:
    """Chooses one code for each of B rows of logits, by each row's own settings."""

    def __init__(
        self, settings: Sequence[CodeSettings], device: torch.device, scales: Sequence[Sequence[float]] = ()
    ) -> None:
        """``scales`` are the rows' own for every branch but the full one."""

        def column(values: list) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self.scales = [column(list(row)) for row in scales]
        self.greedy = column([s.temperature == 0 for s in settings])
        self.temperature = column([s.temperature or 1.0 for s in settings])
        self.k, self.p = column([s.top_k for s in settings]), column([s.top_p for s in settings])
        self.any_greedy = any(s.temperature == 0 for s in settings)

    def __call__(self, logits: Float[Tensor, "R B K"], chance: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The likeliest of the guided logits, or the code under which ``chance`` falls."""
        scores = self.guided(logits)
        probability = (scores / self.temperature).softmax(-1)
        chosen = _under(chance, probability)
        cut = (self.k < probability.shape[-1]) | (self.p < 1)
        if cut.any():  # a row that is not cut goes by the order of codes, whatever the others do
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
