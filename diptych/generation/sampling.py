"""Sampling of the next token."""

from __future__ import annotations

import torch

from diptych.core.tensors import Float, Tensor


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ``ValueError`` for parameters that ``next_token`` cannot sample with."""
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}")


def next_token(
    logits: Float[Tensor, " V"], temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """The id of the next token: the most likely one at temperature 0, or where division by the temperature overflows;
    otherwise a sample from the smallest set of tokens whose probabilities sum to at least ``top_p``."""
    check_sampling(temperature, top_p)
    if temperature == 0:
        return int(logits.argmax())
    scores = logits.float().cpu()
    divided = scores / temperature
    if scores.max().isfinite() and not divided.max().isfinite():
        return int(scores.argmax())
    probabilities, order = divided.softmax(-1).sort(descending=True)
    probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < top_p)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
