"""Two processes equal one: with two, each takes every second row, so one process adds up two rows a step."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from diptych.train import checkpoint
from tests import tiny
from tests.test_training import metrics, train
from tests.tolerances import LOSS_CURVE, PARAMETERS

STEPS = 6


def recipe(accumulate):
    limits = tiny.Limits(tokens=192, pictures=16, accumulate=accumulate)
    # a large eps keeps AdamW from blowing up differences of gradients that are nearly zero
    return tiny.recipe(steps=STEPS, limits=limits, checkpoint_every=3, optimizer=tiny.Optimizer("muon", eps=1e-4))


def two(command):
    """Starts the command as ranks 0 and 1 and waits for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    told = [p.communicate(timeout=150) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], told
    return [out for out, _ in told]


def test_two_processes_equal_one_also_after_a_resume(tmp_path):
    one = train(recipe(2), tmp_path / "one")
    (tmp_path / "recipe.json").write_text(recipe(1).to_json())
    run = tmp_path / "two"
    command = [sys.executable, "-m", "diptych"]
    said = two([*command, "train", tmp_path / "recipe.json", "--run", run, "--device", "cpu"])
    assert "done" in said[0] and not said[1]  # only rank 0 speaks
    same(one, metrics(run))
    shutil.rmtree(checkpoint.available(run / "checkpoints")[-1])  # as if killed after the checkpoint in the middle
    two([*command, "resume", run, "--device", "cpu"])
    same(one, metrics(run))
    alone, together = (load_file(tmp_path / n / "release" / "model.safetensors") for n in ("one", "two"))
    assert max(float((alone[n] - together[n]).abs().max()) for n in alone) < PARAMETERS


def same(one, rows):
    assert len(rows) == len(one) == STEPS
    for a, b in zip(one, rows, strict=True):
        for key in ("loss", "loss/text", "loss/image"):
            assert b[key] == pytest.approx(a[key], rel=LOSS_CURVE if a["step"] == 1 else 10 * LOSS_CURVE), (
                a["step"],
                key,
            )
        assert (a["count/text"], a["count/image"]) == (b["count/text"], b["count/image"])
