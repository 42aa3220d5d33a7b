"""Several processes equal one, sharded or not: each takes every n-th row, so one process adds up n rows a step.

Slow and few: every test starts processes. ``benchmarks/equal.py`` runs the same comparison over 20 steps and four
processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diptych.core.batch import pack
from diptych.core.losses import add_counts, combine
from diptych.core.noise import Noise
from diptych.machine import processes as processes_
from diptych.models import configs
from diptych.training import checkpoint, parallel
from diptych.training.parameters import freeze
from diptych.training.recipe import EngineConfig, Limits
from tests.support import tiny
from tests.support.tolerances import LOSS_CURVE, PARAMETERS
from tests.training.test_loop import metrics, train

STEPS = 6


def recipe(family, **changes):
    """Everything that the family may train, on two rows a step however many processes share them."""
    made = tiny.model(family)
    terms = made.counts(pack([made.lay_out(s) for s in (tiny.ask(), tiny.draw())], made.routes))
    # a large eps keeps AdamW from blowing up differences of gradients that are nearly zero
    base = {"steps": STEPS, "checkpoint_every": 3, "optimizer": tiny.Optimizer("muon", eps=1e-4)}
    return tiny.recipe(
        model=configs.config_to_json(family, tiny.FAMILIES[family]()),
        train={part: 2e-3 for part in made.parts if part not in made.frozen},
        loss=dict.fromkeys(terms, 1.0),
        dropout={"text": 0.1} if "text" in made.conditions else {},
        **{"limits": Limits(tokens=192, pictures=16, rows=2)} | base | changes,
    )


def processes(n, command, local=None, codes=None):
    """Starts the command as n ranks and waits for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env["LOCAL_WORLD_SIZE"] = str(local or n)
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(n)
    ]
    told = [p.communicate(timeout=240) for p in ranks]
    assert [p.returncode for p in ranks] == (codes or [0] * n), "\n".join(err for _, err in told)
    return told


def run_with(n, made, folder, verb="train", **how):
    """The recipe on n processes; returns what they said."""
    folder.parent.mkdir(exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(made.to_json())
    what = [verb, file, "--out", folder] if verb == "train" else [verb, folder]
    return processes(n, [sys.executable, "-m", "diptych", *map(str, what), "--device", "cpu"], **how)


def same(one, rows):
    assert len(rows) == len(one) == STEPS
    for a, b in zip(one, rows, strict=True):
        for key in [k for k in a if k.startswith(("loss", "data/"))]:
            tolerance = LOSS_CURVE if a["step"] == 1 else 10 * LOSS_CURVE
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=1e-6), (a["step"], key)
        assert {k: v for k, v in a.items() if k.startswith(("count", "samples"))}.items() <= b.items()
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)


