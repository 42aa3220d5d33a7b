"""Key maps between published checkpoints and ours: pure data, read in both directions, strict in both.

A map is a tuple of ``Rule``: a pattern of their names and the pattern (or patterns) of ours. In a pattern ``*`` is one
part of a dotted name and ``**`` any number of them; the n-th star of one side is the n-th star of the other. Maps are
joined with ``+``::

    state = load(BAGEL + FLUX_AUTOENCODER, theirs, model.state_dict())
    theirs = export(BAGEL, model.state_dict())

A decoder on its own: ``TEXT`` (Qwen2, Qwen3, Llama) or ``internlm2(config)``, with ``decoder_config`` for the sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

import torch
from einops import EinopsError
from torch import Tensor

State = Mapping[str, Tensor]


def _same(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Their tensor is our tensors. ``split`` turns theirs into ours and ``join`` ours into theirs.

    ``optional``: a checkpoint may lack it, since the model computes it. ``alias`` names another of their tensors that
    this one repeats where the model ties the two (a head): it is checked and then left out, and ``repeated`` writes it
    again. ``ignored`` tensors (old rotary tables) are dropped.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    join: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    optional: bool = False
    alias: str | None = None
    ignored: bool = False
    repeated: bool = False


Rules = tuple[Rule, ...]


def rules(names: Mapping[str, str], **options: Any) -> Rules:
    """One rule for each pair of names."""
    return tuple(Rule(theirs, (ours,), **options) for theirs, ours in names.items())


def within(rules: Rules, theirs: str = "", ours: str = "") -> Rules:
    """The same rules for a module that stands under a prefix on either side."""
    return tuple(
        replace(
            r,
            theirs=theirs + r.theirs,
            ours=tuple(ours + name for name in r.ours),
            alias=None if r.alias is None else theirs + r.alias,
        )
        for r in rules
    )


@dataclass(frozen=True)
class Step:
    """One tensor of theirs and the names of ours that it becomes (none: it only repeats ``rule.alias``)."""

    theirs: str
    rule: Rule
    ours: tuple[str, ...]

    def apply(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Our tensors. Raises ``ValueError`` where one that is to repeat another differs from it."""
        tensor = read(self.theirs)
        if self.ours:
            return dict(zip(self.ours, self.rule.split((tensor,)), strict=True))
        assert self.rule.alias is not None
        if not tensor.is_meta and not torch.equal(tensor, read(self.rule.alias)):
            raise ValueError(f"{self.theirs} differs from {self.rule.alias}, but the config ties them")
        return {}


def plan(rules: Rules, state: State, expected: State) -> tuple[list[Step], list[str], list[str]]:
    """How ``state`` becomes exactly the names and shapes of ``expected``; either may be on the meta device.

    The steps in order, the names of ours that the checkpoint may lack and does, and a line for every missing, unknown
    and misshapen tensor."""
    steps: list[Step] = []
    wrong: list[str] = []
    made: set[str] = set()
    for name in sorted(state):
        found = _match(rules, name, lambda r: (r.theirs,))
        if found is None:
            wrong.append(f"unknown {name}")
            continue
        rule, stars = found
        if rule.ignored:
            continue
        if rule.alias is not None and rule.ours[0] not in expected:
            if rule.alias in state:
                steps.append(Step(name, rule, ()))
            continue
        ours = tuple(_fill(pattern, stars) for pattern in rule.ours)
        if extra := [n for n in ours if n not in expected]:
            wrong.append(f"unknown {name}" + ("" if extra == [name] else f" (ours would be {', '.join(extra)})"))
            continue
        try:
            parts = rule.split((state[name].to("meta"),))
        except EinopsError:
            wrong.append(f"{name} has shape {tuple(state[name].shape)}, which does not divide into {', '.join(ours)}")
            continue
        for own, tensor in zip(ours, parts, strict=True):
            if tensor.shape != expected[own].shape:
                into = "" if own == name else f"gives {own} shape {tuple(tensor.shape)}, not "
                into = into or f"has shape {tuple(tensor.shape)}, the config says "
                wrong.append(f"{name} {into}{tuple(expected[own].shape)}")
            elif tensor.is_floating_point() != expected[own].is_floating_point():
                wrong.append(f"{name} is {tensor.dtype}, not {expected[own].dtype}")
        made.update(ours)
        steps.append(Step(name, rule, ours))
    lacking = []
    for own in sorted(expected.keys() - made):
        found = _match(rules, own, lambda r: r.ours)
        if found is None:
            wrong.append(f"{own}: the map has no rule for this tensor of ours")
        elif found[0].optional:
            lacking.append(own)
        elif (name := _fill(found[0].theirs, found[1])) not in state:
            wrong.append(f"missing {name}" + ("" if name == own else f" (ours: {own})"))
    return steps, lacking, wrong


