"""Scores of a model, with intervals and the settings that produced them, and the pages that show them.

``diptych.evaluate(engine, ["mini"])`` runs ``harness.evaluate``."""

from diptych.core.callable import make_callable
from diptych.evaluate.harness import evaluate

__all__ = ["evaluate"]

make_callable(__name__, "diptych.evaluate.harness")
