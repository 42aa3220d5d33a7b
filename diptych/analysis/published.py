"""SGT's two attention probes as its released code computes them (arXiv 2605.18714; github.com/song2yu/SGT, commit
e004548), for comparison with published figures only.

They differ from the network's attention. Queries lack input norm, bias, query norm and rotation, come from the states
of another layer, and always use the understanding expert. There is no mask. In the keyword probe each word gets the
mass of the token before it. Use ``attention`` and ``keywords`` to measure the network's attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from diptych.analysis import collect, keywords
from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.tensors import NONE, Float, Tensor
from diptych.models.protocol import Drawing, UnifiedModel

ROWS = (-4, -3)  # the query rows that the released code keeps, counted from the end of the question


@torch.no_grad()
def published_weights(model: UnifiedModel, sequence: Layout) -> list[Float[Tensor, "H T T"]]:
    """softmax over all keys of (W_q h_l) k^T / sqrt(D), without mask, for each layer l; h_l are *outputs* of block l.

    Keys are the network's own. Raises ``ValueError`` for a family whose blocks have no ``q_proj``.
    """
    keys: list[Tensor] = []
    states: dict[str, Tensor] = {}
    layers = {f"layer.{i}": layer for i, layer in enumerate(collect.layers(model))}
    with collect.outputs(layers, states.__setitem__):
        collect.read(model, sequence, lambda _, call: keys.append(call.k[0].clone()))
    order = torch.cat(pack([sequence], model.routes).routes).to(model.device)
    return [
        _softmax(_queries(model, layer, states[name].flatten(0, -2)[order.argsort()], k.shape[-1]), k)
        for (name, layer), k in zip(layers.items(), keys, strict=True)
    ]


def published_attention(model: UnifiedModel, sequence: Layout, rows: Sequence[int] = ROWS) -> Float[Tensor, " layers"]:
    """``ATTN_SCORE``: mass on the picture's segment, its markers included, averaged over heads and two query rows."""
    picture = torch.tensor([s.kind != Kind.TEXT for s in sequence.segments for _ in s.ids], device=model.device)
    weights = published_weights(model, sequence)
    return torch.stack([w[:, list(rows)][..., picture].sum(-1).mean() for w in weights])


@torch.no_grad()
def published_keywords(
    model: UnifiedModel, drawing: Drawing, classes: Mapping[str, Sequence[int]]
) -> tuple[Drawing, dict[str, list[float]]]:
    """(the drawing one step on, percent of each word class by layer).

    Queries are W_q x of the picture's *input embeddings*, in every layer; keys are the prompt's alone. ``classes`` are
    places counted from the prompt's first word, but looked up in a context that begins with a marker: the off-by-one.
    """
    layers, entered, keys = collect.layers(model), [], []
    length, n = drawing.contexts[0].length, _tokens(model, drawing)
    first = layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        drawing = collect.step(model, drawing, lambda _, call: keys.append(call.k[0, :, :length].clone()))
    finally:
        first.remove()
    shares: dict[str, list[float]] = {name: [] for name in classes}
    for layer, k in zip(layers, keys, strict=True):
        weights = _softmax(_queries(model, layer, entered[-1][-n:], k.shape[-1]), k).mean((0, 1))
        for name, at in classes.items():
            shares[name].append(100 * float(weights[list(at)].sum()))
    return drawing, shares


def published_shares(
    model: UnifiedModel, prompt: str, words: keywords.Words, steps: int = 4, seed: int = 0
) -> list[dict[str, list[float]]]:
    """``published_keywords`` of a prompt that is drawn from the seed with the model's settings, at ``steps`` steps."""
    sample = Sample("prompt", (user(prompt), assistant(Image(None, "target"))))
    drawing = keywords.begin(model, sample, model.settings, seed)
    number, _ = keywords.classify(model, sample, words)
    text = [i for i, c in enumerate(number.tolist()) if c <= len(words)]
    classes = {name: [i - text[0] for i in text if number[i] == c] for c, name in enumerate((*words, keywords.OTHER))}
    shares_by_step = []
    for step in keywords.spread(drawing.steps, steps):
        while drawing.step < step:
            [drawing] = model.step([drawing])
        drawing, shares = published_keywords(model, drawing, classes)
        shares_by_step.append(shares)
    return shares_by_step


def _tokens(model: UnifiedModel, drawing: Drawing) -> int:
    """Picture tokens that a step recomputes: they end the stream, and are the same in every branch of guidance."""
    return sum(i == NONE for i in keywords.drawn_segment(model, drawing.canvas).ids)


def _queries(model: UnifiedModel, block: nn.Module, states: Tensor, width: int) -> Float[Tensor, "H T D"]:
    """W_q h by the understanding expert (route 0), whatever the token."""
    projection = next((m for name, m in block.named_modules() if name.endswith("q_proj")), None)
    if not isinstance(projection, nn.Linear):
        raise ValueError(f"family {model.family!r} has no q_proj in its blocks, which the published probes need")
    return (states.to(projection.weight.dtype) @ projection.weight.T).float().unflatten(-1, (-1, width)).transpose(0, 1)


def _softmax(q: Tensor, k: Tensor) -> Float[Tensor, "H L S"]:
    k = k.float().repeat_interleave(len(q) // len(k), 0)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
