"""How each benchmark makes one number of its parts, as published.

``tests/evaluation/test_aggregate.py`` recomputes every overall column of the papers' tables with these functions and
lists the rows that do not agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WISE = {"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
WISE_IDS = {"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}  # the last
VERIFIED = {"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
IMGEDIT = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
GEDIT = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def geneval(tags: Mapping[str, float]) -> float:
    """The unweighted mean of the six tags (not of the images)."""
    return mean(tags[tag] for tag in GENEVAL)


CV_BENCH = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}


def wiscore(consistency: float, realism: float, aesthetic: float) -> float:
    """One picture's WiScore in [0, 1] from three marks of 0 to 2 (WISE, arXiv 2503.07265)."""
    return (7 * consistency + 2 * realism + aesthetic) / 20


def wise(categories: Mapping[str, float]) -> float:
    """The legacy overall: categories weighed by their prompts."""
    return sum(weight * categories[name] for name, weight in WISE.items())


def imgedit(types: Mapping[str, float]) -> float:
    """The mean of the nine types of edits: the script prints none, papers average."""
    return mean(types[name] for name in IMGEDIT)


def cv_bench(ade: float, coco: float, omni3d: float) -> float:
    """Half 2D (ADE20K and COCO evenly), half 3D (Omni3D)."""
    return ((ade + coco) / 2 + omni3d) / 2


def mme(subtasks: Mapping[str, float]) -> tuple[float, float]:
    """(perception, cognition): sums of subtasks of at most 200, ten and four of them."""
    return sum(subtasks[name] for name in PERCEPTION), sum(subtasks[name] for name in COGNITION)
