"""Attention back ends against the rule: over packed documents, over caches, forward and backward."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diptych.core import mask as masks
from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.tensors import NONE
from diptych.parts.attention import (
    Block,
    Cache,
    Cached,
    Dense,
    Fixed,
    Packed,
    block_mask,
    inverse_permutation,
    permute,
    sdpa,
)
from tests.support.tolerances import ATTENTION, ATTENTION_GRADIENT

segments = st.builds(
    lambda n, full, hidden, shared, route: Segment(
        Kind.TEXT, (NONE,) * n if route else (3,) * n, full=full, hidden=hidden, shared=shared, route=route
    ),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1),
)
rows = st.lists(st.lists(segments, min_size=1, max_size=4).map(lambda s: Layout("s", tuple(s))), min_size=1, max_size=5)
pads = st.sampled_from([None, 8, 32])
heads = st.sampled_from([(2, 2), (4, 2), (4, 1)])


def columns(length, heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(length, n, 8, generator=generator, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    return q, k, v


def by_hand(batch, q, k, v):
    """One query at a time: softmax over the keys that the rule names, spelled out."""
    per = q.shape[1] // k.shape[1]
    column = {n: getattr(batch, n).tolist() for n in ("document", "segment", "full", "hidden")}
    out = []
    for i in range(len(q)):
        keys = [
            j
            for j in range(len(k))
            if column["document"][i] == column["document"][j]
            and (j <= i or (column["segment"][i] == column["segment"][j] and column["full"][i]))
            and (column["segment"][i] == column["segment"][j] or not column["hidden"][j])
        ]
        heads = []
        for h in range(q.shape[1]):
            scores = k[keys, h // per] @ q[i, h] / q.shape[-1] ** 0.5
            heads.append(scores.softmax(0) @ v[keys, h // per])
        out.append(torch.stack(heads))
    return torch.stack(out)


def gradients(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad((out * weight).sum(), inputs)


def same(a, b, atol):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


@settings(max_examples=25, deadline=None)
@given(rows, pads, heads)
def test_dense_is_the_rule(sequences, pad_to, heads):
    batch = pack(sequences, 2, pad_to)
    q, k, v = columns(len(batch), heads)
    a, b = Dense(batch)(0, q, k, v), by_hand(batch, q, k, v)
    assert same(a, b, ATTENTION)
    assert all(same(x, y, ATTENTION_GRADIENT) for x, y in zip(gradients(a, (q, k, v)), gradients(b, (q, k, v))))


@settings(max_examples=80, deadline=None)
@given(rows, pads, heads, st.sampled_from([0.3, 0.85, 1.0]), st.booleans())
def test_packed_equals_dense(sequences, pad_to, heads, waste, routed):
    batch = pack(sequences, 2, pad_to)
    order = torch.cat(batch.routes) if routed else None
    q, k, v = columns(len(batch), heads)
    a, b = (attend(0, q, k, v) for attend in (Packed(batch, order, waste), Dense(batch, order)))
    assert same(a, b, ATTENTION)
    assert all(same(x, y, ATTENTION_GRADIENT) for x, y in zip(gradients(a, (q, k, v)), gradients(b, (q, k, v))))


@settings(max_examples=40, deadline=None)
@given(rows, pads)
def test_the_rule_keeps_its_promises(sequences, pad_to):
    batch = pack(sequences, 2, pad_to)
    allowed = masks.dense(batch)
    document, segment = batch.document, batch.segment
    assert bool(allowed.diagonal().all())  # nobody is left with nothing to see
    assert not bool((allowed & (document[:, None] != document[None])).any())
    assert not bool((allowed & batch.hidden[None] & (segment[:, None] != segment[None])).any())
    ahead = torch.ones_like(allowed).triu(1)
    assert not bool((allowed & ahead & ~((segment[:, None] == segment[None]) & batch.full[:, None])).any())


@pytest.fixture
def plain_rule(monkeypatch):
    """The rule without run-time checks of shapes, which FlexAttention's tracer cannot see through."""
    spec = importlib.util.spec_from_file_location("plain_mask", masks.__file__)
    plain = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_mask", plain)  # where the tracer looks for its globals
    spec.loader.exec_module(plain)
    monkeypatch.setattr(masks, "block", plain.block)


