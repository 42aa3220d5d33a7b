"""What a row of training data is on one visit: one of its wordings, a part of its chain of edits.

``Sample.info`` has the choices, as ``diptych data convert`` writes them. ``wordings`` maps the number of a message ->
texts, one of which is put into the message. ``chain`` marks the row as a chain of edits, of which a visit shows a part
(BAGEL, arXiv 2505.14683).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diptych.core.sample import Image, Message, Sample, Text, assistant, user
from diptych.data.mixture import bits, uniform


@dataclass(frozen=True)
class Chain:
    """A part of a chain of pictures 0 .. n - 1, each the edit of the one before it by instruction 0 .. n - 2.

    ``steps`` are the instructions in use. ``pairs`` are (source, target) of every picture that is drawn; with
    ``joined`` there is one pair, and its text is all instructions, each followed by a full stop."""

    start: int
    steps: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    joined: bool = False

    def text(self, instructions: list[str]) -> list[str]:
        """The text of every pair."""
        texts = [instructions[k] for k in self.steps]
        return [" ".join(f"{text}." for text in texts)] if self.joined else texts


def edit_chains(pictures: int) -> Iterator[tuple[Chain, float]]:
    """Every part of a chain that a visit may show, with its probability (BAGEL's ``UnifiedEditIterableDataset``).

    The start is uniform over all pictures but the last, the end over the one or two pictures after it. Two steps are
    joined into one with probability 1/2; at the end of the chain, joining leaves the last picture out.
    Raises ``ValueError`` for fewer than two pictures."""
    if pictures < 2:
        raise ValueError(f"a chain of edits needs at least two pictures, not {pictures}")
    for start in range(pictures - 1):
        ends = range(start + 1, min(start + 2, pictures - 1) + 1)
        for end in ends:
            p = 1 / (pictures - 1) / len(ends)
            steps = tuple(range(start, end))
            pairs = tuple((k, k + 1) for k in steps)
            if len(steps) == 1:
                yield Chain(start, steps, pairs), p
                continue
            yield Chain(start, steps, pairs), p / 2
            kept = steps if end < pictures - 1 else steps[:1]
            yield Chain(start, kept, ((start, kept[-1] + 1),), joined=True), p / 2


def varied(sample: Sample, *address: object) -> Sample:
    """The sample as the visit at this address shows it. Raises ``ValueError`` for an ``info`` that does not fit."""
    messages = list(sample.messages)
    for key, texts in dict(sample.info.get("wordings") or {}).items():
        at = int(key)
        if not (0 <= at < len(messages) and isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"info.wordings: {key!r} must be a message's number with a list of texts")
        chosen = texts[bits(*address, "wording", key) % len(texts)]
        parts = tuple(replace(p, text=chosen) if isinstance(p, Text) else p for p in messages[at].parts)
        messages[at] = replace(messages[at], parts=parts)
    varied_sample = replace(sample, messages=tuple(messages))
    return _part_of_chain(varied_sample, uniform(*address, "chain")) if sample.info.get("chain") else varied_sample


def prompted(sample: Sample, prompt: str) -> Sample:
    """The sample with its request worded by ``prompt``, in which "{}" stands for the request's own text. A prompt
    without "{}" is added to a request that has no text."""
    at = sample.request_at
    if at is None:
        return sample
    parts = sample.messages[at].parts
    if "{}" in prompt:
        parts = tuple(replace(p, text=prompt.replace("{}", p.text)) if isinstance(p, Text) else p for p in parts)
    elif not any(isinstance(p, Text) for p in parts):
        parts = (*parts, Text(prompt))
    changed = replace(sample.messages[at], parts=parts)
    return replace(sample, messages=(*sample.messages[:at], changed, *sample.messages[at + 1 :]))


def _part_of_chain(sample: Sample, draw: float) -> Sample:
    """The part of a chain that a number in [0, 1) chooses. Raises ``ValueError`` for a sample that is no chain."""
    pictures = list(sample.images())
    texts = [p.text for m in sample.messages for p in m.parts if isinstance(p, Text)]
    if len(pictures) != len(texts) + 1:
        raise ValueError(f"info.chain: {len(pictures)} pictures and {len(texts)} texts are no chain of edits")
    total = 0.0
    for part, probability in edit_chains(len(pictures)):
        chain, total = part, total + probability
        if draw < total:
            break
    messages: list[Message] = []
    for k, ((source, target), text) in enumerate(zip(chain.pairs, chain.text(texts), strict=True)):
        shown: tuple[Image, ...] = () if k else (replace(pictures[source], role="condition"),)
        messages += [user(*shown, text), assistant(replace(pictures[target], role="target"))]
    return replace(sample, messages=tuple(messages))
