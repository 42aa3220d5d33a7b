"""A conversation written down as segments: runs of tokens, and pictures between them."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.core.layout import Kind, Layout, Segment
from diptych.core.tensors import NONE


class Runs:
    """Collects token ids into text segments, in order with the segments that are added between them."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.ids: list[int] = []
        self.loss = False

    def write_ids(self, ids: Sequence[int], loss: bool = False) -> None:
        """Appends tokens. A run with ``loss`` begins with the token before it, which predicts its first."""
        if loss != self.loss and self.ids:
            carried = [self.ids.pop()] if loss else []
            self.flush()
            self.ids = carried
        self.loss = loss
        self.ids += ids

    def add(self, segment: Segment) -> None:
        """Appends a segment after the tokens so far."""
        self.flush()
        self.segments.append(segment)

    def flush(self) -> None:
        """Ends the run of tokens."""
        if self.ids:
            ids = tuple(self.ids)
            self.segments.append(Segment(Kind.TEXT, ids, (*ids[1:], NONE) if self.loss else ()))
        self.ids, self.loss = [], False

    def done(self, name: str) -> Layout:
        """The layout of everything so far."""
        self.flush()
        return Layout(name, tuple(self.segments))
