"""Lets ``diptych.train(...)`` be a call although ``diptych.train`` is a package."""

from __future__ import annotations

import importlib
import sys
import types


def make_callable(module: str, home: str) -> None:
    """Calling the module ``module`` calls the function of its last name in the module ``home``."""
    name = module.rpartition(".")[2]

    class Callable(types.ModuleType):
        def __call__(self, *args, **kwargs):
            return getattr(importlib.import_module(home), name)(*args, **kwargs)

    sys.modules[module].__class__ = Callable
