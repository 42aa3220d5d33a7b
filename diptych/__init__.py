"""diptych: unified multimodal models, networks that read pictures and draw them, behind one protocol.

The public names are resolved on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = {
    "load": "diptych.generate.engine",
    "Engine": "diptych.generate.engine",
    "resume": "diptych.recipes.run",
    "Recipe": "diptych.train.recipe",
    "Sample": "diptych.core.sample",
    "Message": "diptych.core.sample",
    "Text": "diptych.core.sample",
    "Image": "diptych.core.sample",
    "user": "diptych.core.sample",
    "assistant": "diptych.core.sample",
}
_ROOMS = ("train", "evaluate")  # packages that can be called
__all__ = [*_NAMES, *_ROOMS]  # noqa: PLE0604

if TYPE_CHECKING:
    from diptych.core.sample import Image, Message, Sample, Text, assistant, user  # noqa: F401
    from diptych.generate.engine import Engine, load  # noqa: F401


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"diptych.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'diptych' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
