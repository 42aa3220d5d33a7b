"""Looking at the gate while pictures are drawn, and what studies measure of drawing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych import cli
from diptych.analysis.gates import Gates, gates
from diptych.generation.engine import Engine
from diptych.models import store
from diptych.studies.drawing import drawing
from tests.support import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.shake(tiny.model("cheers")).requires_grad_(False)


def test_the_gate_is_seen_at_every_step_and_place(model):
    found = gates(model, ["a star", "two circles"], steps=3)
    assert found.values.shape == (2, 3, 4, 4) and found.pictures.shape == (2, 3, 32, 32)
    assert found.times[0] == 1 and list(found.times) == sorted(found.times, reverse=True)
    assert not np.allclose(found.values[0], found.values[1]) and not np.allclose(found.values[:, 0], found.values[:, 2])
    with torch.no_grad():
        model.gate.gate[2].bias += 100.0
    moved = gates(model, ["a star"], steps=1)
    with torch.no_grad():
        model.gate.gate[2].bias -= 100.0
    assert (moved.values > 50).all() and np.allclose(moved.activity, moved.values.mean((-2, -1)))
    rows = found.to_json()
    assert [r["t"] for r in rows] == [round(t, 6) for t in found.times] and all(0 < r["share"] <= 1 for r in rows)


def test_contours_and_shares_on_a_picture_whose_edges_are_known():
    picture = torch.zeros(1, 3, 32, 32)
    picture[..., 16:] = 1.0  # one edge, in the middle columns
    values = np.zeros((1, 2, 4, 4))
    values[0, 0, :, 1:3] = -2.0
    values[0, 1, :, 0] = 1.0
    values[0, 1, :, 3] = 1.0
    found = Gates(values, (1.0, 0.5), picture)
    assert found.contours[0] == pytest.approx([1.0, -1.0]) and found.activity[0] == pytest.approx([1.0, 0.5])
    assert found.sparsity[0] == pytest.approx([0.5, 0.5])


def test_models_without_a_gate_are_told(model):
    with pytest.raises(ValueError, match="family 'bagel' has no gate to look at"):
        gates(tiny.model("bagel"), ["x"])
    ungated = store.create("cheers", replace(tiny.cheers(), detail="added"))
    ungated.initialise(0)
    with pytest.raises(ValueError, match="does not ask its gate"):
        gates(ungated, ["x"], steps=1)


def test_the_command(model, tmp_path, capsys):
    store.save(model, tmp_path / "m")
    words = [
        "analyze",
        "gates",
        str(tmp_path / "m"),
        "--prompt",
        "a star",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(next(iter(told["models"].values()))) == 2
    assert (tmp_path / "a" / "gates.png").stat().st_size > 5000


def test_what_a_study_measures(model):
    told = drawing(Engine(model), n=6)
    assert told["tokens"] == 4 and told["seconds"] > 0 and told["image loss"] > 0
    assert told == pytest.approx(drawing(Engine(model), n=6) | {"seconds": told["seconds"]})
    merged = store.create("cheers", replace(tiny.cheers(), merge=1))
    merged.initialise(0)
    assert drawing(Engine(merged.eval()), n=2)["tokens"] == 16
