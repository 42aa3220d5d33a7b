"""Stopped at any moment, by anything, a run goes on as if it had not been: the same losses to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from diptych import cli
from diptych.recipes.run import stage_sources
from diptych.training import checkpoint, loop
from tests.support import tiny
from tests.support.loading import make_loader
from tests.training.test_loop import losses, metrics, train

LONG = 24  # steps of the runs that are killed


class Crash(Exception):
    pass


def crash_at(step):
    def hook(model, at, run):
        if at == step:
            raise Crash

    return hook


def weights(run):
    return (run / "release" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_ten_steps_are_five_a_crash_and_five(workers, optimizer, tmp_path):
    base = tiny.recipe(workers=workers)
    stage = base.stages[0]
    recipe = replace(
        base, stages=(replace(stage, optimizer=replace(stage.optimizer, name=optimizer, weight_decay=0.01)),)
    )
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Crash):
        train(recipe, tmp_path / "cut", hook=crash_at(5))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "stage": "unified", "loss": 1.0}\n{"step": 7, "lo')  # what a crash may leave behind
    assert losses(train(recipe, tmp_path / "cut", resume=True)) == losses(whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def stages():
    first = tiny.recipe(steps=4).stages[0]
    return replace(
        tiny.recipe(checkpoint_every=3),
        stages=(
            replace(first, name="heads", train={"head": 1e-3, "projector": 1e-3}, data={"shapes/draw": 1.0}),
            replace(first, name="all", steps=5, ema=None),
            replace(first, name="polish", steps=2, train={"decoder.image": 1e-4}),
        ),
    )


@pytest.mark.parametrize("at", [3, 4, 6, 9, 11])
def test_stages_resume_inside_and_at_their_ends(at, tmp_path, whole_stages):
    recipe, run = stages(), tmp_path / "cut"
    with pytest.raises(Crash):
        train(recipe, run, hook=crash_at(at))
    rows = train(recipe, run, resume=True)
    assert losses(rows) == losses(metrics(whole_stages)) and weights(run) == weights(whole_stages)


@pytest.fixture(scope="module")
def whole_stages(tmp_path_factory):
    run = tmp_path_factory.mktemp("stages") / "run"
    rows = train(stages(), run)
    assert [r["stage"] for r in rows] == ["heads"] * 4 + ["all"] * 5 + ["polish"] * 2
    return run


def test_a_run_without_a_checkpoint_resumes_from_the_start(tmp_path):
    recipe = tiny.recipe(steps=2)
    loop._prepare(tmp_path / "run", recipe, False)
    assert losses(train(recipe, tmp_path / "run", resume=True)) == losses(train(recipe, tmp_path / "whole"))


def test_a_finished_run_resumes_to_the_same_release(tmp_run):
    recipe = tiny.recipe(steps=2)
    rows = train(recipe, tmp_run)
    before = weights(tmp_run)
    assert losses(train(recipe, tmp_run, resume=True)) == losses(rows) and weights(tmp_run) == before


def test_asked_to_stop_it_saves_and_says_how_to_go_on(tmp_path):
    import threading

    recipe, run, stop = tiny.recipe(steps=6), tmp_path / "cut", threading.Event()
    stop.set()
    with pytest.raises(loop.Interrupted, match=f"stopped after step 1; go on with: diptych resume {run}") as error:
        train(recipe, run, stop=stop)
    assert error.value.path == run / "checkpoints" / "step-00000001" and (run / "release").is_dir()
    assert losses(train(recipe, run, resume=True)) == losses(train(recipe, tmp_path / "whole"))


def test_other_data_or_budgets_do_not_resume(tmp_run):
    recipe = tiny.recipe(steps=4, checkpoint_every=2)
    with pytest.raises(Crash):
        train(recipe, tmp_run, hook=crash_at(2))
    changed = recipe.override({"stages.0.limits.tokens": "128"})
    with pytest.raises(ValueError, match="cannot resume: tokens was 192 when the state was saved and is 128 now"):
        train(changed, tmp_run, resume=True)


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(tmp_path, capsys):
    recipe, run = tiny.recipe(steps=6, checkpoint_every=2, keep=3), tmp_path / "cut"
    whole = train(recipe, run)
    released = weights(run)
    first, second, last = checkpoint.available(run / "checkpoints")
    assert checkpoint.newest(run / "checkpoints") == (last, [])
    file = max((last / "state").iterdir(), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    file.write_bytes(data)
    file = max((second / "state").iterdir(), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])  # a write that was cut off
    rows = loop.train(recipe, run, stage_sources, resume=True, show=True) and metrics(run)
    told = " ".join(capsys.readouterr().err.split())
    for bad in (last, second):
        assert f"{bad.name} is damaged" in told
    assert "is not what was written; going on from" in told and first.name in told
    assert losses(rows) == losses(whole) and weights(run) == released
    assert [p.name[-1] for p in checkpoint.available(run / "checkpoints")] == ["2", "4", "6"]
    for path in checkpoint.available(run / "checkpoints"):
        (path / "state" / ".metadata").unlink()
    with pytest.raises(
        ValueError, match="no checkpoint can be used; checkpoint .*step-00000006 is damaged: state/.metada"
    ):
        train(recipe, run, resume=True)


def test_what_is_damaged_takes_no_place_among_the_kept(tmp_path):
    """The run went on before it: the new checkpoint stays, the damaged one goes."""
    for step in (2, 4, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "meta.json").write_text("{" if step == 9 else "{}")
    saver = checkpoint.Saver(tmp_path, keep=2, behind=False)
    saver.save(6, {"x": torch.ones(2)}, {})
    saver.close()
    assert [p.name[-1] for p in checkpoint.available(tmp_path)] == ["4", "6"]


@pytest.mark.parametrize("harm", [lambda t: t.replace('"done": 4', '"done": 3'), lambda t: "[]", lambda t: "\udcff"])
def test_a_damaged_account_of_a_checkpoint_is_noticed(harm, tmp_run):
    """The loader's place and the step are under a checksum like the weights."""
    train(tiny.recipe(steps=4, checkpoint_every=2), tmp_run)
    first, last = checkpoint.available(tmp_run / "checkpoints")
    file = last / "meta.json"
    file.write_bytes(harm(file.read_text()).encode(errors="surrogateescape"))
    found, [told] = checkpoint.newest(tmp_run / "checkpoints")
    assert found == first and f"{last} is damaged: " in told


