"""Loaders for tests, their plan given by name."""

from __future__ import annotations

from dataclasses import fields

from diptych.data.loader import Loader, LoaderConfig


def make_loader(sources, weights, lay_out, **how) -> Loader:
    """A loader of ``sources``; ``how`` are fields of ``LoaderConfig`` and options of ``Loader``."""
    names = {f.name for f in fields(LoaderConfig)}
    plan = LoaderConfig(weights, **{name: value for name, value in how.items() if name in names})
    return Loader(sources, plan, lay_out, **{name: value for name, value in how.items() if name not in names})
