"""Which sample comes n-th: weights, epochs, resuming."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.sample import Sample, assistant
from diptych.data.mixture import Mixture, permuted, uniform


@dataclass(frozen=True)
class Rows:
    """``length`` rows of one word."""

    name: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.name}-{index}", (assistant(str(index)),))


def draws(mixture: Mixture, n: int) -> list[tuple[str, int]]:
    return [(d.source, d.index) for d in (mixture.draw() for _ in range(n))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**40))
def test_permuted_is_a_bijection(length, seed):
    assert sorted(permuted(i, length, seed) for i in range(length)) == list(range(length))


def test_permuted_mixes_well():
    first = Counter(permuted(0, 10, seed) for seed in range(4000))
    assert len(first) == 10 and max(abs(n - 400) for n in first.values()) < 100
    neighbours = [permuted(i + 1, 1000, 3) - permuted(i, 1000, 3) for i in range(999)]
    assert Counter(neighbours).most_common(1)[0][1] < 12


@pytest.mark.parametrize("place", [-1, 5])
def test_permuted_outside(place):
    with pytest.raises(ValueError, match=f"place {place} is outside a permutation of 5"):
        permuted(place, 5, 0)


def test_uniform_is_uniform():
    values = [uniform("seed", i) for i in range(4000)]
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / 4000 - 0.5) < 0.02 and abs(sum(v < 0.25 for v in values) / 4000 - 0.25) < 0.03


@pytest.mark.parametrize("streams", [1, 4])
def test_every_row_once_per_epoch(streams):
    """The streams together visit each row of a finite set once per epoch, in another order each epoch."""
    sources = {"a": Rows("a", 28), "b": Rows("b", 2**40)}
    mixtures = [Mixture(sources, {"a": 1.0}, 7, s, streams) for s in range(streams)]
    epochs = [[m.draw().index for _ in range(28 // streams) for m in mixtures] for _ in range(3)]
    assert all(sorted(e) == list(range(28)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_weights_are_of_samples():
    sources = {n: Rows(n, 50 if n == "a" else 2**40) for n in "abc"}
    seen = Counter(name for name, _ in draws(Mixture(sources, {"a": 6, "b": 3, "c": 1}, 0), 5000))
    for name, share in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
        assert abs(seen[name] / 5000 - share) < 0.02


def test_draws_depend_on_seed_and_stream_only():
    sources = {n: Rows(n, 100) for n in "ab"}
    one = draws(Mixture(sources, {"a": 1, "b": 2}, 0), 50)
    assert one == draws(Mixture(dict(reversed(sources.items())), {"b": 2.0, "a": 1.0}, 0), 50)
    assert one != draws(Mixture(sources, {"a": 1, "b": 2}, 1), 50)
    assert one != draws(Mixture(sources, {"a": 1, "b": 2}, 0, 1, 2), 50)


def test_an_endless_world_does_not_repeat():
    mixture = Mixture({"a": Rows("a", 2**40)}, {"a": 1}, 0)
    assert len({mixture.draw().index for _ in range(2000)}) == 2000


@pytest.mark.parametrize("at", [0, 1, 17, 60])
def test_state_continues_exactly(at):
    sources, weights = {"a": Rows("a", 20), "b": Rows("b", 2**40)}, {"a": 2, "b": 1}
    mixture = Mixture(sources, weights, 5)
    draws(mixture, at)
    state = json.loads(json.dumps(mixture.state_dict()))
    again = Mixture(sources, weights, 5)
    again.load_state_dict(state)
    assert draws(again, 40) == draws(mixture, 40)


def test_a_state_of_other_data_sets_is_refused():
    sources = {"a": Rows("a", 20), "b": Rows("b", 20)}
    with pytest.raises(ValueError, match=r"saved state mixes \['a'\], this mixture \['a', 'b'\]"):
        Mixture(sources, {"a": 1, "b": 1}, 0).load_state_dict(Mixture(sources, {"a": 1}, 0).state_dict())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "at least one weight; data sets: a, empty"),
        ({"x": 1}, r"unknown data sets \['x'\]; choose from a, empty"),
        ({"a": 0}, "weight of data set 'a' is 0"),
        ({"a": -1}, "must be positive and finite"),
        ({"a": float("nan")}, "weight of data set 'a' is nan"),
        ({"a": float("inf")}, "is inf"),
        ({"empty": 1}, "data set 'empty' is empty"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": Rows("a", 3), "empty": Rows("empty", 0)}, weights, 0)


def test_wrong_stream():
    with pytest.raises(ValueError, match=r"stream 2 is outside 0\.\.1"):
        Mixture({"a": Rows("a", 3)}, {"a": 1}, 0, 2, 2)
