"""Benchmarks of grounds, sizes, scenes and conversations: the truth passes, everything else fails, items are apart."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from diptych.data.worlds import shapes
from diptych.data.worlds.grounds import Ground
from diptych.data.worlds.shapes_sources import Edit
from diptych.evaluation.benchmarks.canvases import BENCHMARKS, READ
from diptych.evaluation.scores import Outcome


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_truth_passes_and_nothing_else(name):
    benchmark = BENCHMARKS[name]
    items = benchmark.items(0, 64)
    assert len({i.id for i in items}) == len(items)
    assert [i.sample for i in items[:5]] == [i.sample for i in benchmark.items(0, 64)[:5]]
    some, right, wrong = items[:: max(1, len(items) // 50)], 0, 0
    for item in some:
        reference = item.reference
        if benchmark.task == "answer":
            made, other = f" {reference['answer'].capitalize()}.", f"{reference['answer']} x"
        else:
            ground, rng = Ground.from_json(reference["ground"]), np.random.default_rng(0)
            scene = (
                Edit.from_json(reference).after if "after" in reference else shapes.Scene.from_json(reference["scene"])
            )
            made = shapes.render_on(rng, ground, scene, tuple(reference.get("size", (64, 64))))
            other = PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
        right += benchmark.judge([item], [made])[0].ok
        wrong += benchmark.judge([item], [other])[0].ok
    assert right == len(some) and wrong == 0, (right, wrong, len(some))
    scores = (
        benchmark.scores([Outcome(i, benchmark.judge([i], ["?"])[0]) for i in items])
        if benchmark.task == "answer"
        else {}
    )
    for key, row in benchmark.baselines(some, 64).items():
        assert not scores or key in scores
        assert row.get("white", 0.0) == 0.0 or key.endswith(("/white", "/overall")), "white paper passes as a ground"
        assert row.get("truth", 1.0) >= 0.99 and row.get("copy", 0.0) == 0.0 and 0 <= row.get("majority", 0.0) < 0.9


def test_sizes_and_turns_ask_the_same_questions():
    read = BENCHMARKS["canvas-read"].items(0, 64)
    by_size = {side: [i for i in read if i.category == f"{side} px"] for side in READ}
    assert len({tuple(i.prompt for i in items) for items in by_size.values()}) == 1
    assert all(next(i.sample.images()).pixels.size == (side, side) for side, items in by_size.items() for i in items)
    talk = BENCHMARKS["talk-mini"].items(0, 64)
    for several, alone in zip(talk[::2], talk[1::2], strict=True):
        assert alone.category == "single" and alone.prompt == several.prompt
        assert len(several.sample.messages) >= 3 and len(alone.sample.messages) == 1
        assert list(several.sample.images())[-1].pixels == next(alone.sample.images()).pixels
