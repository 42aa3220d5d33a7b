"""A run that fails ends: alone and in one of two processes under torchrun, whatever fails, with nothing left behind."""

from __future__ import annotations

import json

import pytest

from benchmarks.faults import CODES, fails, small_disk
from diptych.recipes.run import draw_samples
from diptych.training import checkpoint
from tests.support import tiny
from tests.training.test_loop import metrics, train


@pytest.fixture
def place(request, tmp_path):
    """A folder for one run, on a small disk where that is to be filled."""
    if "full disk" not in request.node.callspec.params.values():
        yield tmp_path
        return
    try:
        with small_disk(tmp_path / "disk", "64m") as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("kind", "workers"), list(zip(CODES, (1, 0, 2, 2, 1, 1, 2), strict=True)))
def test_a_run_of_one_process_ends(kind, workers, place):
    told = fails(kind, tiny.recipe(steps=200), place, 1, workers)
    assert not told["wrong"], (told, place.with_suffix(".output").read_text())


@pytest.mark.parametrize(("kind", "workers"), [("RuntimeError", 1), ("killed worker", 1), ("full disk", 1)])
def test_a_run_under_torchrun_ends_when_one_process_fails(kind, workers, place):
    told = fails(kind, tiny.recipe(steps=200), place, 2, workers)
    assert not told["wrong"], (told, place.with_suffix(".output").read_text())


def test_samples_that_cannot_be_drawn_are_a_warning(tmp_run, monkeypatch, caplog):
    def fails_to_draw(*_):
        raise RuntimeError("no memory for pictures")

    monkeypatch.setattr("diptych.recipes.run.Engine.draw", fails_to_draw)
    rows = train(tiny.recipe(steps=2), tmp_run, hook=draw_samples)
    assert len(rows) == 2 and (tmp_run / "release").is_dir()
    assert "step 2: its samples cannot be drawn: RuntimeError: no memory for pictures" in caplog.text


def test_a_failed_save_names_its_cause_and_leaves_nothing(tmp_run, monkeypatch):
    recipe = tiny.recipe(steps=6, checkpoint_every=2)
    real = checkpoint.disk.flush_all

    def full(folder):
        if "step-00000004" in str(folder):
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoint.disk, "flush_all", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(recipe, tmp_run)
    assert [p.name for p in (tmp_run / "checkpoints").iterdir()] == ["step-00000002"]
    crash = json.loads((tmp_run / "crash.json").read_text())
    assert "No space left" in crash["error"] and crash["last_checkpoint"].endswith("step-00000002")
    assert len(metrics(tmp_run)) <= 6
