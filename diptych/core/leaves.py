"""Leaves of nested JSON by dotted path, as ``--set`` and ``--config`` name them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Any


def parse_leaf(text: str, path: str) -> Any:
    """The value of a leaf on the command line: JSON where it is that, else the text. Raises ``ValueError`` for JSON
    that is too deep or has numbers of too many digits."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def set_leaf(node: Any, path: str, value: Any, where: str = "recipe", free: Collection[str] = ()) -> None:
    """Sets a leaf that exists. Inside a mapping whose name is among ``free`` the rest of the path is one key, old or
    new, dots and all. Raises ``ValueError`` for a path that does not exist."""
    _set(node, path, value, where, where, free)


def _set(node: Any, path: str, value: Any, where: str, root: str, free: Collection[str]) -> None:
    key, deeper, rest = path.partition(".")
    place: int | str = key
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ValueError(f"{where} is a list of {len(node)}; {key!r} is not one of its indices")
        place = int(key)
    elif not isinstance(node, dict):
        raise ValueError(f"{where} is {shortened(node)}; it has no field {key!r}")
    elif key not in node:
        near = difflib.get_close_matches(key, node, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(node)}"
        raise ValueError(f"{where} has no field {key!r}{hint}")
    if not deeper:
        node[place] = value
    elif key in free:
        node[place][rest] = value
    else:
        _set(node[place], rest, value, key if where == root else f"{where}.{key}", root, free)


def shortened(value: Any) -> str:
    """The value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
