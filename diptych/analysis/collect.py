"""Observing a model from outside: its attention calls, the outputs of its modules, and the kind of each token.

No family depends on this. ``attention`` observes every attention call of a block, with the queries (after norm and
rotation, each by its token's own expert), keys (those of the cache included) and mask of the call. ``outputs`` observes
the outputs of modules. Both end with their ``with`` block and change nothing: observed results are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout
from diptych.core.mask import dense
from diptych.core.sample import Sample, Text, user
from diptych.core.tensors import NONE, Bool, Float, Int, Tensor
from diptych.models.protocol import Drawing, Trainable, UnifiedModel

# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a block: what the network hands to scaled-dot-product attention.

    ``block`` is the index of the block in ``model.blocks()``. The keys may be a view of a cache that later steps write
    to, so use a call when it is observed and do not keep it.
    """

    block: int
    q: Float[Tensor, "B H L D"]
    k: Float[Tensor, "B K S D"]
    mask: Tensor | None
    causal: bool
    scale: float | None

    def weights(self, item: int = 0, rows: Int[Tensor, " R"] | None = None) -> Float[Tensor, "H R S"]:
        """softmax(q k^T / sqrt(D)) under the call's own mask, in float32: for one item of the batch and the given query
        rows (default: all). Every row sums to 1."""
        rows = torch.arange(self.q.shape[-2], device=self.q.device) if rows is None else rows
        q, k = self.q[item, :, rows].float(), self.k[item].float()
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores = scores + self._mask(item)[..., rows, :]
        return scores.masked_fill(~self.visible(item)[..., rows, :], -torch.inf).softmax(-1)

    def visible(self, item: int = 0) -> Bool[Tensor, "*H L S"]:
        """Which keys each query may see: (L, S), or (heads, L, S) for a mask that tells heads apart."""
        L, S = self.q.shape[-2], self.k.shape[-2]
        seen = torch.ones(L, S, dtype=torch.bool, device=self.q.device)
        if self.mask is not None:
            seen = self._mask(item) if self.mask.dtype == torch.bool else self._mask(item) > -torch.inf
        seen = seen.tril() if self.causal else seen
        return seen[0] if seen.dim() == 3 and seen.shape[0] == 1 else seen

    def _mask(self, item: int) -> Tensor:
        assert self.mask is not None
        shape = (self.q.shape[0], self.q.shape[1] if self._by_head else 1, self.q.shape[-2], self.k.shape[-2])
        return self.mask.expand(shape)[item]

    @property
    def _by_head(self) -> bool:
        return self.mask is not None and self.mask.dim() > 2 and self.mask.shape[-3] > 1


