"""What was read lately, so that a conversation that goes on is read on and not read again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from diptych.core.layout import Kind, Layout, Segment
from diptych.models.protocol import Context, UnifiedModel

Unit = int | Segment  # a word of causal text, or a segment that can only be read whole


class Memory:
    """The contexts of the last ``most`` readings, each with the tokens that it has read.

    A later turn of a conversation starts from the remembered context that shares the longest beginning with it; caches
    grow at their end only, and whoever branches off copies. First turns are read afresh, so that the picture of a
    prompt and a seed never depends, by a rounding, on what was asked before it.
    """

    def __init__(self, model: UnifiedModel, most: int = 4) -> None:
        self.model, self.most = model, most
        self.known: list[tuple[list[Unit], Context]] = []

    def read(self, sequences: Sequence[Layout], later: Sequence[bool]) -> list[Context]:
        """The contexts after these sequences, all extended together; their logits predict the next word. ``later`` says
        which of them are later turns of a conversation."""
        starts, rests = [], []
        for laid, goes_on in zip(sequences, later, strict=True):
            wanted, shared, start = units(laid.segments), 0, self.model.open()
            if goes_on and self.known:
                shared, nearest = max(((_shared(wanted, have), c) for have, c in self.known), key=lambda x: x[0])
                shared = min(shared, len(wanted) - 1)  # the last unit is read again: it scores the next word
                start = self._rewound(nearest, wanted[:shared]) if shared else start
            starts.append(start)
            rests.append(Layout(laid.id, segments(wanted[shared:])))
        contexts = self.model.extend(starts, rests)
        for laid, context in zip(sequences, contexts, strict=True):
            self.keep(laid, [], context)
        return contexts

    def keep(self, laid: Layout, said: Sequence[int], context: Context) -> None:
        """Remembers the context that has read ``laid`` and then the words ``said``."""
        if self.most:
            self.known = [*self.known, ([*units(laid.segments), *said], context)][-self.most :]

    def _rewound(self, context: Context, read: list[Unit]) -> Context:
        length = sum(1 if isinstance(u, int) else len(u) for u in read)
        return self.model.rewind(context, length, sum(1 if isinstance(u, int) else u.moves for u in read))


def units(segments: Sequence[Segment]) -> list[Unit]:
    """The words of causal texts one by one, every other segment whole."""
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
    """How many units two readings begin with in common."""
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