def same_weights(a, b):
    alone, together = (load_file(run / "release" / "model.safetensors") for run in (a, b))
    assert alone.keys() == together.keys()
    assert max(float((alone[n] - together[n]).abs().max()) for n in alone) < PARAMETERS


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def one(family, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    train(recipe(family), run)
    return run


@pytest.fixture(scope="module")
def two(family, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    (out, _), (quiet, _) = run_with(2, recipe(family), run)
    assert "done" in out and not quiet  # only rank 0 speaks
    return run


def test_two_processes_equal_one(one, two):
    same(metrics(one), metrics(two))
    same_weights(one, two)


def test_sharded_processes_equal_one_and_resume_on_another_number(family, one, tmp_path):
    """Two processes share the model; killed, one goes on alone with the rows of both."""
    made, run = replace(recipe(family), engine=EngineConfig(shard="full", recompute="selective")), tmp_path / "shards"
    run_with(2, made, run)
    same(metrics(one), metrics(run))
    same_weights(one, run)
    shutil.rmtree(checkpoint.available(run / "checkpoints")[-1])
    same(metrics(one), train(made, run, resume=True))  # two processes' shards, read by one
    same_weights(one, run)


def test_one_of_two_processes_killed_twice_ends_bit_identical(family, two, tmp_path):
    """``benchmarks/faults.py`` does it ten times."""
    from benchmarks.faults import same as same_run
    from benchmarks.faults import survive

    if family != "bagel":
        pytest.skip("saving and resuming know no family")
    killed = survive(recipe(family), tmp_path, kills=2, processes=2, seed=1)
    assert len(killed) == 2 and same_run(two, tmp_path / "killed")


ROWS = ([tiny.say()], [tiny.ask()], [tiny.draw(), tiny.edit(), tiny.draw("wide", 7, "two", (64, 32))])


def test_every_forward_calls_the_blocks_of_the_trunk_in_the_same_order(family):
    """What a batch may lack or call more often must not be sharded on its own: processes would wait for each other."""
    made, calls = tiny.model(family), []
    trunk = list(made.trunk())
    assert {id(b) for b in trunk} <= {id(b) for b in made.blocks()} and trunk
    for block in trunk:
        block.register_forward_hook(lambda m, *_: calls.append(id(m)))
    told = []
    for some in ROWS:
        calls.clear()
        made(pack([made.lay_out(s) for s in some], made.routes), Noise())
        told.append(list(calls))
    assert told[0] == told[1] == told[2] and set(told[0]) == {id(b) for b in trunk}


def gradients(made, parts, batches, counts):
    """By name, what backward leaves in the parameters of these parts."""
    for batch in batches:
        combine(made(batch, Noise(0, 1)), dict.fromkeys(counts, 1.0), counts).backward()
    return {n: p.grad for part in parts.values() for n, p in part.items()}


def unequal():
    """In one of two processes: a row of words here, a row of pictures there, whatever part of a family is trained."""
    with processes_.processes("cpu") as (rank, _):
        for family in tiny.FAMILIES:
            made = tiny.model(family)
            free = [part for part in made.parts if part not in made.frozen]
            batches = [pack([made.lay_out(s) for s in some], made.routes) for some in (ROWS[0], ROWS[2])]
            counts = add_counts([made.counts(b) for b in batches])
            for train in (dict.fromkeys(free, 1.0), {free[-1]: 1.0}):
                one, shared = (tiny.shake(tiny.model(family)) for _ in range(2))
                whole = pack([one.lay_out(s) for some in (ROWS[0], ROWS[2]) for s in some], one.routes)
                expected = gradients(one, freeze(one, train), [whole], counts)
                trained = {p for part in freeze(shared, train).values() for p in part.values()}
                parallel.spread(shared, EngineConfig(shard="full"), "fp32", "cpu", trained)
                parts = freeze(shared, train)
                gradients(shared, parts, [batches[rank]], counts)
                parallel.add_gradients(p for part in parts.values() for p in part.values())
                for part in parts.values():
                    for name, p in part.items():
                        g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                        e = torch.zeros_like(g) if expected[name] is None else expected[name]
                        assert float((g - e).abs().max()) <= 1e-5 * max(1.0, float(e.abs().max())), (family, name)


def test_processes_whose_rows_are_of_unequal_kinds_do_not_wait_for_each_other():
    processes(2, [sys.executable, "-c", "from tests.training.test_parallel import unequal; unequal()"])


def compiled():
    """Losses and gradients, with blocks (but for those of IOMM's reader, which are transformers') traced and run as
    traced: what ``inductor`` makes of a trace takes minutes here."""
    for family in ("bagel", "iomm"):
        found = []
        for engine in (EngineConfig(), EngineConfig(compile="eager", recompute="full")):
            made = tiny.shake(tiny.model(family))
            parts = freeze(made, {part: 1.0 for part in made.parts if part not in made.frozen})
            parallel.spread(made, engine, "fp32", "cpu", set())
            losses = made(pack([made.lay_out(s) for some in ROWS for s in some], made.routes, 256), Noise())
            sum(t.sum for t in losses.values()).backward()
            reached = [[p.grad for p in part.values() if p.grad is not None] for part in parts.values()]
            norms = [float(torch.nn.utils.get_total_norm(grads)) for grads in reached if grads]
            found.append([*(float(t.sum.detach()) for t in losses.values()), *norms])
        assert found[1] == pytest.approx(found[0], rel=1e-4), family
        assert torch._dynamo.utils.counters["frames"]["ok"], "nothing was traced"
        torch._dynamo.reset()


def test_compiled_blocks_compute_the_same():
    """In a process without checks of shapes, which cannot be traced."""
    processes(1, [sys.executable, "-c", "from tests.training.test_parallel import compiled; compiled()"])
