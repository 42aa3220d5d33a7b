"""How much a model attends to the picture when it answers: attention mass on picture and text by layer (the attention
analysis of SGT, arXiv 2605.18714).

In layer l a query is q = RoPE(q_norm(W_q LN(h_{l-1}) + b)), computed by its token's own expert, and p is its softmax
over all keys that the mask allows. Both are taken from the network's own attention call. Then::

    A_V(l) = mean over heads and query rows of the sum of p over picture keys
    A_T(l) = the same over text keys

Query rows: ``answer`` is the last token of the request, which predicts the first token of the answer; ``question`` is
every token of the user's texts. Markers around texts and pictures count only with ``markers``: those of a picture's
segment then count as picture, those of texts as text, and A_V + A_T = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from diptych.analysis import collect
from diptych.core import intervals
from diptych.core.sample import Sample, assistant
from diptych.models.protocol import UnifiedModel

Rows = Literal["answer", "question"]
Interval = dict[str, float | None]  # value, low, high; low and high are None for a single request


@dataclass(frozen=True, eq=False)
class Allocation:
    """Attention mass, (requests, layers): on picture tokens, on text tokens, and on the rest; the three sum to 1."""

    picture: np.ndarray
    text: np.ndarray
    markers: np.ndarray

    def to_json(self) -> list[dict[str, Any]]:
        """One row a layer: mean over requests with its 95 % interval."""
        names = ("picture", "text", "markers")
        return [
            {"layer": i} | {n: _interval(getattr(self, n)[:, i]) for n in names} for i in range(self.picture.shape[1])
        ]


def allocation(
    model: UnifiedModel, samples: Sequence[Sample], rows: Rows = "answer", markers: bool = False
) -> Allocation:
    """A_V and A_T of every layer for requests that show a picture; an answer that a sample holds is left out.

    Raises ``ValueError`` for unknown rows, for a request without picture or question, and as ``collect.read`` does.
    """
    if rows not in get_args(Rows):
        raise ValueError(f"rows is {rows!r}; choose from {', '.join(get_args(Rows))}")
    if not samples:
        raise ValueError("no samples: attention needs questions about pictures")
    return Allocation(*np.stack([_masses(model, s, rows, markers) for s in samples], 1))


def _masses(model: UnifiedModel, sample: Sample, rows: Rows, markers: bool) -> np.ndarray:
    """(3, layers) the mass of one request on picture, text and the rest."""
    sample = request(sample)
    sequence = model.lay_out(sample)
    p = collect.places(model, sample, sequence)
    if not p.picture.any():
        raise ValueError(f"sample {sample.id!r} shows no picture to attend to")
    asked = [i for text, who in zip(p.texts, p.speakers, strict=True) if who == "user" for i in text]
    if rows == "question" and not asked:
        raise ValueError(f"sample {sample.id!r} has no words of a user")
    at = torch.tensor(asked if rows == "question" else [len(sequence) - 1], device=model.device)
    picture, text = (p.picture | p.picture_markers, p.text | p.text_markers) if markers else (p.picture, p.text)
    groups = torch.stack([picture, text, ~(picture | text)]).to(model.device, torch.float32)
    masses: list[torch.Tensor] = []
    collect.read(model, sequence, lambda layer, call: masses.append(groups @ call.weights(0, at).mean((0, 1))))
    return torch.stack(masses, 1).cpu().double().numpy()


def request(sample: Sample) -> Sample:
    """The sample up to the answer: the assistant's last message is replaced by an open turn."""
    if sample.is_open:
        return sample
    messages = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
    return replace(sample, messages=(*messages, assistant()))


def change(ours: np.ndarray, base: np.ndarray) -> list[Interval]:
    """Percent by which the mean over requests differs from the base model's, layer by layer, with a 95 % interval.

    Both are (requests, layers) of the same requests; the interval is that of their paired differences, relative to the
    base's mean. Raises ``ValueError`` where shapes differ: two models of different depth have no common layers.
    """
    if ours.shape != base.shape:
        raise ValueError(
            f"cannot compare {ours.shape[1]} layers of {len(ours)} requests with {base.shape[1]} of {len(base)}"
        )
    return [_interval(100 * (ours[:, i] - base[:, i]) / base[:, i].mean()) for i in range(ours.shape[1])]


def _interval(values: np.ndarray) -> Interval:
    names = ("value", "low", "high")
    pairs = zip(names, intervals.mean(values.tolist()), strict=True)
    return {name: None if np.isnan(v) else round(v, 6) for name, v in pairs}


def describe(rows: Rows, markers: bool) -> Mapping[str, str]:
    """What was measured, in words, for the file of numbers."""
    asked = "the token that predicts the first word of the answer" if rows == "answer" else "every word of the user"
    counted = "count with their segment" if markers else "count as neither"
    return {"query_rows": asked, "markers": f"markers around texts and pictures {counted}", "weights": "as computed"}