@pytest.mark.parametrize("routed", [False, True])
def test_block_equals_dense(routed, plain_rule):
    """FlexAttention runs eagerly on a CPU, forwards only; its backward needs a GPU."""
    sequences = [
        Layout("a", (_text(30), _picture(9), _picture(9, hidden=True), _text(5))),
        Layout("b", (_picture(50, hidden=True), _text(40))),
        Layout("c", (_text(1),)),
    ]
    batch = pack(sequences, 2, 64)
    order = torch.cat(batch.routes) if routed else None
    for heads in ((2, 2), (4, 2)):
        q, k, v = (x.detach() for x in columns(len(batch), heads))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
            block = Block(batch, order)
            assert same(block(0, q, k, v), Dense(batch, order)(0, q, k, v), ATTENTION)


@settings(max_examples=10, deadline=None)
@given(rows, st.sampled_from([None, 300, 512]), st.booleans())
def test_the_mask_of_blocks_is_that_of_torch(sequences, pad_to, routed):
    """Block for block what ``create_block_mask`` finds in the dense mask, at a fraction of its memory."""
    batch = pack([Layout("long", (_text(130), _picture(140), _text(10))), *sequences], 2, pad_to and pad_to + 200)
    order = torch.cat(batch.routes) if routed else torch.arange(len(batch))
    made = block_mask(batch, order if routed else None)
    dense = masks.dense(batch)[order][:, order]
    expected = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, len(batch), len(batch), device="cpu")
    place = torch.arange(len(batch))
    assert torch.equal(made.mask_mod(None, None, place[:, None], place[None]), dense)
    assert torch.equal(made.to_dense(), expected.to_dense()) and made.sparsity() == expected.sparsity()
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name


def test_the_mask_of_blocks_takes_memory_linear_in_the_row():
    """The largest tensor is the mask of one slab of queries, never the row's T x T."""
    batch = pack([Layout("a", (_text(9000),))], 1)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    with Sizes():
        block_mask(batch)
    assert largest <= 1024 * (9000 + 128) * 8 < 9000**2


