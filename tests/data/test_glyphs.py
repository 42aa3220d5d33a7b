"""The digits' world and its benchmarks: pictures say what their answers say, and judges want the whole of it."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from diptych.data.worlds import embedded, glyphs
from diptych.evaluation.benchmarks.glyphs import BENCHMARKS


def test_numbers_of_the_test_are_never_trained_on():
    train, test = glyphs.numbers("train"), glyphs.numbers("test")
    assert not set(train) & set(test) and sorted(train + test) == [f"{n:02d}" for n in range(100)]
    said = {embedded.source("glyphs/number", "train")[i].info["answer"] for i in range(300)}
    assert said <= set(train) and len(said) > 70


def test_a_number_is_printed_where_it_can_be_read_at_full_size():
    for i in range(20):
        image, number, _ = glyphs.page(np.random.default_rng(i), "train", 64)
        dark = np.asarray(image).max(2) < 60
        rows, columns = np.where(dark.any(1))[0], np.where(dark.any(0))[0]
        ink = dark[rows[0] :: 2, columns[0] :: 2][:5, :7]
        assert np.array_equal(ink, glyphs._mask(number)), number


def test_drawings_are_read_back_and_noise_is_noise():
    clean, noisy = (embedded.source(name, "train", 32) for name in ("glyphs/draw", "glyphs/draw/noisy"))
    wrong = 0
    for i in range(200):
        sample = clean[i]
        image = next(sample.images()).pixels
        assert glyphs.read_back(image) == (sample.info["answer"], 0.0)
        said, off = glyphs.read_back(next(noisy[i].images()).pixels)
        wrong += said != noisy[i].info["answer"]
        assert off > 0
    assert 0.08 < wrong / 200 < 0.25  # some wrong labels are right by chance


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_accept_the_truth_and_nothing_else(name):
    benchmark = BENCHMARKS[name]
    items = benchmark.items(0, 32)
    assert len({i.id for i in items}) == len(items) and benchmark.baselines(items, 32)
    for item in items[:: max(1, len(items) // 40)]:
        answer = item.reference["answer"]

        def verdict(made, item=item) -> bool:
            return benchmark.judge([item], [made])[0].ok

        if benchmark.task == "draw":
            digit, _, ground = answer.partition(" on ")
            right = PIL.Image.fromarray(glyphs.render(int(digit), ground, 2, 4, 32))
            other = PIL.Image.fromarray(glyphs.render((int(digit) + 1) % 10, ground, 2, 4, 32))
            assert verdict(right) and not verdict(other)
            continue
        assert verdict(f" {answer}. ") and not verdict(f"{answer} x")
        if item.category == "digit":
            place = item.reference["digit"]
            half = answer[0] + "?" if place == 0 else "?" + answer[1]
            assert verdict(half) and not verdict(half[::-1])


def test_facts_are_the_same_for_ever():
    assert len(dict(glyphs.facts())) == glyphs.FACTS
    sample = embedded.source("words/fact")[5]
    assert dict(glyphs.facts())[sample.messages[0].parts[0].text] == sample.info["answer"]
