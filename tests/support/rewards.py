"""Rewards that tests name as a user names his own: ``tests.support.rewards:FUNCTION``."""

from __future__ import annotations

import numpy as np


def red(asks, made):
    """How much redder than blue a picture is, on a scale of small models."""
    means = [np.asarray(m, np.float32).mean((0, 1)) for m in made]
    return [float(m[0] - m[2]) / 255 for m in means]


def same(asks, made):
    return [1.0] * len(made)


def nothing(asks, made):
    return [None] * len(made)


def undefined(asks, made):
    return [float("nan")] * len(made)


def few(asks, made):
    return [1.0]


def letters(asks, made):
    """How many letters a text has; 0 for a picture."""
    return [float(len(m)) if isinstance(m, str) else None for m in made]


down = {"after": None}  # calls until the judge of ``flaky`` is gone; None: never


def flaky(asks, made):
    if down["after"] is not None:
        down["after"] -= 1
        if down["after"] < 0:
            raise ConnectionError("the judge cannot be reached")
    return red(asks, made)
