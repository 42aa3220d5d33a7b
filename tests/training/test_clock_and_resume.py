"""Runs by the clock, resuming with changes and with more data, and stages that learn nothing."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from diptych.recipes import run as runs
from diptych.training import loop
from diptych.training.clock import Clock
from diptych.training.recipe import Recipe, Schedule
from tests.support import tiny
from tests.training.test_loop import metrics, train


def test_a_stage_follows_its_share_of_the_clock():
    stage = tiny.recipe(steps=30).stages[0]
    recipe = replace(tiny.recipe(), minutes=1.0, stages=(stage, replace(stage, name="b", steps=10)))
    clock = Clock(recipe, 100.0)
    for seconds, first, second in ((0, 0, 0), (22.5, 15, 0), (45, 30, 0), (52.5, 30, 5), (99, 30, 10)):
        clock.now = seconds
        assert clock.position(0, 3) == pytest.approx(first) and clock.position(1, 3) == pytest.approx(second)
    clock.now = 40.0
    assert not clock.over(0, 3)
    clock.recent.append(6.0)  # another step of six seconds does not fit into 45
    assert clock.over(0, 3) and not clock.over(0, 0)
    assert Clock(tiny.recipe()).position(0, 3) == 3.0


def test_minutes_end_a_run_schedule_and_all(tmp_run, monkeypatch):
    monkeypatch.setattr(loop.Work, "logged", lambda *_: {})  # counting products takes seconds, once in a run
    recipe = tiny.recipe(steps=10**6, checkpoint_every=10**6, schedule=Schedule(decay=1.0), minutes=0.15)
    began = time.monotonic()
    rows = train(recipe, tmp_run)
    assert time.monotonic() - began < 30 and 2 < len(rows) < 10**4
    rates = [row["lr"] for row in rows]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.5 * rates[0]
    assert Recipe.load(tmp_run / "recipe.json").minutes == 0.15 and (tmp_run / "release").is_dir()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of four of six steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(tiny.recipe(steps=4, checkpoint_every=4), run)
    return run


def test_resuming_with_changes(stopped):
    head = "stages.0.train.head"
    release = runs.resume(
        stopped, steps=6, override={head: "5e-4", "checkpoint_every": "2", "workers": "1"}, device="cpu"
    )
    rows, recipe = metrics(stopped), Recipe.load(stopped / "recipe.json")
    assert release == stopped / "release" and [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert recipe.stages[0].train["head"] == 5e-4 and recipe.workers == 1 and recipe.stages[0].steps == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": "1"}, "cannot change 'seed'"),
        ({"stages.0.limits.tokens": "64"}, "cannot change 'stages.0.limits.tokens'"),
        ({"model.size": "[64, 64]"}, "cannot change 'model.size"),
        ({"stages.0.train.vision": "1e-3"}, "not which there are: 'stages.0.train.vision'"),
        ({"stages.0.steps": "2"}, "cannot have 2 steps: 4 are done"),
        ({"workes": "1"}, "did you mean 'workers'"),
    ],
)
def test_what_may_not_change_is_named(changes, reason):
    recipe = tiny.recipe(steps=6, train={"head": 1e-3})
    with pytest.raises(ValueError, match=reason):
        recipe.resumed_with(changes, 0, 4)


def test_finished_stages_do_not_change():
    stage = tiny.recipe(steps=3).stages[0]
    recipe = replace(tiny.recipe(), stages=(stage, replace(stage, name="b")))
    with pytest.raises(ValueError, match=f"'stages.0.steps': stage {stage.name!r} is finished"):
        recipe.resumed_with({"stages.0.steps": "9"}, 1, 1)
    assert recipe.resumed_with({"stages.1.steps": "9"}, 1, 1).steps == 12


def words(path, count, answer="a star"):
    turns = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": answer}]
    rows = [json.dumps({"messages": turns[:1] if answer is None else turns}) for _ in range(count)]
    (path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (path / "catalog.yaml").write_text("rows: {format: jsonl, path: rows.jsonl}")
    return str(path / "catalog.yaml")


def of_words(catalog, **changes):
    recipe = tiny.recipe(data={"rows": 1.0}, loss={"text": 1.0, "image": 1.0}, dropout={}, **changes)
    return replace(recipe, catalog=catalog)


def test_data_that_have_grown_need_a_word(tmp_path):
    recipe = of_words(words(tmp_path, 5), steps=2)
    train(recipe, tmp_path / "run")
    words(tmp_path, 9)
    with pytest.raises(ValueError, match="'rows' had 5 rows .* has 9 now; .*--grown-data"):
        runs.resume(tmp_path / "run", steps=4, device="cpu")
    runs.resume(tmp_path / "run", steps=4, grown_data=True, device="cpu")
    assert len(metrics(tmp_path / "run")) == 4
    words(tmp_path, 3)
    with pytest.raises(ValueError, match="cannot resume: lengths was"):
        runs.resume(tmp_path / "run", steps=6, grown_data=True, device="cpu")


@pytest.mark.parametrize("answer", [None, ""])
@pytest.mark.parametrize("steps", [3, 40])
def test_a_stage_without_a_target_stops(steps, answer, tmp_path, caplog):
    with pytest.raises(
        ValueError, match=f"learns nothing in {min(steps, 10)} steps: no row carries a loss; .* samples have"
    ):
        train(of_words(words(tmp_path, 20, answer), steps=steps), tmp_path / "run")
    assert not (tmp_path / "run" / "release").exists() and (tmp_path / "run" / "crash.json").is_file()


def test_rows_without_a_target_are_counted(tmp_path, caplog):
    catalog = words(tmp_path, 6, answer=None)
    with (tmp_path / "rows.jsonl").open("a") as file:
        answer = {"role": "assistant", "content": "a star"}
        file.write(json.dumps({"messages": [{"role": "user", "content": "what?"}, answer]}) + "\n")
    rows = train(of_words(catalog, steps=3), tmp_path / "run")
    lost = sum(row["untargeted"] for row in rows)
    assert (
        lost > 0
        and f"{lost:.0f} of {sum(row['samples/rows'] for row in rows):.0f} samples have no target" in caplog.text
    )


def test_all_processes_get_one_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "gather", lambda value: ["runs/of-rank-0", value])
    assert loop.agreed_folder(None, tiny.recipe()).name == "of-rank-0"
    assert loop.agreed_folder("mine", tiny.recipe()).name == "mine"
