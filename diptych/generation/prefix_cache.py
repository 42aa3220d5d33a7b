"""A cache of contexts, so that a later turn of a conversation is prefilled only from where the last one ended."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from diptych.core.layout import Kind, Layout, Segment
from diptych.models.protocol import Context, UnifiedModel

Unit = int | Segment  # a token of causal text, or a segment that can only be prefilled whole


class PrefixCache:
    """The last ``size`` contexts, each with the units that it holds.

    A later turn of a conversation starts from the cached context that shares the longest prefix with it, and copies it
    where the two diverge. First turns are always prefilled from the start, so that the picture of a prompt and a seed
    never depends, not even by rounding, on earlier requests.
    """

    def __init__(self, model: UnifiedModel, size: int = 4) -> None:
        self.model, self.size = model, size
        self.entries: list[tuple[list[Unit], Context]] = []

    def prefill(self, layouts: Sequence[Layout], later: Sequence[bool]) -> list[Context]:
        """The contexts after these layouts, extended in one batch; their logits predict the next token. ``later`` marks
        the layouts that are later turns of a conversation."""
        starts, rests = [], []
        for layout, is_later in zip(layouts, later, strict=True):
            wanted, shared, start = units(layout.segments), 0, self.model.open()
            if is_later and self.entries:
                shared, nearest = max(((_shared(wanted, have), c) for have, c in self.entries), key=lambda x: x[0])
                shared = min(shared, len(wanted) - 1)  # the last unit is run again for the logits of the next token
                start = self._rewound(nearest, wanted[:shared]) if shared else start
            starts.append(start)
            rests.append(Layout(layout.id, segments(wanted[shared:])))
        contexts = self.model.extend(starts, rests)
        for layout, context in zip(layouts, contexts, strict=True):
            self.keep(layout, [], context)
        return contexts

    def keep(self, layout: Layout, ids: Sequence[int], context: Context) -> None:
        """Caches the context that holds ``layout`` and then the tokens ``ids``."""
        if self.size:
            self.entries = [*self.entries, ([*units(layout.segments), *ids], context)][-self.size :]

    def _rewound(self, context: Context, read: list[Unit]) -> Context:
        length = sum(1 if isinstance(u, int) else len(u) for u in read)
        return self.model.rewind(context, length, sum(1 if isinstance(u, int) else u.moves for u in read))


def units(segments: Sequence[Segment]) -> list[Unit]:
    """The tokens of causal texts one by one, every other segment whole."""
    out: list[Unit] = []
    for s in segments:
        plain = (
            s.kind == Kind.TEXT
            and s.image is None
            and not (s.full or s.hidden or s.shared)
            and s.advance is None
            and not s.gap
        )
        out += s.ids if plain and not s.open else [s]
    return out


def segments(units: Sequence[Unit]) -> tuple[Segment, ...]:
    """The inverse of ``units``, neighbouring texts joined."""
    out: list[Segment] = []
    for words, run in groupby(units, key=lambda u: isinstance(u, int)):
        joined: Any = tuple(run)
        out += [Segment(Kind.TEXT, joined)] if words else joined
    return tuple(out)


def _shared(a: list[Unit], b: list[Unit]) -> int:
    """The length of the longest common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if not _same(x, y)), min(len(a), len(b)))


def _same(a: Unit, b: Unit) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    if any(getattr(a, n) != getattr(b, n) for n in a.__dataclass_fields__ if n not in ("image", "targets")):
        return False
    if a.image is None or b.image is None:
        return a.image is b.image
    return a.image.dtype == b.image.dtype and torch.equal(a.image, b.image)