def load(rules: Rules, state: State, expected: State) -> dict[str, Tensor]:
    """Our state dict made of theirs, with exactly the names and shapes of ``expected`` (a model's ``state_dict()``,
    which may be on the meta device). Tensors that a checkpoint may lack are taken from ``expected``.

    Raises ``ValueError`` listing every missing, unknown and misshapen tensor.
    """
    steps, lacking, wrong = plan(rules, state, expected)
    raise_all(wrong, "the checkpoint does not fit the model")
    out = {name: expected[name] for name in lacking}
    for step in steps:
        out |= step.apply(state.__getitem__)
    return {name: out[name] for name in expected}


def names(rules: Rules, state: Iterable[str]) -> list[str]:
    """Which of our names the map has a rule for."""
    return [n for n in state if _match(rules, n, lambda r: r.ours)]


def export(rules: Rules, state: State) -> dict[str, Tensor]:
    """Their state dict made of ours; the inverse of ``load`` (what may be lacking is written, aliases are not).

    Raises ``ValueError`` listing every tensor that the map does not know and every incomplete group.
    """
    out: dict[str, Tensor] = {}
    wrong: list[str] = []
    for own in state:
        found = _match(rules, own, lambda r: r.ours)
        if found is None:
            wrong.append(f"unknown {own}")
            continue
        rule, stars = found
        name = _fill(rule.theirs, stars)
        if name in out:
            continue
        ours = [_fill(pattern, stars) for pattern in rule.ours]
        if missing := [n for n in ours if n not in state]:
            wrong.append(f"missing {', '.join(missing)} for {name}")
            continue
        out[name] = rule.join(tuple(state[n] for n in ours))[0]
    raise_all(wrong, "the model does not fit the map")
    copies = {r.theirs: out[r.alias] for r in rules if r.repeated and r.alias in out and r.theirs not in out}
    return out | {name: tensor.clone() for name, tensor in copies.items()}


def _match(rules: Rules, name: str, side: Callable[[Rule], Iterable[str]]) -> tuple[Rule, tuple[str, ...]] | None:
    for rule in rules:
        for pattern in side(rule):
            if found := _regex(pattern).fullmatch(name):
                return rule, found.groups()
    return None


@cache
def _regex(pattern: str) -> re.Pattern:
    """``*``: one part of a dotted name; ``**``: one or more."""
    pieces = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"*": r"([^.]+)", "**": "(.+)"}.get(p) or re.escape(p) for p in pieces))


def _fill(pattern: str, stars: Iterable[str]) -> str:
    values = iter(stars)
    return re.sub(r"\*\*|\*", lambda _: next(values), pattern)


def raise_all(wrong: list[str], what: str) -> None:
    """Raises ``ValueError`` with the first twenty lines of what is wrong, if anything is."""
    if wrong:
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{what}:\n  " + "\n  ".join(wrong[:20]) + more)


def count(state: Iterable[str], pattern: str) -> int:
    """How many different values the star of a pattern has among the names (``layers.*``: the number of layers)."""
    start = pattern.partition("*")[0]
    return len({name[len(start) :].partition(".")[0] for name in state if name.startswith(start)})


def side(state: State, name: str) -> int | None:
    """The side of a square position table (rows, width), or None where the checkpoint lacks it. Raises ``ValueError``
    for a table whose rows are not a square."""
    if name not in state:
        return None
    rows = len(state[name])
    if isqrt(rows) ** 2 != rows:
        raise ValueError(f"{name} has {rows} rows, which is not a square table")
    return isqrt(rows)
