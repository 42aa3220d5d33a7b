"""Key maps between published checkpoints and diptych's models: pure data, used in both directions, strict in both.

A key map is a tuple of ``Rule``: a pattern of *published* tensor names and the pattern (or patterns) of *native* names,
which are those of ``model.state_dict()``. In a pattern ``*`` matches one component of a dotted name and ``**`` one or
more; the n-th star of one side equals the n-th star of the other. Maps are joined with ``+``::

    native = load(BAGEL + FLUX_AUTOENCODER, published, model.state_dict())
    published = export(BAGEL, model.state_dict())

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
    """One published tensor and the native tensors that it becomes.

    ``split``     turns the published tensor into the native ones
    ``join``      turns the native tensors into the published one
    ``optional``  a checkpoint may lack the tensor, since the model computes it
    ``alias``     another published tensor that this one repeats where the model ties the two (a language head). Loading
                  compares the two and drops this one
    ``repeated``  exporting writes the alias again
    ``ignored``   loading drops the tensor (old rotary tables)
    """

    published: str
    native: tuple[str, ...]
    split: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    join: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    optional: bool = False
    alias: str | None = None
    ignored: bool = False
    repeated: bool = False


Rules = tuple[Rule, ...]


def rules(names: Mapping[str, str], **options: Any) -> Rules:
    """One rule for each pair {published pattern: native pattern}; ``options`` are fields of ``Rule``."""
    return tuple(Rule(published, (native,), **options) for published, native in names.items())


def prefixed(rules: Rules, published: str = "", native: str = "") -> Rules:
    """The same rules with a prefix before the published names and one before the native names."""
    return tuple(
        replace(
            r,
            published=published + r.published,
            native=tuple(native + name for name in r.native),
            alias=None if r.alias is None else published + r.alias,
        )
        for r in rules
    )


@dataclass(frozen=True)
class Conversion:
    """One published tensor and the native names that it becomes (none: it only repeats ``rule.alias``)."""

    published: str
    rule: Rule
    native: tuple[str, ...]

    def apply(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The native tensors by name; ``read`` returns a published tensor. Raises ``ValueError`` where a tensor
        differs from the alias that it must repeat."""
        tensor = read(self.published)
        if self.native:
            return dict(zip(self.native, self.rule.split((tensor,)), strict=True))
        assert self.rule.alias is not None
        if not tensor.is_meta and not torch.equal(tensor, read(self.rule.alias)):
            raise ValueError(f"{self.published} differs from {self.rule.alias}, but the config ties them")
        return {}


def conversions(rules: Rules, state: State, expected: State) -> tuple[list[Conversion], list[str], list[str]]:
    """How the published ``state`` becomes exactly the names and shapes of the native state ``expected``; either may be
    on the meta device.

    Returns the conversions in order, the optional native names that the checkpoint lacks, and one line for every
    missing, unknown and misshapen tensor."""
    steps: list[Conversion] = []
    errors: list[str] = []
    converted: set[str] = set()
    for name in sorted(state):
        match = _match(rules, name, lambda r: (r.published,))
        if match is None:
            errors.append(f"unknown {name}")
            continue
        rule, stars = match
        if rule.ignored:
            continue
        if rule.alias is not None and rule.native[0] not in expected:
            if rule.alias in state:
                steps.append(Conversion(name, rule, ()))
            continue
        native = tuple(_fill(pattern, stars) for pattern in rule.native)
        if extra := [n for n in native if n not in expected]:
            errors.append(f"unknown {name}" + ("" if extra == [name] else f" (ours would be {', '.join(extra)})"))
            continue
        try:
            tensors = rule.split((state[name].to("meta"),))
        except EinopsError:
            shape = tuple(state[name].shape)
            errors.append(f"{name} has shape {shape}, which does not divide into {', '.join(native)}")
            continue
        errors += [e for n, t in zip(native, tensors, strict=True) if (e := _mismatch(name, n, t, expected[n]))]
        converted.update(native)
        steps.append(Conversion(name, rule, native))
    absent = []
    for key in sorted(expected.keys() - converted):
        match = _match(rules, key, lambda r: r.native)
        if match is None:
            errors.append(f"{key}: the map has no rule for this tensor of ours")
        elif match[0].optional:
            absent.append(key)
        elif (name := _fill(match[0].published, match[1])) not in state:
            errors.append(f"missing {name}" + ("" if name == key else f" (ours: {key})"))
    return steps, absent, errors