def test_masked_attention_on_a_gpu_has_a_fused_kernel(monkeypatch):
    """With a mask and fewer heads of keys than of queries, CUDA's fused kernels refuse; keys are repeated then."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **how):
        calls.append((q.shape[1], k.shape[1], how["enable_gqa"]))
        return real(q, k, v, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for device in ("cuda", "cpu"):
        with FakeTensorMode():
            q, k, v = (torch.empty(2, 5, heads, 8, device=device) for heads in (6, 2, 2))
            sdpa(q, k, v, mask=torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device))
    assert calls == [(6, 6, False), (6, 2, True)]


def _text(n):
    return Segment(Kind.TEXT, (3,) * n)


def _picture(n, hidden=False):
    return Segment(Kind.CLEAN, (NONE,) * n, full=True, hidden=hidden, shared=True, advance=1, route=1)


@given(st.permutations(range(7)))
def test_permute_and_back(order):
    order = torch.tensor(order)
    x = torch.randn(7, 3, requires_grad=True)
    assert torch.equal(permute(permute(x, order), inverse_permutation(order)), x)
    weight = torch.randn(7, 3)
    [way] = torch.autograd.grad((permute(x, order) * weight).sum(), x)
    [plain] = torch.autograd.grad((x[order] * weight).sum(), x)
    assert torch.equal(way, plain)


# ---- caches -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows.filter(lambda r: len(r) > 1), heads)
def test_reading_after_a_cache_equals_reading_it_all(sequences, heads):
    """Segment by segment into caches, against one packed row. Nothing hidden: hidden segments are never read."""
    sequences = [replace(s, segments=tuple(replace(x, hidden=False) for x in s.segments)) for s in sequences]
    whole = pack(sequences, 2)
    q, k, v = (x.detach() for x in columns(len(whole), heads))
    expected = Dense(whole)(0, q, k, v)
    caches = [Cache(1, heads[1], 8, torch.float32, "cpu") for _ in sequences]
    lengths = [0] * len(sequences)
    starts = torch.tensor([0, *whole.lengths]).cumsum(0).tolist()
    for turn in range(max(len(s.segments) for s in sequences)):
        going = [i for i, s in enumerate(sequences) if turn < len(s.segments)]
        pieces = [replace(sequences[i], segments=sequences[i].segments[turn : turn + 1]) for i in going]
        batch = pack(pieces, 2)
        order = torch.cat(batch.routes)
        places = torch.cat([torch.arange(len(p)) + starts[i] + lengths[i] for i, p in zip(going, pieces)])
        for i, p in zip(going, pieces):
            caches[i] = caches[i].reserve(lengths[i], len(p))
        attend = Cached([caches[i] for i in going], [lengths[i] for i in going], batch, order)
        out = attend(0, *(x[places][order] for x in (q, k, v)))
        assert same(out, expected[places][order], ATTENTION)
        for i, p in zip(going, pieces):
            lengths[i] += len(p)


def test_a_cache_is_shared_until_two_write():
    root = Cache(1, 1, 2, torch.float32, "cpu").reserve(0, 3)
    root.buffer[:, :, :3] = 1.0
    first = root.reserve(3, 2)
    assert first is root  # whoever stands at the end may write on
    first.buffer[:, :, 3:5] = 2.0
    second = root.reserve(3, 2)
    assert second is not first  # anyone else copies what is theirs
    second.buffer[:, :, 3:5] = 3.0
    assert float(first.buffer[0, 0, 3, 0, 0]) == 2.0 and float(second.buffer[0, 0, 2, 0, 0]) == 1.0
    grown = first.reserve(5, 1000)
    assert grown.buffer.shape[2] >= 1005 and torch.equal(grown.buffer[:, :, :5], first.buffer[:, :, :5])


class _Read:
    def __init__(self, cache, length):
        self.cache, self.length = cache, length


@pytest.mark.parametrize("lengths", [(4, 4), (1, 6, 3), (0, 5), (0, 0)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_blocks_over_contexts_that_do_not_change(lengths, heads):
    n, blocks = 3, len(lengths)
    q, k, v = (x.detach() for x in columns(blocks * n, heads))
    contexts = []
    for i, length in enumerate(lengths):
        cache = Cache(1, heads[1], 8, torch.float32, "cpu").reserve(0, max(length, 1))
        cache.buffer[0, :, :length] = torch.randn(2, length, heads[1], 8, generator=torch.Generator().manual_seed(i))
        contexts.append(_Read(cache, length))
    table = Fixed(contexts, n)
    order = torch.randperm(blocks * n, generator=torch.Generator().manual_seed(1))
    out = table.over(blocks, order)(0, q[order], k[order], v[order])[inverse_permutation(order)]
    for i, c in enumerate(contexts):
        own = slice(i * n, (i + 1) * n)
        keys, values = (torch.cat([c.cache.buffer[0, w, : c.length], x[own]]) for w, x in ((0, k), (1, v)))
        per = heads[0] // heads[1]
        scores = torch.einsum("qhd,khd->hqk", q[own], keys.repeat_interleave(per, 1)) / 8**0.5
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(per, 1))
        assert same(out[own], expected, ATTENTION)
    assert table.holds(contexts) and not table.holds(contexts[:-1])
    if blocks > 1:
        half = torch.arange(n)
        assert same(table.over(1, half)(0, q[:n], k[:n], v[:n]), out[:n], ATTENTION)


@pytest.mark.parametrize("full", [False, True])
def test_short_documents_are_attended_in_float32_under_autocast(full):
    """On a CPU the gradient of attention in bfloat16 is slower than in float32; the result is bfloat16 all the same."""
    batch = pack([Layout(str(n), (Segment(Kind.TEXT, (3,) * n, full=full),)) for n in (5, 9, 8)])
    qkv = columns(len(batch), (4, 2))
    exact = Packed(batch)(0, *qkv)
    with torch.autocast("cpu", torch.bfloat16):
        out = Packed(batch)(0, *qkv)
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.to(torch.bfloat16))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    half, whole = (torch.autograd.grad(x, qkv, weights.to(x.dtype)) for x in (out, exact))
    assert all(torch.equal(a, b) for a, b in zip(half, whole, strict=True))
