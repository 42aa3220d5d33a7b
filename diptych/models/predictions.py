"""What a model predicts for a packed row, before it is scored, and the loss of supervised training.

A family returns ``Predictions`` from ``UnifiedModel.predict``. An objective turns them into losses: ``score`` is that
of supervised training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from diptych.core.batch import Batch
from diptych.core.losses import Losses, Term, by_document
from diptych.core.tensors import Float, Int, Tensor
from diptych.parts.cross_entropy import Factor, linear_cross_entropy
from diptych.parts.flow import Prediction, mix, squared_error, velocity


@dataclass(frozen=True, eq=False)
class TokenPrediction:
    """Predictions of n words or picture codes: p(token) = softmax(states table^T). The logits never exist whole."""

    states: Float[Tensor, "n d"]
    table: Float[Tensor, "K d"]
    targets: Int[Tensor, " n"]
    document: Int[Tensor, " n"]  # the packed document of each token

    def error(
        self, temperature: float = 1.0, factor: Factor | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
        """The cross-entropy in nats at a temperature: summed, and for each token without gradient.

        ``factor`` multiplies the gradient of each token."""
        states = self.states if temperature == 1 else self.states / temperature
        return linear_cross_entropy(states, self.table, self.targets, factor=factor)


@dataclass(frozen=True, eq=False)
class Noised:
    """Latents of N pictures, the noise that they are mixed with and the time of each, 1 at noise."""

    data: Float[Tensor, "N ..."]
    noise: Float[Tensor, "N ..."]
    times: Float[Tensor, " N"]

    @property
    def x_t(self) -> Float[Tensor, "N ..."]:
        """The mix, (1 - t) data + t noise."""
        return mix(self.data, self.noise, self.times)


@dataclass(frozen=True, eq=False)
class FlowPrediction:
    """Predictions for N equally sized pictures whose latents are mixed with noise."""

    prediction: Float[Tensor, "N ..."]
    target: Noised
    kind: Prediction
    document: Int[Tensor, " N"]  # the packed document of each picture
    counted: bool = True  # False for the placeholder of a row without pictures; its loss is 0
    features: int = -1  # the dimension of a latent token's features

    def error(self) -> Float[Tensor, "N n"]:
        """The squared error in units of velocity, mean over a token's features."""
        t = self.target
        error = squared_error(self.prediction, t.data, t.noise, t.times, self.kind)
        return self.counted * error.mean(self.features).flatten(1)

    @property
    def tokens(self) -> int:
        """Latent tokens of one picture, as the family counts them."""
        return self.counted * self.target.data[0].numel() // self.target.data.shape[self.features]

    def clean(self, prediction: Tensor) -> Float[Tensor, "N ..."]:
        """The clean latents that a prediction of this kind stands for."""
        t = self.target
        if self.kind == "data":
            return prediction
        return t.x_t - t.times.view(-1, *[1] * (prediction.dim() - 1)) * prediction

    def velocity(self, prediction: Tensor) -> Float[Tensor, "N ..."]:
        """The velocity that a prediction of this kind stands for."""
        return velocity(prediction, self.target.x_t, self.target.times, self.kind)


Predictions = Mapping[str, tuple[TokenPrediction | FlowPrediction, ...]]  # by loss term
Objective = Callable[[Predictions, Batch, Mapping[str, float]], Losses]  # of predictions, their batch and its counts


def score(predictions: Predictions, batch: Batch, counts: Mapping[str, float]) -> Losses:
    """The loss of supervised training: cross-entropy summed over tokens, squared error summed over latent tokens."""
    losses, rows = {}, len(batch.samples)
    for name, parts in predictions.items():
        total = torch.zeros((), device=batch.ids.device)
        documents = torch.zeros(rows, 2, device=batch.ids.device)
        for part in parts:
            if isinstance(part, TokenPrediction):
                value, each = part.error()
                documents = documents + by_document(each, part.document, rows)
            else:
                error = part.error()
                value, tokens = error.sum(), error.shape[-1] * part.counted
                documents = documents + by_document(error.sum(-1), part.document, rows, tokens)
            total = total + value
        losses[name] = Term(total, counts[name], documents)
    return losses
