"""Who may attend to whom: the one rule, and the forms that attention back ends need.

Query q may attend to key k when they are in the same document, **and** k is not later than q or both lie in one
``full`` segment, **and** k is in q's own segment or k's segment is not ``hidden``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from diptych.core.tensors import Bool, Int, Tensor


@runtime_checkable
class Columns(Protocol):
    """What the rule reads; a ``Batch`` has them."""

    @property
    def document(self) -> Int[Tensor, " T"]:
        """The document of every token of the row."""

    @property
    def segment(self) -> Int[Tensor, " T"]:
        """The segment of every token of the row."""

    @property
    def full(self) -> Bool[Tensor, " T"]:
        """Whether the token's segment is ``full``."""

    @property
    def hidden(self) -> Bool[Tensor, " T"]:
        """Whether the token's segment is ``hidden``."""


def rule(c: Columns, q: Tensor, k: Tensor) -> Tensor:
    """Whether query places ``q`` may attend to key places ``k`` (integer tensors that broadcast together)."""
    same_segment = c.segment[q] == c.segment[k]
    return (c.document[q] == c.document[k]) & ((k <= q) | (same_segment & c.full[q])) & (same_segment | ~c.hidden[k])


def dense(c: Columns) -> Bool[Tensor, "T T"]:
    """The whole mask, True where attention is allowed: the reference form."""
    places = _places(c)
    return rule(c, places[:, None], places[None, :])


def block(c: Columns, order: Int[Tensor, " T"]) -> Callable:
    """The rule as FlexAttention's ``mask_mod``, for a stream whose i-th token is the row's ``order[i]``-th."""

    def mask_mod(b, h, q, k):  # noqa: ANN001, ANN202  FlexAttention's signature
        return rule(c, order[q], order[k])

    return mask_mod


def _places(c: Columns) -> Tensor:
    return c.segment.new_tensor(range(len(c.segment)))
