"""Attention over packed documents and over key/value caches, behind one call: ``attend(layer, q, k, v)``.

q is (T, H, D), k and v are (T, K, D) with H a multiple of K; the result is (T, H, D). The classes differ in which
tokens attend to which:

- ``Packed``: the documents of a training row. Documents of similar length share one batched SDPA call, so the cost
  grows with the length of each document, not of the row.
- ``Dense``: one SDPA call over the whole row under the dense mask: the reference.
- ``Block``: FlexAttention under the same mask, for GPUs.
- ``Cached``: new tokens of several contexts against their KV caches (prefill and decode).
- ``Recorded``, ``Continued``: a pass that keeps its keys and values, and causal tokens that continue from them.
- ``Fixed``: picture tokens that are recomputed at every denoising step against contexts that do not change.
- ``Streams``: several contexts that grow together, by one token a call (codes of pictures).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F

from diptych.core import mask as masks
from diptych.core.batch import Batch
from diptych.core.tensors import Bool, Float, Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@runtime_checkable
class Attend(Protocol):
    """Attention for a given set of tokens; every layer calls it once."""

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]:
        """The attended values of every token."""


SHORT = 512  # keys below which attention in bfloat16 has a gradient up to six times slower than in float32 (CPU)
KEY_MULTIPLE = 16  # with a multiple of this many keys, padding at the end does not change the result (CPU, bitwise)


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``sdpa`` whose result does not depend, bit for bit, on how many of the last keys are padding (CPU, no gradient).

    Queries and keys are padded to multiples of ``KEY_MULTIPLE``: the choice of matrix kernel depends on both sizes."""
    n = q.shape[1]
    if mask is not None and k.device.type == "cpu" and not torch.is_grad_enabled():
        rows, missing = -n % KEY_MULTIPLE, -k.shape[1] % KEY_MULTIPLE
        q = F.pad(q, (0, 0, 0, 0, 0, rows))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
        mask = F.pad(mask, (0, missing))
        if mask.shape[-2] == n > 1:
            mask = F.pad(mask, (0, 0, 0, rows), value=True)
    return sdpa(q, k, v, mask=mask)[:, :n]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Grouped-query attention of (B, L, H, D) against (B, S, K, D); ``mask`` is True where allowed."""
    if q.shape[1] == 1 and mask is None and not causal:  # one token: the heads of a group become its queries
        groups = q[:, 0].unflatten(1, (k.shape[2], -1))
        return F.scaled_dot_product_attention(groups, k.transpose(1, 2), v.transpose(1, 2)).flatten(1, 2)[:, None]
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    short = q.device.type == "cpu" and k.shape[1] < SHORT and torch.is_grad_enabled() and wanted != torch.float32
    gqa = q.shape[-2] != k.shape[-2]
    if gqa and mask is not None and q.is_cuda:  # no fused kernel takes a mask and groups: they have as many keys then
        k, v = (x.repeat_interleave(q.shape[-2] // k.shape[-2], -2) for x in (k, v))
        gqa = False
    q, k, v = (x.transpose(1, 2).float() if short else x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False) if short else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    return (out.to(wanted) if short else out).transpose(1, 2)


class _Gather(torch.autograd.Function):
    """Rows of x by ``index``; the gradient is gathered by ``inverse``, so neither pass scatters.

    Row i of x must be at ``inverse[i]`` of the result; other rows of the result (padding) pass no gradient.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Return(torch.autograd.Function):
    """The inverse of ``_Gather``: drops the padding places, whose gradient is zero."""

    @staticmethod
    def forward(ctx, x, index, inverse, padding):
        ctx.save_for_backward(index, padding)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad):
        index, padding = ctx.saved_tensors
        out = grad.index_select(0, index)
        return (out.index_fill_(0, padding, 0) if len(padding) else out), None, None, None


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x in ``order``, a permutation; the gradient is gathered too, without a scatter."""
    return _Gather.apply(x, order, inverse_permutation(order))


def inverse_permutation(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``: the index of each place in it."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@dataclass(frozen=True)
class _Group:
    shape: tuple[int, int]  # documents, padded length
    mask: Tensor | None  # (documents, 1, length, length); None when every document is causal and of this length


class Packed:
    """Attention within the documents of ``batch``. Token i of the stream is token ``order[i]`` of the row."""

    def __init__(self, batch: Batch, order: Tensor | None = None, waste: float = 0.85) -> None:
        device = batch.ids.device
        lengths = [*batch.lengths]
        if tail := len(batch) - sum(lengths):
            lengths.append(tail)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        special = (batch.full | batch.hidden).cpu()
        groups: list[list[int]] = []
        for d in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
            if not groups or lengths[d] < waste * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(d)
        self.groups: list[_Group] = []
        index, valid = [], []
        for members in groups:
            longest = lengths[members[0]]
            offset = torch.arange(longest)
            length = torch.tensor([lengths[d] for d in members])[:, None]
            inside = offset < length
            places = starts[members][:, None] + offset * inside
            causal = bool(inside.all()) and not bool(special[places].any())
            mask = None
            if not causal:
                p = places.to(device)
                mask = masks.rule(batch, p[:, :, None], p[:, None, :]) & inside.to(device)[:, None, :]
                mask = mask[:, None]
            self.groups.append(_Group((len(members), longest), mask))
            index.append(places.flatten())
            valid.append(inside.flatten())
        flat, real = torch.cat(index), torch.cat(valid)
        rank = torch.arange(len(batch)) if order is None else inverse_permutation(order.cpu())
        self.index = rank[flat].to(device)
        inverse = torch.empty(len(batch), dtype=torch.long)
        inverse[rank[flat[real]]] = real.nonzero()[:, 0]
        self.inverse = inverse.to(device)
        self.padding = (~real).nonzero()[:, 0].to(device)
        self.sizes = [g.shape[0] * g.shape[1] for g in self.groups]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; shapes as in ``Attend``."""
        parts = [_Gather.apply(x, self.index, self.inverse).split(self.sizes) for x in (q, k, v)]
        out = []
        for g, *parts_of in zip(self.groups, *parts, strict=True):
            q, k, v = (x.unflatten(0, g.shape) for x in parts_of)
            out.append(sdpa(q, k, v, mask=g.mask, causal=g.mask is None).flatten(0, 1))
        return _Return.apply(torch.cat(out), self.index, self.inverse, self.padding)


