"""Weights as eight-bit integers: ``to_int8`` for the linear layers of a model's blocks that are not trained.

Each row of a weight (one output channel) is divided by its largest magnitude / 127 and rounded; a product casts the
integers to the input's dtype (which holds them exactly, bfloat16 too) and multiplies by the rows' scales afterwards, so
one weight at a time is ever wide. Only ``nn.Linear`` inside blocks changes. What stays as it is: embeddings and
language heads, norms, biases, what joins the encoders (projector, latent and time layers) and the autoencoder: a small
share of the weights, and rounding them is what one sees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from diptych.core.tensors import Float
from diptych.parts.batch_invariant import decoding, linear


class Int8Linear(nn.Module):
    """A linear layer whose (out, in) ``weight`` is int8 with one float32 ``scale`` per output channel.

    Loading a floating weight into it rounds that weight. Decoding in bfloat16 on a CPU multiplies by the integers
    themselves, which reads half the bytes of a bfloat16 weight; its scales are rounded to bfloat16. Every other product
    casts the weight first, which is faster from about 40 rows on. Neither depends on the number of rows."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        # torch's kernel reads whole blocks of the weight: other shapes read beyond its end
        self.packed = not self.in_features % 64 and not self.out_features % 16

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """(..., in) to (..., out), in the autocast dtype or that of ``x``."""
        kind = x.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        if self.packed and kind == "cpu" and dtype == torch.bfloat16 and decoding():
            rows = x.to(dtype).reshape(-1, self.in_features)
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale.to(dtype)).reshape(*x.shape[:-1], -1)
        else:
            out = linear(x.to(dtype), self.weight.to(dtype)) * self.scale
        return (out if self.bias is None else out + self.bias).to(dtype)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.is_floating_point():
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}scale"] = rounded(weight)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def rounded(weight: Float[Tensor, "o i"]) -> tuple[Tensor, Tensor]:
    """(int8 weight, float32 scale per row) with weight = int8 * scale but for half a step of rounding."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def to_int8(blocks: Iterable[nn.Module], but: Collection[nn.Parameter] = ()) -> None:
    """Turns every ``nn.Linear`` inside the blocks into ``Int8Linear``, in place, ``but`` those whose weight is among
    these; on the meta device too."""
    kept = {id(p) for p in but}
    for parent in [module for block in blocks for module in block.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and id(child.weight) not in kept:
                parent.register_module(name, Int8Linear(child))


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose rounded weights are bfloat16 again, under the names of a model that never had any."""
    scales = {n.removesuffix("weight") + "scale": n for n, t in state.items() if t.dtype == torch.int8}
    out = {n: t for n, t in state.items() if n not in scales}
    return out | {n: (state[n].float() * state[s].float()[:, None]).to(torch.bfloat16) for s, n in scales.items()}


def quantized(model: nn.Module) -> bool:
    """Whether a model has rounded weights, which can be neither trained nor saved as they are."""
    return any(isinstance(m, Int8Linear) for m in model.modules())
