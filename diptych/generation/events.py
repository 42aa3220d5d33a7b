"""The events of a running request, and the results of a finished one.

Every result carries its seed and the parameters that were in effect, defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import PIL.Image


@dataclass(frozen=True)
class TokenLogprob:
    """The text of a token, its log-probability, and (text, log-probability) of the likeliest tokens at its position."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text; ``logprobs`` where the request asks for them."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks before its answer or its picture."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePreview:
    """A preview of the picture after ``step`` of ``steps`` steps."""

    image: PIL.Image.Image
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class ImageDone:
    """A finished picture."""

    image: PIL.Image.Image
    seed: int


@dataclass(frozen=True)
class Usage:
    """Prompt tokens, generated tokens, and pictures drawn."""

    read: int = 0
    written: int = 0
    pictures: int = 0


@dataclass(frozen=True)
class Stop:
    """The last event of a request. ``reason`` is ``stop`` (the model ended its answer), ``length`` (``max_new_tokens``
    was reached) or ``image`` (the picture is finished)."""

    reason: str
    usage: Usage
    parameters: Mapping[str, Any] = field(default_factory=dict)


Event = TextDelta | ReasoningDelta | ImagePreview | ImageDone | Stop


@dataclass(frozen=True)
class Answer:
    """A finished answer. ``ids`` are its tokens; ``images`` are the pictures that the model drew in it."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    parameters: Mapping[str, Any]
    images: tuple[PIL.Image.Image, ...] = ()
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
