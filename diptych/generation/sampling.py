"""Sampling of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diptych.core.tensors import Float, Tensor


@dataclass(frozen=True)
class Penalties:
    """Changes of the logits before a token is sampled. The defaults change nothing.

    ``repetition`` divides the positive logits of every token in the prompt and the answer, and multiplies the negative
    ones (Keskar et al. 2019, section 4.1). ``presence`` is subtracted once from the logit of a token that the answer
    contains, ``frequency`` once for each time. ``bias`` is added to the logits of the token ids that it names."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.repetition <= 10:
            raise ValueError(f"repetition_penalty must be more than 0 and at most 10, not {self.repetition}")

    def check(self, vocabulary: int) -> None:
        """Raises ``ValueError`` where ``bias`` names a token that a vocabulary of this size lacks."""
        for token, _ in self.bias:
            if not 0 <= token < vocabulary:
                raise ValueError(f"logit_bias names token {token}; the vocabulary has tokens 0 to {vocabulary - 1}")

    def __call__(self, logits: Float[Tensor, " V"], prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """The changed logits. ``prompt`` and ``answer`` are the token ids that were read and written."""
        changed = logits.float().clone()
        if self.repetition != 1:
            seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.long, device=changed.device)
            scores = changed[seen]
            changed[seen] = torch.where(scores > 0, scores / self.repetition, scores * self.repetition)
        if (self.presence or self.frequency) and answer:
            ids, counts = torch.tensor(answer, device=changed.device).unique(return_counts=True)
            changed[ids] -= self.presence + self.frequency * counts
        for token, value in self.bias:
            changed[token] += value
        return changed


NO_PENALTIES = Penalties()


def check_sampling(temperature: float, top_p: float, top_k: int = 0) -> None:
    """Raises ``ValueError`` for values that ``next_token`` cannot sample with."""
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0: every token), not {top_k}")


def next_token(
    logits: Float[Tensor, " V"],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    top_k: int = 0,
) -> int:
    """The likeliest token at temperature 0, or at one so low that dividing by it overflows; else a sample from the
    ``top_k`` likeliest tokens (0: all), reduced to the smallest set that holds ``top_p`` of their mass."""
    check_sampling(temperature, top_p, top_k)
    if temperature == 0:
        return int(logits.argmax())
    scores = logits.float().cpu()
    divided = scores / temperature
    if scores.max().isfinite() and not divided.max().isfinite():
        return int(scores.argmax())
    if 0 < top_k < len(divided):
        divided = divided.masked_fill(divided < divided.topk(top_k).values[-1], -torch.inf)
    probabilities, order = divided.softmax(-1).sort(descending=True)
    probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < top_p)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
