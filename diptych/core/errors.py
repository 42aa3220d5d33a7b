"""Suggestions for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: object, choices: Iterable[object]) -> str:
    """``"; did you mean 'x'?"`` for the choice that is spelt most like ``word``, or nothing where none is close."""
    close = get_close_matches(str(word), [str(choice) for choice in choices if str(choice) != str(word)], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
