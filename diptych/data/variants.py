"""What a row of training data may be on one visit: one of its wordings, a part of its chain of edits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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
        said = [instructions[k] for k in self.steps]
        return [" ".join(f"{text}." for text in said)] if self.joined else said


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
