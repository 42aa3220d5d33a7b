"""Objectives of training from rewards: pure functions of predictions.

``nft`` is DiffusionNFT (arXiv 2509.16117) for flows, ``grpo`` is GRPO (arXiv 2402.03300) for words and picture codes.
``Policy`` applies them to a packed row, term by term, with one advantage for each document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from diptych.core.batch import Batch
from diptych.core.losses import Losses, Term, by_document
from diptych.core.tensors import Float, Tensor
from diptych.models.predictions import FlowPrediction, Predictions, TokenPrediction
from diptych.training.recipe import Reward

Recorded = Mapping[str, tuple[Tensor, ...]]  # by term: predictions of a flow, log-probabilities of tokens
LEAST = 1e-5  # of what the two errors of DiffusionNFT are divided by


class Recorder:
    """An objective that keeps the predictions of other weights and has no loss."""

    def __init__(self, temperatures: Mapping[str, float]) -> None:
        self.temperatures, self.values = temperatures, dict[str, tuple[Tensor, ...]]()

    def __call__(self, predictions: Predictions, batch: Batch, counts: Mapping[str, float]) -> Losses:
        """Keeps the predictions of a flow and the log-probabilities of tokens; returns no losses."""
        for name, parts in predictions.items():
            self.values[name] = tuple(
                part.prediction.detach()
                if isinstance(part, FlowPrediction)
                else -part.error(self.temperatures.get(name, 1.0))[1]
                for part in parts
            )
        return {}


def nft(
    new: FlowPrediction, old: Float[Tensor, "N ..."], optimality: Float[Tensor, " N"], beta: float
) -> Float[Tensor, " N"]:
    """DiffusionNFT's loss of N drawings of the old policy, whose latents are ``new.target.data``::

        x+ = (1 - b) old + b new,  x- = (1 + b) old - b new             Eq. 5, in clean latents
        w = stopgrad(mean |x - data|)
        loss = 5 / b (r mean (x+ - data)^2 / w+  +  (1 - r) mean (x- - data)^2 / w-)

    ``optimality`` is r in [0, 1]. The weighting by w and the factor 5 are those of the published code. With old = new
    the gradient does not depend on b."""
    data, past, now = new.target.data.flatten(1), new.clean(old).flatten(1), new.clean(new.prediction).flatten(1)
    total = torch.zeros_like(optimality)
    for share, sign in ((optimality, 1.0), (1 - optimality, -1.0)):
        error = past + sign * beta * (now - past) - data
        scale = error.detach().double().abs().mean(1).clamp(min=LEAST).to(error.dtype)
        total = total + share * error.square().mean(1) / scale
    return 5 / beta * total


@dataclass(frozen=True)
class Tokens:
    """What ``grpo`` returns: the loss, summed over tokens and token by token, and what to log of it."""

    sum: Tensor
    each: Tensor
    logged: Mapping[str, float]


def grpo(
    new: TokenPrediction,
    advantages: Float[Tensor, " n"],
    old: Float[Tensor, " n"] | None,
    first: Float[Tensor, " n"] | None,
    clip: float,
    reference: float,
    temperature: float = 1.0,
) -> Tokens:
    """GRPO's loss of n tokens (arXiv 2402.03300, Eq. 3), summed::

        rho = p_new / p_old,  k3 = p_first / p_new - log(p_first / p_new) - 1
        loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + reference k3

    ``old`` and ``first`` are log-probabilities at ``temperature``; without ``old`` the policy has not moved since and
    rho is 1. Its gradient is that of cross-entropy with a factor for each token, so the logits never exist whole."""
    before = old

    def ratios(logp: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        rho = torch.ones_like(logp) if before is None else (logp - before[rows]).exp()
        far = torch.zeros_like(logp) if first is None else first[rows] - logp
        a = advantages[rows]
        free = ~(((a > 0) & (rho > 1 + clip)) | ((a < 0) & (rho < 1 - clip)))
        return rho, far, free

    def factor(logp: Tensor, rows: slice) -> Tensor:
        rho, far, free = ratios(logp, rows)
        return advantages[rows] * rho * free + reference * far.expm1()

    total, nll = new.error(temperature, factor)
    rho, far, free = ratios(-nll, slice(None))
    k3 = far.expm1() - far
    each = -torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages) + reference * k3
    logged = {
        "ratio": float(rho.sum()),
        "clipped": float((~free).sum()),
        "k3": float(k3.sum()),
        "nll": float(nll.sum()),
    }
    return Tokens(total - total.detach() + each.sum().detach(), each.detach(), logged)


@dataclass
class Policy:
    """The objective of a packed row of rollouts. ``advantages`` has one number for each document; ``old`` and ``first``
    are what other weights predicted for the same row and noise (None: the same as the trained ones). ``logged`` adds up
    sums for the log."""

    advantages: Float[Tensor, " D"]
    how: Reward
    temperatures: Mapping[str, float]
    old: Recorded | None = None
    first: Recorded | None = None
    logged: dict[str, float] = field(default_factory=dict)

    def __call__(self, predictions: Predictions, batch: Batch, counts: Mapping[str, float]) -> Losses:
        """The losses of every term: DiffusionNFT for flows, token GRPO for words and codes."""
        losses, rows = {}, len(batch.samples)
        for name, parts in predictions.items():
            total = torch.zeros((), device=batch.ids.device)
            documents = torch.zeros(rows, 2, device=batch.ids.device)
            for i, part in enumerate(parts):
                advantages = self.advantages[part.document]
                old, first = (None if r is None else r[name][i] for r in (self.old, self.first))
                if isinstance(part, TokenPrediction):
                    value, per_document = self._tokens(name, part, advantages, old, first, rows)
                else:
                    value, per_document = self._flow(name, part, advantages, old, first, rows)
                total, documents = total + value, documents + per_document
            losses[name] = Term(total, counts[name], documents)
        return losses

    def _log(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self.logged[name] = self.logged.get(name, 0.0) + value

    def _tokens(
        self, name: str, part: TokenPrediction, a: Tensor, old: Tensor | None, first: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        reference = self.how.reference.get(name, 0.0)
        tokens = grpo(part, a, old, first, self.how.clip, reference, self.temperatures.get(name, 1.0))
        self._log({f"{name}/{k}": v for k, v in tokens.logged.items()} | {f"{name}/n": len(a)})
        return tokens.sum, by_document(tokens.each, part.document, rows)

    def _flow(
        self, name: str, part: FlowPrediction, a: Tensor, old: Tensor | None, first: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        largest = self.how.largest
        optimality = a.clamp(-largest, largest) / (2 * largest) + 0.5
        each = nft(part, part.prediction.detach() if old is None else old, optimality, self.how.beta)
        v, n = part.velocity(part.prediction).flatten(1), len(a) * part.counted
        distances = {}
        for where, other in (("old", old), ("first", first)):
            if other is not None:
                distance = (v - part.velocity(other).flatten(1)).square().mean(1)
                distances[where] = distance
                self._log({f"{name}/from_{where}": float(distance.detach().sum()) * part.counted})
        if weight := self.how.reference.get(name, 0.0):
            assert first is not None, "a weighted reference needs the predictions of the first weights"
            each = each + weight * distances["first"]
        size = float(part.target.data.square().flatten(1).mean(1).sum()) * part.counted
        self._log({f"{name}/latents": size, f"{name}/n": n})
        each = each * part.tokens  # counts are of tokens
        return each.sum(), by_document(each, part.document, rows, part.tokens)
