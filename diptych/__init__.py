"""diptych: unified multimodal models, networks that read pictures and draw them, behind one protocol.

The names below are imported on first use, so ``import diptych`` costs milliseconds and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.core.sample import Image as Image
    from diptych.core.sample import Message as Message
    from diptych.core.sample import Sample as Sample
    from diptych.core.sample import Text as Text
    from diptych.core.sample import assistant as assistant
    from diptych.core.sample import user as user
    from diptych.evaluation.harness import evaluate as evaluate
    from diptych.generation.engine import Engine as Engine
    from diptych.generation.engine import load as load
    from diptych.recipes.run import resume as resume
    from diptych.recipes.run import train as train
    from diptych.training.recipe import Recipe as Recipe

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Image",
    "Message",
    "Recipe",
    "Sample",
    "Text",
    "assistant",
    "evaluate",
    "load",
    "resume",
    "train",
    "user",
]

_HOMES = {
    "Engine": "diptych.generation.engine",
    "Image": "diptych.core.sample",
    "Message": "diptych.core.sample",
    "Recipe": "diptych.training.recipe",
    "Sample": "diptych.core.sample",
    "Text": "diptych.core.sample",
    "assistant": "diptych.core.sample",
    "evaluate": "diptych.evaluation.harness",
    "load": "diptych.generation.engine",
    "resume": "diptych.recipes.run",
    "train": "diptych.recipes.run",
    "user": "diptych.core.sample",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'diptych' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
