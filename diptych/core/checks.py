"""Checks that configs share."""

from __future__ import annotations

from typing import Any


def at_least(least: int, config: Any, *names: str) -> None:
    """Raises ``ValueError``, naming the field, where a field of a config (or a number in it) is less than ``least``."""
    for name in names:
        value = getattr(config, name)
        if any(v < least for v in (value if isinstance(value, tuple | list) else (value,))):
            raise ValueError(f"{name} must be at least {least}, not {value}")
