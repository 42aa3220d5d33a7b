"""What comes out of the engine while it works, and what it returns when it is done.

Every result carries the parameters that were in effect, defaults included, and its seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import PIL.Image


@dataclass(frozen=True)
class Word:
    """A word said, how likely it was (log-probability), and the likeliest words in its place with theirs."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text; ``words`` where their probabilities were asked for."""

    text: str
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks before its answer or its picture."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePreview:
    """The picture as it looks after ``step`` of ``of`` steps."""

    image: PIL.Image.Image
    step: int
    of: int


@dataclass(frozen=True, eq=False)
class ImageDone:
    """A finished picture."""

    image: PIL.Image.Image
    seed: int


@dataclass(frozen=True)
class Usage:
    """Tokens read and written, pictures drawn."""

    read: int = 0
    written: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class Stop:
    """The end: ``stop`` (the model ended its answer), ``length`` (the limit was reached) or ``image`` (drawn)."""

    reason: str
    usage: Usage
    parameters: Mapping[str, Any] = field(default_factory=dict)


Event = TextDelta | ReasoningDelta | ImagePreview | ImageDone | Stop


@dataclass(frozen=True)
class Answer:
    """A finished answer in words."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    parameters: Mapping[str, Any]
    images: tuple[PIL.Image.Image, ...] = ()  # drawn in its course, where the model began them
    reasoning: str = ""  # what stood in <think> tags before it


@dataclass(frozen=True, eq=False)
class Picture:
    """One finished picture, and the plan that it was drawn from where the model made one."""

    image: PIL.Image.Image
    prompt: str
    seed: int
    parameters: Mapping[str, Any]
    reasoning: str = ""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of one request: picture i has seed ``seed + i`` and was drawn from the plan ``reasoning[i]``."""

    images: list[PIL.Image.Image]
    prompt: str
    seed: int
    parameters: Mapping[str, Any]
    reasoning: tuple[str, ...] = ()
