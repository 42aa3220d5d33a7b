"""Folders of transformers and diffusers, read whole or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading(source: str | Path, kind: str) -> Iterator[None]:
    """Whatever stops these libraries from reading ``source`` becomes a ``ValueError`` that names it."""
    try:
        yield
    except Exception as error:  # their checks of settings raise classes of their own
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            raise
        raise ValueError(f"{source} cannot be read as {kind}: {(str(error) or repr(error)).splitlines()[0]}") from error


def pretrained(cls: Any, source: str | Path, kind: str, **how: Any) -> Any:
    """A model with all of its weights. Raises ``ValueError`` where it cannot be read or lacks some, which these
    libraries would draw at random."""
    with reading(source, kind):
        model, told = cls.from_pretrained(str(source), output_loading_info=True, **how)
    if missing := sorted(told["missing_keys"]):
        some = f"{', '.join(missing[:6])}{' ...' if missing[6:] else ''}"
        raise ValueError(f"{source} is not {kind} as its config.json says: it lacks {some}")
    return model