def _mismatch(published: str, native: str, tensor: Tensor, expected: Tensor) -> str:
    """The error of a converted tensor whose shape or kind of number is not the expected one; "" where both fit."""
    if tensor.shape != expected.shape:
        into = "" if native == published else f"gives {native} shape {tuple(tensor.shape)}, not "
        return f"{published} {into or f'has shape {tuple(tensor.shape)}, the config says '}{tuple(expected.shape)}"
    if tensor.is_floating_point() != expected.is_floating_point():
        return f"{published} is {tensor.dtype}, not {expected.dtype}"
    return ""


def load(rules: Rules, state: State, expected: State) -> dict[str, Tensor]:
    """The native state dict of a published one, with exactly the names and shapes of ``expected`` (a model's
    ``state_dict()``, which may be on the meta device). Optional tensors that ``state`` lacks are those of ``expected``.

    Raises ``ValueError`` listing every missing, unknown and misshapen tensor.
    """
    steps, absent, errors = conversions(rules, state, expected)
    raise_all(errors, "the checkpoint does not fit the model")
    out = {name: expected[name] for name in absent}
    for step in steps:
        out |= step.apply(state.__getitem__)
    return {name: out[name] for name in expected}


def mapped_names(rules: Rules, state: Iterable[str]) -> list[str]:
    """The native names of ``state`` that the map has a rule for."""
    return [n for n in state if _match(rules, n, lambda r: r.native)]


def native_name(rules: Rules, published: str) -> str | None:
    """The native name of a published tensor that one native tensor equals; None for any other."""
    match = _match(rules, published, lambda r: (r.published,))
    return _fill(match[0].native[0], match[1]) if match and len(match[0].native) == 1 else None


def published_name(rules: Rules, native: str) -> str | None:
    """The published name of a native tensor that one published tensor equals; None for any other."""
    match = _match(rules, native, lambda r: r.native)
    return _fill(match[0].published, match[1]) if match and len(match[0].native) == 1 else None


def export(rules: Rules, state: State) -> dict[str, Tensor]:
    """The published state dict of a native one; the inverse of ``load``. Optional tensors are written, aliases only
    where their rule is ``repeated``.

    Raises ``ValueError`` listing every tensor without a rule and every incomplete group.
    """
    out: dict[str, Tensor] = {}
    errors: list[str] = []
    for key in state:
        match = _match(rules, key, lambda r: r.native)
        if match is None:
            errors.append(f"unknown {key}")
            continue
        rule, stars = match
        name = _fill(rule.published, stars)
        if name in out:
            continue
        native = [_fill(pattern, stars) for pattern in rule.native]
        if missing := [n for n in native if n not in state]:
            errors.append(f"missing {', '.join(missing)} for {name}")
            continue
        out[name] = rule.join(tuple(state[n] for n in native))[0]
    raise_all(errors, "the model does not fit the map")
    repeated = {r.published: out[r.alias] for r in rules if r.repeated and r.alias in out and r.published not in out}
    return out | {name: tensor.clone() for name, tensor in repeated.items()}


def _match(rules: Rules, name: str, side: Callable[[Rule], Iterable[str]]) -> tuple[Rule, tuple[str, ...]] | None:
    """The first rule with a pattern that matches the name, and what its stars match."""
    for rule in rules:
        for pattern in side(rule):
            if match := _regex(pattern).fullmatch(name):
                return rule, match.groups()
    return None


@cache
def _regex(pattern: str) -> re.Pattern:
    """``*`` matches one component of a dotted name, ``**`` one or more."""
    pieces = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"*": r"([^.]+)", "**": "(.+)"}.get(p) or re.escape(p) for p in pieces))


def _fill(pattern: str, stars: Iterable[str]) -> str:
    values = iter(stars)
    return re.sub(r"\*\*|\*", lambda _: next(values), pattern)


def raise_all(errors: list[str], summary: str) -> None:
    """Raises ``ValueError`` with the summary and the first twenty errors, if there are any."""
    if errors:
        more = f"\n  and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise ValueError(f"{summary}:\n  " + "\n  ".join(errors[:20]) + more)


def count_matches(state: Iterable[str], pattern: str) -> int:
    """How many values the star of a pattern takes among the names (``layers.*``: the number of layers)."""
    start = pattern.partition("*")[0]
    return len({name[len(start) :].partition(".")[0] for name in state if name.startswith(start)})


def table_side(state: State, name: str) -> int | None:
    """The side of a square position table of shape (side * side, width), or None where the checkpoint lacks it. Raises
    ``ValueError`` where the number of rows is not a square."""
    if name not in state:
        return None
    rows = len(state[name])
    if isqrt(rows) ** 2 != rows:
        raise ValueError(f"{name} has {rows} rows, which is not a square table")
    return isqrt(rows)