class Dense:
    """Attention over the whole row under the dense mask: the reference."""

    def __init__(self, batch: Batch, order: Tensor | None = None) -> None:
        mask = masks.dense(batch)
        self.mask = mask if order is None else mask[order][:, order]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; shapes as in ``Attend``."""
        return sdpa(q[None], k[None], v[None], mask=self.mask)[0]


@lru_cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled function, one for all rows."""
    return torch.compile(function)


BLOCK, SLAB = 128, 1024  # tokens on a side of FlexAttention's blocks; queries whose mask exists at one time


def block_mask(batch: Batch, order: Tensor | None = None) -> BlockMask:
    """FlexAttention's mask of a row of T tokens, for a stream whose i-th token is the row's ``order[i]``-th.

    ``create_block_mask`` gives the same, but lays out the dense mask several times: about 10 T^2 bytes, 10.7 GB for
    32,768 tokens. Here the dense mask of ``SLAB`` queries exists at a time: memory is linear in T."""
    from torch.nn.attention.flex_attention import BlockMask

    T, device = len(batch), batch.ids.device
    places = torch.arange(T, device=device) if order is None else order
    n = -(-T // BLOCK)
    some = torch.zeros(n, n, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    for at in range(0, T, SLAB):
        allowed = masks.rule(batch, places[at : at + SLAB, None], places[None, :])
        padded = F.pad(allowed, (0, n * BLOCK - T, 0, -len(allowed) % BLOCK))
        blocks = padded.unflatten(1, (n, BLOCK)).unflatten(0, (-1, BLOCK))
        rows = slice(at // BLOCK, at // BLOCK + len(blocks))
        some[rows], every[rows] = blocks.any(3).any(1), blocks.all(3).all(1)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(how many blocks of keys every block of queries has; their numbers, the rest after them)."""
        numbers = chosen.to(torch.int32).argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], numbers.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~every),
        *listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=masks.block(batch, places),
        seq_lengths=(T, T),
    )


class Block:
    """FlexAttention under the same mask (its backward needs a GPU)."""

    def __init__(self, batch: Batch, order: Tensor | None = None) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.mask = block_mask(batch, order)
        flex: Any = flex_attention
        self.attention = _compiled(flex) if batch.ids.is_cuda else flex

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; shapes as in ``Attend``."""
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        out = self.attention(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)[0]


def documents(batch: Batch, order: Tensor | None = None) -> Attend:
    """Attention within the documents of a training row: ``Block`` on a GPU, ``Packed`` on a CPU."""
    return Block(batch, order) if batch.ids.is_cuda else Packed(batch, order)


class Cache:
    """The KV cache of a context for every layer: (layers, 2, capacity, K, D); the capacity doubles as it fills.

    Contexts that branch share one buffer: the one whose length is the buffer's may append, any other copies first.
    Prefill therefore returns a new context, the old one stays valid, and the common case copies nothing.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.buffer = torch.empty(layers, 2, 0, heads, width, dtype=dtype, device=device)
        self.used = 0

    def reserve(self, length: int, more: int) -> Cache:
        """A cache with the first ``length`` tokens of this one and space for ``more``: this one where possible."""
        if self.used == length and length + more <= self.buffer.shape[2]:
            self.used = length + more
            return self
        capacity = max(64, 2 * length, length + more)
        new = Cache.__new__(Cache)
        new.buffer = self.buffer.new_empty(*self.buffer.shape[:2], capacity, *self.buffer.shape[3:])
        new.buffer[:, :, :length] = self.buffer[:, :, :length]
        new.used = length + more
        return new


@runtime_checkable
class Read(Protocol):
    """The part of a generation context that attention needs."""

    @property
    def cache(self) -> Cache:
        """Keys and values of what was read."""

    @property
    def length(self) -> int:
        """How many tokens of the cache belong to the context."""


R = TypeVar("R", bound=Read)


class Cached:
    """Attention of new tokens of several contexts, which also writes their keys and values to the caches.

    The stream holds the new tokens of all contexts one after another, permuted by ``order``.
    """

    def __init__(self, caches: Seq[Cache], lengths: Seq[int], batch: Batch, order: Tensor | None = None) -> None:
        self.spans, at = [], 0
        for cache, length, n in zip(caches, lengths, batch.lengths, strict=True):
            mask = None
            if n > 1:
                places = torch.arange(at, at + n, device=batch.ids.device)
                allowed = masks.rule(batch, places[:, None], places[None, :])
                mask = torch.cat([allowed.new_ones(n, length), allowed], 1)
            self.spans.append((cache, at, n, length, mask))
            at += n
        self.order = order
        self.inverse = None if order is None else inverse_permutation(order)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; shapes as in ``Attend``. Also writes the new keys and values to the caches."""
        if self.inverse is not None:
            q, k, v = q[self.inverse], k[self.inverse], v[self.inverse]
        out = []
        for cache, at, n, length, mask in self.spans:
            keys, values = cache.buffer[layer, 0], cache.buffer[layer, 1]
            keys[length : length + n] = k[at : at + n]
            values[length : length + n] = v[at : at + n]
            out.append(sdpa(q[None, at : at + n], keys[None, : length + n], values[None, : length + n], mask=mask)[0])
        joined = torch.cat(out) if len(out) > 1 else out[0]
        return joined if self.order is None else joined[self.order]


class Recorded:
    """Any attention, with the keys and values of every layer kept in ``memory``."""

    def __init__(self, inner: Attend) -> None:
        self.inner = inner
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; shapes as in ``Attend``. Also keeps the keys and values."""
        self.memory[layer] = (k, v)
        return self.inner(layer, q, k, v)


class Continued:
    """Attention of blocks of n tokens, causal within a block, that also attend to their prefix; nothing is kept. A
    block's own keys come first and padding last, so the result does not depend on the other prefixes, bit for bit.

    ``prefix`` returns a layer's keys and values, (blocks, L, K, D) each; ``valid`` says which of them a block attends
    to.
    """

    def __init__(self, prefix: Callable[[int], tuple[Tensor, Tensor]], valid: Bool[Tensor, "N L"], n: int) -> None:
        self.prefix, self.n = prefix, n
        causal = valid.new_ones(n, n).tril().expand(len(valid), -1, -1)
        self.mask = torch.cat([causal, valid[:, None].expand(-1, n, -1)], 2)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; shapes as in ``Attend``."""
        q, k, v = (x.unflatten(0, (-1, self.n)) for x in (q, k, v))
        keys, values = self.prefix(layer)
        return padded_sdpa(q, torch.cat([k, keys], 1), torch.cat([v, values], 1), self.mask).flatten(0, 1)


class Fixed(Generic[R]):
    """Attention of blocks of n picture tokens: full inside a block and to its whole context; nothing is kept.

    Keys and values are in one buffer that is filled once: a block's own places first, which every step overwrites, then
    its context, then padding. Masked padding at the end does not change the result bit for bit (CPU, measured), so a
    block does not depend on the lengths of the other contexts.
    """

    def __init__(self, contexts: Seq[R], n: int) -> None:
        self.contexts, lengths = tuple(contexts), [c.length for c in contexts]
        first, width = contexts[0].cache.buffer, n + max(lengths)
        width += -width % KEY_MULTIPLE
        self.buffer = first.new_zeros(*first.shape[:2], len(contexts), width, *first.shape[3:])
        for b, c in enumerate(contexts):
            self.buffer[:, :, b, n : n + c.length] = c.cache.buffer[:, :, : c.length]
        self.n = n
        seen = torch.arange(width, device=first.device) < n + torch.tensor(lengths, device=first.device)[:, None]
        self.mask = seen[:, None, None, :].expand(-1, 1, n, -1)

    def holds(self, contexts: Seq[Read]) -> bool:
        """Whether the buffer is that of exactly these contexts."""
        return len(contexts) == len(self.contexts) and all(a is b for a, b in zip(contexts, self.contexts, strict=True))

    def over(self, blocks: int, order: Tensor) -> Attend:
        """Attention of the first ``blocks`` blocks. Token i of the stream is token ``order[i]`` of the blocks."""
        inverse, shape, mask = inverse_permutation(order), (blocks, self.n), self.mask[:blocks]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffer[layer, 0, :blocks], self.buffer[layer, 1, :blocks]
            keys[:, : self.n] = k[inverse].unflatten(0, shape)
            values[:, : self.n] = v[inverse].unflatten(0, shape)
            return sdpa(q[inverse].unflatten(0, shape), keys, values, mask=mask).flatten(0, 1)[order]

        return attend


@dataclass(frozen=True, eq=False)
class _Prefix:
    """The first ``length`` tokens of one stream, as a context."""

    cache: Cache
    length: int


class Streams:
    """Copies of several contexts with space for ``more`` tokens each; ``grow`` adds one token to every stream.

    Streams may have different lengths. To continue a stream from an earlier length, or with other streams, build new
    ``Streams`` from its ``prefix``; the original context does not change."""

    def __init__(self, contexts: Seq[Read], more: int) -> None:
        first = contexts[0].cache.buffer
        self.lengths = [c.length for c in contexts]
        room = max(self.lengths) + more
        self.buffer = first.new_zeros(*first.shape[:2], len(contexts), room, *first.shape[3:])
        for i, c in enumerate(contexts):
            self.buffer[:, :, i, : c.length] = c.cache.buffer[:, :, : c.length]

    def prefix(self, stream: int, length: int) -> Read:
        """The first ``length`` tokens of a stream, as a context for new ``Streams``."""
        cache = Cache.__new__(Cache)
        cache.buffer, cache.used = self.buffer[:, :, stream], length
        return _Prefix(cache, length)

    def grow(self) -> Attend:
        """Attention of one new token for each stream, in order, to its stream and itself."""
        device, most = self.buffer.device, max(self.lengths) + 1
        at = torch.tensor(self.lengths, device=device)
        streams = torch.arange(len(at), device=device)
        even = min(self.lengths) == max(self.lengths)
        mask = None if even else (torch.arange(most, device=device) <= at[:, None])[:, None, None]
        self.lengths = [n + 1 for n in self.lengths]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffer[layer]
            keys[streams, at], values[streams, at] = k, v
            return sdpa(q[:, None], keys[:, :most], values[:, :most], mask=mask)[:, 0]

        return attend