def test_a_crash_says_what_and_where_and_how_to_go_on(tmp_run, monkeypatch):
    recipe = tiny.recipe(steps=6, checkpoint_every=2)
    real = tiny.bagel_family.Bagel.forward

    def breaks(self, batch, noise, *objective):
        losses = real(self, batch, noise, *objective)
        if noise.step < 4:
            return losses
        return losses | {"text": losses["text"]._replace(sum=losses["text"].sum * float("nan"))}

    monkeypatch.setattr(tiny.bagel_family.Bagel, "forward", breaks)
    with pytest.raises(
        FloatingPointError, match="step 5: the loss is nan; nothing was updated. Samples of the row: shapes/"
    ):
        train(recipe, tmp_run)
    told = json.loads((tmp_run / "crash.json").read_text())
    assert told["step"] == 5 and told["last_checkpoint"].endswith("step-00000004") and "nan" in told["error"]
    assert (
        told["samples"] and told["traceback"].startswith("Traceback") and told["go_on"] == f"diptych resume {tmp_run}"
    )


def test_damaged_checkpoints_are_passed_over_or_named(tmp_run):
    train(tiny.recipe(steps=4, checkpoint_every=2), tmp_run)
    first, last = checkpoint.available(tmp_run / "checkpoints")
    (last / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint .*step-00000004 is damaged"):
        checkpoint.read_meta(last)
    (last / "meta.json").unlink()  # never finished
    assert checkpoint.available(tmp_run / "checkpoints") == [first]
    assert checkpoint.available(tmp_run / "nowhere") == []


# ---- real signals to a real process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("signals") / "run"
    train(tiny.recipe(steps=LONG), run)
    return run


def start(tmp_path, recipe):
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    command = [
        sys.executable,
        "-m",
        "diptych",
        "train",
        tmp_path / "recipe.json",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def until(process, happened, seconds=90):
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.01)


def steps_done(run):
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def saving(run):
    folder = run / "checkpoints"
    return folder.is_dir() and any(name.endswith(".tmp") for name in os.listdir(folder))


def resumed_like(run, uninterrupted):
    assert cli.main(["resume", str(run), "--device", "cpu"]) == 0
    assert losses(metrics(run)) == losses(metrics(uninterrupted))
    assert weights(run) == weights(uninterrupted)


def test_killed_during_a_step(tmp_path, uninterrupted):
    process, run = start(tmp_path, tiny.recipe(steps=LONG, checkpoint_every=4)), tmp_path / "run"
    until(process, lambda: steps_done(run) >= 6)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and 6 <= steps_done(run) < LONG
    resumed_like(run, uninterrupted)


def test_killed_while_saving(tmp_path, uninterrupted):
    process, run = start(tmp_path, tiny.recipe(steps=LONG, checkpoint_every=3)), tmp_path / "run"
    until(process, lambda: saving(run) and checkpoint.available(run / "checkpoints"))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed_like(run, uninterrupted)
    assert not saving(run)  # what the killed process left half written is gone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # to the trainer alone, or (Ctrl-C, scancel) to its workers too
def test_asked_by_a_signal(send, number, tmp_path, uninterrupted):
    process, run = start(tmp_path, tiny.recipe(steps=LONG, checkpoint_every=100, workers=1)), tmp_path / "run"
    until(process, lambda: steps_done(run) >= 3)
    send(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED == 4
    done = steps_done(run)
    assert 3 <= done < LONG and f"stopped after step {done}; go on with: diptych resume {run}" in told
    assert [p.name for p in checkpoint.available(run / "checkpoints")] == [f"step-{done:08d}"]
    resumed_like(run, uninterrupted)


def test_loading_in_a_worker_never_touches_the_global_random_state():
    recipe = tiny.recipe()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    stage = recipe.stages[0]
    rows = make_loader(
        stage_sources(recipe, stage), stage.data, tiny.model("bagel").lay_out, tokens=128, pictures=8, routes=2
    )
    torch.manual_seed(3)
    next(iter(rows))
    assert torch.equal(torch.get_rng_state(), state)
