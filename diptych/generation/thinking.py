"""Thinking before an answer or a picture: the system text that asks for it, its budget, and its tags."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diptych.core.sample import Message, Sample, Text
from diptych.generation.sampling import check_sampling

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Think:
    """How a plan for a picture is generated: with at most ``max_new_tokens`` tokens, greedily at ``temperature`` 0."""

    max_new_tokens: int = 999  # the published limit of 1000 counts the start marker
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens of thinking must be at least 1, not {self.max_new_tokens}")

    @classmethod
    def of(cls, think: bool | Think) -> Think | None:
        """The budget of ``think``: the default one for True, None for False."""
        return think if isinstance(think, Think) else cls() if think else None


def instructed(sample: Sample, text: str) -> Sample:
    """The conversation with ``text`` as its system message, before the words of one that it has."""
    messages = sample.messages
    system = messages[0] if messages and messages[0].role == "system" else Message("system", ())
    rest = messages[1:] if system.parts else messages
    return replace(sample, messages=(replace(system, parts=(Text(text), *system.parts)), *rest))


def split(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a text: the content of ``<think>`` tags at its beginning, and the text after them."""
    if not text.lstrip().startswith(OPEN):
        return "", text
    reasoning, _, answer = text.lstrip().removeprefix(OPEN).partition(CLOSE)
    return reasoning.lstrip(), answer.lstrip()