def _call(block, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return AttentionCall(block, query, key, attn_mask, is_causal, scale)


class _Watch(TorchFunctionMode):
    def __init__(self, see: Callable[[AttentionCall], None], inside: list[int]) -> None:
        super().__init__()
        self.see, self.inside = see, inside

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside:
            with torch.no_grad():
                self.see(_call(self.inside[-1], *args, **kwargs))
        return func(*args, **kwargs)


@contextmanager
def attention(model: Trainable, see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Within the context, ``see`` gets every attention call of the model's blocks, before it is computed."""
    inside: list[int] = []
    handles = []
    for i, block in enumerate(model.blocks()):
        handles.append(block.register_forward_pre_hook(lambda module, args, i=i: inside.append(i)))
        handles.append(block.register_forward_hook(lambda *_: _leave(inside), always_call=True))
    try:
        with _Watch(see, inside):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _leave(inside: list[int]) -> None:
    inside.pop()


def read(model: UnifiedModel, sequence: Layout, see: Callable[[int, AttentionCall], None]) -> None:
    """Prefills one sequence into an empty context; ``see`` gets (layer, call) where a block attends over all of it.

    Rows and columns are the sequence's tokens in order. Raises ``ValueError`` for a family whose blocks attend
    otherwise, or under another mask than that of core/mask.py.
    """
    rule, seen = dense(pack([sequence], model.routes).to(model.device)), []

    def check(call: AttentionCall) -> None:
        if call.q.shape[-2] != len(sequence) or call.k.shape[-2] != len(sequence) or len(call.q) > 1:
            return
        if not bool((call.visible() == rule).all()):
            raise ValueError(f"family {model.family!r} attends in another order or by another rule than core.mask's")
        seen.append(call.block)
        see(len(seen) - 1, call)

    with attention(model, check):
        model.extend([model.open()], [sequence])
    _once_each(model, seen, f"the {len(sequence)} tokens of a sequence")


def step(model: UnifiedModel, drawing: Drawing, see: Callable[[int, AttentionCall], None]) -> Drawing:
    """One step of a drawing; ``see`` gets (layer, call) where a block attends from the picture to its context.

    Only the branch of the full context (``contexts[0]``) is observed. Its tokens are the first keys, the picture's
    tokens follow; padding is removed. Raises ``ValueError`` for a family whose blocks attend otherwise.
    """
    context, seen = drawing.contexts[0], []
    trunk = {id(layer) for layer in layers(model)}
    observed = {i for i, block in enumerate(model.blocks()) if id(block) in trunk}  # others attend inside one token

    def check(call: AttentionCall) -> None:
        if call.block not in observed or call.k.shape[-2] <= context.length:
            return
        seen.append(call.block)
        see(len(seen) - 1, _prompt_first(model, call, context.cache.buffer[len(seen) - 1, 0, : context.length]))

    with attention(model, check):
        [drawing] = model.step([drawing])
    _once_each(model, seen, f"a picture and the {context.length} tokens of its prompt")
    return drawing


def _prompt_first(model: UnifiedModel, call: AttentionCall, prompt: Float[Tensor, "S K D"]) -> AttentionCall:
    """Item 0 of a call with its keys reordered: those of the prompt first, then the others that the picture sees.

    The prompt's keys are found by comparison; they lie before or after the picture's."""
    n = len(prompt)
    starts = (at for at in (0, call.q.shape[-2]) if torch.equal(call.k[0, :, at : at + n], prompt.transpose(0, 1)))
    if (at := next(starts, None)) is None:
        raise ValueError(f"family {model.family!r} changes the keys of the prompt between prefill and drawing")
    visible = call.visible().flatten(0, -2)
    others = visible.any(0)
    others[at : at + n] = False
    order = torch.cat([torch.arange(at, at + n, device=others.device), others.nonzero()[:, 0]])
    if not bool(visible[:, order].all()):
        raise ValueError(f"family {model.family!r} masks a part of the keys from the picture that is drawn")
    return AttentionCall(call.block, call.q[:1], call.k[:1, :, order], None, False, call.scale)


def _once_each(model: UnifiedModel, seen: list[int], what: str) -> None:
    if not seen or len(set(seen)) != len(seen):
        raise ValueError(
            f"family {model.family!r} has no attention to look at: its blocks must attend once each over {what}; "
            f"such calls were made by blocks {seen or 'none'}"
        )


def layers(model: UnifiedModel) -> list[nn.Module]:
    """The layers of the model in order: its blocks that attend over the sequence, without those of a vision encoder.

    They are found by reading a digit. Raises ``ValueError`` as ``read`` does."""
    blocks, attending = list(model.blocks()), []
    digit = model.lay_out(Sample("digit", (user("1"),)))
    read(model, digit, lambda layer, call: attending.append(blocks[call.block]))
    return attending


# ---- outputs of modules ----------------------------------------------------------------------------------------------


@contextmanager
def outputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context, ``see`` gets the name and the detached output of each of ``modules`` that runs."""

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            see(name, output.detach())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module(model: UnifiedModel, point: str) -> nn.Module:
    """The module of a point: ``layer.N`` (see ``layers``; counted from 0), or a part that is one module ("vision").

    Raises ``ValueError`` that lists the points of the family.
    """
    blocks = layers(model)
    points = [p for p in model.parts if _root(model, p)]
    kind, _, number = point.partition(".")
    if kind == "layer" and number.isdigit() and int(number) < len(blocks):
        return blocks[int(number)]
    if point in points:
        return model.get_submodule(_root(model, point))
    raise ValueError(
        f"family {model.family!r} has no point {point!r}; it has {', '.join(points)}, "
        f"layer.0 .. layer.{len(blocks) - 1}"
    )


def is_point(model: Trainable, part: str) -> bool:
    """Whether a part is a single module, whose output can be observed."""
    return part in model.parts and bool(_root(model, part))


def _root(model: Trainable, part: str) -> str:
    """The path of the one module that holds the part, or ""."""
    globs = model.parts[part]
    path = globs[0].removesuffix(".*") if len(globs) == 1 else ""
    names = {name for name, _ in model.named_modules()}
    return path if path in names else ""


# ---- kinds of tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens of a sequence, each in one of four groups, (T,) bool: of pictures, the markers in a picture's segment,
    words, and markers around words. ``texts`` are the places of each text of the sample, in order; ``speakers`` says
    whose they are."""

    picture: Bool[Tensor, " T"]
    picture_markers: Bool[Tensor, " T"]
    text: Bool[Tensor, " T"]
    text_markers: Bool[Tensor, " T"]
    texts: tuple[tuple[int, ...], ...]
    speakers: tuple[str, ...]


def places(model: UnifiedModel, sample: Sample, sequence: Layout) -> Places:
    """The kind of each token of a laid-out sample, from the segments' kinds and by a search for the sample's texts.

    Raises ``ValueError`` for a text that is not among the tokens: the family changes it, so its markers are unknown.
    """
    ids = [i for s in sequence.segments for i in s.ids]
    in_text = torch.tensor([s.kind == Kind.TEXT for s in sequence.segments for _ in s.ids])
    open_ = torch.tensor(ids) == NONE
    word, texts, speakers = torch.zeros(len(ids), dtype=torch.bool), [], []
    where = [i for i in range(len(ids)) if in_text[i]]
    text_ids, at = [ids[i] for i in where], 0
    for message in sample.messages:
        for part in message.parts:
            if not isinstance(part, Text):
                continue
            run = model.tokenizer.encode(part.text)
            starts = range(at, len(text_ids) - len(run) + 1)
            start = next((i for i in starts if text_ids[i : i + len(run)] == run), None)
            if start is None:
                raise ValueError(
                    f"family {model.family!r} changes the text {part.text!r}, so its tokens cannot be found"
                )
            at = start + len(run)
            texts.append(tuple(where[start:at]))
            speakers.append(message.role)
            word[list(texts[-1])] = True
    return Places(~in_text & open_, ~in_text & ~open_, word, in_text & ~word, tuple(texts), tuple(speakers))


def words(model: UnifiedModel, text: str, at: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """The words of a text with the positions of their tokens; ``at`` are the positions of all its tokens.

    Words are separated by spaces, in lower case, without punctuation at their ends. A token belongs to the word that
    holds its first letter.
    """
    ids = model.tokenizer.encode(text)
    assert len(ids) == len(at)
    prefixes = [model.tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    spans: list[tuple[str, list[int]]] = []
    for i, place in enumerate(at):
        new = prefixes[i + 1][len(prefixes[i]) :]
        begins = not spans or new[:1].isspace() or prefixes[i][-1:].isspace()
        if begins:
            spans.append(("", []))
        spans[-1] = (spans[-1][0] + new, [*spans[-1][1], place])
    return [(word.strip().strip(".,;:!?\"'()").lower(), tuple(p)) for word, p in spans]
