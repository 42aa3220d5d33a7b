"""Loads complete models of transformers and diffusers, and turns their errors into ``ValueError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading(source: str | Path, kind: str) -> Iterator[None]:
    """Turns any error of these libraries into a ``ValueError`` that names ``source`` and ``kind``."""
    try:
        yield
    except Exception as error:  # their checks of settings raise classes of their own
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            raise
        raise ValueError(f"{source} cannot be read as {kind}: {(str(error) or repr(error)).splitlines()[0]}") from error


def pretrained(cls: Any, source: str | Path, kind: str, **options: Any) -> Any:
    """The model of ``cls.from_pretrained(source, **options)``. Raises ``ValueError`` where it cannot be read or lacks
    weights, which these libraries would initialise at random."""
    with reading(source, kind):
        model, info = cls.from_pretrained(str(source), output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        some = f"{', '.join(missing[:6])}{' ...' if missing[6:] else ''}"
        raise ValueError(f"{source} is not {kind} as its config.json says: it lacks {some}")
    return model
