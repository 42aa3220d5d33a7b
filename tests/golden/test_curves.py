"""Golden curves: twenty training steps of the smallest model of every family.

A refactor leaves them as they are. After a change of behaviour, write them anew:

    pytest tests/golden --write-golden
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.models import configs
from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training.recipe import Schedule
from tests.support import tiny
from tests.support.tolerances import GOLDEN

HERE = Path(__file__).parent
LEARNED = {  # the parts that learn, with their learning rates
    "bagel": {"decoder": 2e-3, "vision": 2e-3, "projector": 2e-3, "head": 2e-3},
    "cheers": {"decoder": 2e-3, "vision": 2e-3, "pixels": 1e-3, "projector": 2e-3, "head": 2e-3},
    "iomm": {"mllm": 2e-3, "adapter": 2e-3, "connector": 2e-3, "dit": 2e-3},
    "omnigen2": {"mllm": 2e-3, "dit": 2e-3},
    "synergen": {"decoder": 2e-3, "special": 2e-3, "vision": 2e-3, "projector": 2e-3, "head": 2e-3},
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_golden_curve(family, tmp_run, request):
    model = configs.config_to_json(family, tiny.FAMILIES[family]())
    schedule = Schedule(warmup=3, decay=0.3)
    recipe = tiny.recipe(name=family, model=model, steps=20, schedule=schedule, train=LEARNED[family])
    loop.train(recipe, tmp_run, stage_sources, show=False)
    rows = [json.loads(line) for line in (tmp_run / "metrics.jsonl").read_text().splitlines()]
    lines = [f"{r['step']:3d} {r['loss']:.6f} {r['loss/text']:.6f} {r['loss/image']:.6f}" for r in rows]
    file = HERE / f"{family}.txt"
    if request.config.getoption("--write-golden"):
        file.write_text("step loss text image\n" + "\n".join(lines) + "\n")
    expected = [[float(x) for x in line.split()] for line in file.read_text().splitlines()[1:]]
    got = [[float(x) for x in line.split()] for line in lines]
    assert len(got) == len(expected) == 20
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=GOLDEN), f"step {b[0]:.0f}"
    assert got[-1][1] < got[0][1]
